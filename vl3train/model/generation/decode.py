"""One token more for each of many answers: a decoding step over a cache of fixed slots.

B slots, C rows of a slot, L layers, Hkv key and value heads, G query heads of each, D values a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vl3train.contracts.shapes import tower_shapes
from vl3train.model.generation.layer import layer_rows
from vl3train.model.generation.sampling import Sampling, next_tokens

ROWS_STEP = {"cuda": 256, "cpu": 64}
"""Attention reads the cache up to the longest answer, rounded up to a multiple of this: on a GPU each length that
occurs costs a CUDA graph."""


class Slots:
    """The cache of B answers in progress and the step that lengthens them all.

    A free slot takes part in every step with a token that nobody reads. On a GPU a step is one CUDA graph for each
    length: launching its kernels one by one takes longer than running them.
    """

    def __init__(
        self,
        hf_model: Any,
        num_slots: int,
        num_rows: int,
        sampling: Sampling,
        random: torch.Generator,
    ) -> None:
        weight = hf_model.model.language_model.embed_tokens.weight
        self.hf_model, self.sampling, self.device = hf_model, sampling, weight.device
        self.num_slots, self.num_rows = num_slots, num_rows
        layers, heads, head_dim = cache_shape(hf_model)
        self.cache = torch.zeros(
            (layers, 2, num_slots, heads, num_rows, head_dim), dtype=weight.dtype, device=self.device
        )
        self.tokens_B = torch.zeros(num_slots, dtype=torch.int64, device=self.device)
        self.places_B = torch.zeros(
            num_slots, dtype=torch.int64, device=self.device
        )  # row that the token takes
        self.in_use_B = torch.zeros(
            num_slots, dtype=torch.int64, device=self.device
        )  # 1 where there is an answer
        self._every_slot = torch.arange(num_slots, device=self.device)
        self._rows = torch.arange(num_rows, device=self.device)
        self._random = random
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def put(self, slot: int, pieces: Sequence[Tensor], token: int) -> None:
        """Begin an answer: keys and values (L, 2, length, Hkv, D) of the pieces of its prompt, and its first token."""
        length = 0
        for keys_values in pieces:
            end = length + keys_values.shape[2]
            self.cache[:, :, slot, :, length:end] = keys_values.transpose(2, 3)
            length = end
        self.tokens_B[slot] = token
        self.places_B[slot] = length
        self.in_use_B[slot] = 1

    def free(self, slot: int) -> None:
        """The slot's answer has ended."""
        self.places_B[slot] = self.in_use_B[slot] = 0

    @torch.no_grad()
    def step(self, longest: int, num_busy: int) -> None:
        """The next token of every answer, into ``tokens_B``.

        Args:
            longest: the most rows that a slot then has.
            num_busy: no slot from this one on has an answer. A CPU leaves them out; a GPU's graphs are of all slots.
        """
        rows_step = ROWS_STEP[self.device.type]
        num_rows = min(-(-longest // rows_step) * rows_step, self.num_rows)
        if self.device.type != "cuda":
            return self._step(num_rows, num_busy)
        if num_rows not in self._graphs:
            self._graphs[num_rows] = self._captured(num_rows)
        self._graphs[num_rows].replay()
        return None

    def _step(self, num_rows: int, num_busy: int) -> None:
        language_model = self.hf_model.model.language_model
        tokens_B, places_B, every_slot = (
            x[:num_busy] for x in (self.tokens_B, self.places_B, self._every_slot)
        )
        hidden_BH = language_model.embed_tokens(tokens_B)
        cos_1BD, sin_1BD = language_model.rotary_emb(hidden_BH.unsqueeze(0), places_B.unsqueeze(0))
        visible = (self._rows[:num_rows] <= places_B[:, None])[:, None, None]  # (B, 1, 1, rows)
        for number, layer in enumerate(language_model.layers):

            def cached(
                q: Tensor,
                k: Tensor,
                v: Tensor,
                of_layer: Tensor = self.cache[number],
                scale: float = layer.self_attn.scaling,
            ) -> Tensor:
                for store, new in zip(of_layer, (k, v), strict=True):
                    store[every_slot, :, places_B] = new
                keys, values = of_layer[:, :num_busy, :, :num_rows]
                # The query heads of a key and value head stand where attention has its rows: no head is repeated.
                grouped = q.unflatten(1, (k.shape[1], -1))  # (B, Hkv, G, D)
                out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=visible, scale=scale)
                return out.flatten(1, 2)

            hidden_BH = layer_rows(layer, hidden_BH, cos_1BD.squeeze(0), sin_1BD.squeeze(0), cached)
        logits_BV = self.hf_model.lm_head(language_model.norm(hidden_BH))
        tokens_B.copy_(next_tokens(logits_BV, self.sampling, self._random))
        places_B.add_(self.in_use_B[:num_busy])

    def _captured(self, num_rows: int) -> torch.cuda.CUDAGraph:
        """A CUDA graph of the step; nothing is changed by capturing it."""
        before = self.tokens_B.clone(), self.places_B.clone()
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):  # libraries set themselves up in a first run, which no graph may hold
            self._step(num_rows, self.num_slots)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._random)
        # The loader's thread page-locks batches meanwhile, which ends a capture that forbids it to other threads.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._step(num_rows, self.num_slots)
        self.tokens_B.copy_(before[0])
        self.places_B.copy_(before[1])
        return graph


def cache_shape(hf_model: Any) -> tuple[int, int, int]:
    """Layers, key and value heads, and values a head."""
    _, shape = tower_shapes(hf_model.config)
    return shape.num_layers, shape.num_kv_heads, shape.head_dim


def slot_bytes(hf_model: Any, num_rows: int) -> int:
    """Bytes of cache for each slot of ``num_rows``."""
    layers, heads, head_dim = cache_shape(hf_model)
    size: int = hf_model.model.language_model.embed_tokens.weight.element_size()
    return layers * 2 * heads * head_dim * num_rows * size
