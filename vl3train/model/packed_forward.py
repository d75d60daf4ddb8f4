"""The packed forward: transformers' modules, driven once over samples that lie end to end on one row.

Letters: T tokens, P patches, M merged visual tokens, N of them kept, U supervised tokens, C encoder hidden
size, H language-model hidden size. No line here waits for the device: bounds and lengths come with the batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import VideoLlama3ForConditionalGeneration

from vl3train.config.choices import Recompute
from vl3train.contracts.records import Batch
from vl3train.model.activations.last_layer import last_positions
from vl3train.model.activations.work import RecomputePlan
from vl3train.model.attention.backends import make_segments
from vl3train.model.compiling import compiled
from vl3train.model.layers.layers import decoder_layer, encoder_layer, layer_runner, run_layers
from vl3train.model.loss import grade_logits, loss_with_gradients, score_logits, supervised_loss


class PackedOutput(NamedTuple):
    """What one micro-batch gives. A tuple: DeepSpeed's ZeRO-3 hooks look for tensors in tuples and dicts
    only."""

    loss_sum: Tensor  # 0-d float32, sum over the supervised tokens; differentiable
    token_losses: Tensor  # (U,) float32, detached
    correct: Tensor  # (U,) bool, the label has the highest logit


class PackedModel(nn.Module):
    """A VideoLLaMA3 of transformers, its modules and parameter names untouched, with a forward over packs.

    ``hf_model`` may carry adapters (model/adapters.py). Its own forward and generate() go on working.
    ``attention`` is the name of a backend, from choose_attention. In training each tower's layers recompute in
    the backward pass what ``recompute_vision`` and ``recompute_language`` say, unless ``choose_plan`` is set to
    something else (engine/memory/fit.py does); ``compile_layers`` fuses them, and ``products`` (model/kernels/check.py)
    says who makes their products. ``before_layer`` is called in the forward pass before each layer,
    ``on_layer_backward`` in the backward pass after each.
    """

    def __init__(
        self,
        hf_model: VideoLlama3ForConditionalGeneration,
        attention: str,
        *,
        recompute_vision: Recompute = Recompute.nothing,
        recompute_language: Recompute = Recompute.nothing,
        compile_layers: bool = False,
        gemm_backend: str = "torch",
    ) -> None:
        super().__init__()
        _refuse_what_packs_cannot(hf_model)
        self.model = hf_model
        self.attention = attention
        given = RecomputePlan(
            (recompute_vision,) * len(hf_model.model.vision_model.encoder.layers),
            (recompute_language,) * len(hf_model.model.language_model.layers),
        )
        self.choose_plan: Callable[[Batch, int], RecomputePlan] = lambda *_: given
        """(micro-batch, bytes for activations that others take meanwhile) -> what each layer computes again."""
        self.whole_last_layer = False
        """Whether the last layer works for all tokens, not for those alone that the loss reads."""
        self.before_layer: Callable[[], None] | None = None
        self.on_layer_backward: Callable[[], None] | None = None
        self._nothing = RecomputePlan(*((Recompute.nothing,) * len(levels) for levels in given))
        self.compile_layers, self.gemm_backend = compile_layers, gemm_backend
        self._run_layer = layer_runner(compiled=compile_layers)
        self._score = compiled(score_logits, enabled=compile_layers)
        self._grade = compiled(grade_logits, enabled=compile_layers)
        self._norm = compiled(_last_norm, enabled=compile_layers)
        self._scale_pixels = compiled(_scale_pixels, enabled=compile_layers)
        hf_model.model.vision_model.embeddings.patch_embedding.__class__ = PatchLinear

    @property
    def makes_logits_once(self) -> bool:
        """Whether the loss makes its gradients with the logits: compiled layers, whose weights are whole, do so."""
        return self.compile_layers

    @property
    def keeps_more_at_nothing(self) -> bool:
        """Whether compiled layers keep more at nothing than at elementwise (config/choices.py)."""
        return self.compile_layers and self.gemm_backend == "quack"

    def weights_with_sums(self) -> list[list[Tensor]]:
        """Those whose layers add a gradient to ``grad_sum``, if they have one: by product, in the sum's order."""
        if not self.compile_layers or self.gemm_backend != "quack":
            return []
        mlps = [layer.mlp for layer in self.model.model.language_model.layers]
        by_gemm = [linears for mlp in mlps for linears in ([mlp.gate_proj, mlp.up_proj], [mlp.down_proj])]
        linears = itertools.chain.from_iterable(by_gemm)
        plain = all(type(linear) is nn.Linear and linear.weight.requires_grad for linear in linears)
        return [[linear.weight for linear in linears] for linears in by_gemm] if plain else []

    def lay_frozen_weights_together(self) -> None:
        """Lay the weights of gate and up of a frozen layer one below the other in memory; for a model on its device.

        quack's products take both as one matrix (model/kernels/quack_gemm.py), and copy them together in each pass
        where they lie apart. Those that train lie so in DeepSpeed's buffers.
        """
        if self.gemm_backend != "quack":
            return
        for layer in self.model.model.language_model.layers:
            linears: list[Any] = [layer.mlp.gate_proj, layer.mlp.up_proj]
            if all(type(linear) is nn.Linear and not linear.weight.requires_grad for linear in linears):
                together = torch.cat([linear.weight.detach() for linear in linears])
                for linear, weight in zip(linears, together.chunk(2), strict=True):
                    linear.weight.data = weight

    def forward(self, batch: Batch, *, reserved_bytes: int = 0) -> PackedOutput:
        """Loss of one micro-batch by the sum over its supervised tokens; ``others`` as ``choose_plan`` takes them."""
        levels = self.choose_plan(batch, reserved_bytes) if self.training else self._nothing
        inputs_TH = self._embed(batch, self._visual_tokens(batch, levels.vision))
        positions = None if self.whole_last_layer else last_positions(batch)
        hidden = self._language_states(batch, inputs_TH, levels.language, positions)
        head, places = self.model.lm_head, batch.supervised_positions
        if positions is not None:
            places = torch.arange(len(positions), device=positions.device)
        supervised = places, batch.supervised_labels, batch.num_loss_chunks
        if self.makes_logits_once and hidden.requires_grad:
            return PackedOutput(*loss_with_gradients(hidden, head, self._grade, *supervised))
        return PackedOutput(*supervised_loss(hidden, head, self._score, *supervised))

    def _visual_tokens(self, batch: Batch, levels: Sequence[Recompute]) -> Tensor:
        """(N, H) projected visual tokens; one dummy row when N is 0, so that every rank runs every module."""
        vision = self.model.model.vision_model
        # Not through vision.embeddings, which adds a view alone: compiled layers would take the first for another kind.
        embedding = vision.embeddings.patch_embedding
        hidden_PC = embedding(self._scale_pixels(batch.pixel_values, embedding.weight.dtype))
        rope = vision.rotary_pos_emb(hidden_PC, batch.patch_positions)
        segments = make_segments(
            batch.vision_cu_seqlens,
            batch.frame_lengths,
            hidden_PC.shape[0],
            self.attention,
            compiled=self.compile_layers,
        )
        hidden_PC = run_layers(
            self._run_layer,
            encoder_layer,
            vision.encoder.layers,
            hidden_PC,
            rope,
            segments,
            levels,
            self.gemm_backend,
            self.compile_layers,
            before=self.before_layer,
            on_backward=self.on_layer_backward,
        )
        merged_MC = merge_patches(vision.post_layernorm(hidden_PC), batch.patches_by_merge)
        rows_NC = merged_MC.index_select(0, batch.kept) if batch.kept.shape[0] else merged_MC[:1]
        return self.model.model.projector(rows_NC)

    def _embed(self, batch: Batch, visual_NH: Tensor) -> Tensor:
        """(T, H) token embeddings with the visual tokens in their places."""
        embeds_TH = self.model.model.language_model.embed_tokens(batch.input_ids)
        if batch.placeholder_positions.shape[0] == 0:
            # Zero, but a path for the gradient: vision and projector get theirs, and the layers of a frozen
            # language model run their backward pass here because they do on the ranks that have images
            # (ZeRO-3 waits for all).
            return embeds_TH + (visual_NH.sum() * 0).to(embeds_TH.dtype)
        return embeds_TH.index_copy(0, batch.placeholder_positions, visual_NH.to(embeds_TH.dtype))

    def _language_states(
        self, batch: Batch, inputs_TH: Tensor, levels: Sequence[Recompute], positions: Tensor | None
    ) -> Tensor:
        """(T, H) final hidden states, or (U, H), those at ``positions``."""
        language_model = self.model.model.language_model
        cos_1TD, sin_1TD = language_model.rotary_emb(inputs_TH.unsqueeze(0), batch.position_ids.unsqueeze(0))
        rope = cos_1TD.squeeze(0), sin_1TD.squeeze(0)
        segments = make_segments(
            batch.cu_seqlens,
            batch.segment_lengths,
            inputs_TH.shape[0],
            self.attention,
            compiled=self.compile_layers,
        )
        hidden = run_layers(
            self._run_layer,
            decoder_layer,
            language_model.layers,
            inputs_TH,
            rope,
            segments,
            levels,
            self.gemm_backend,
            self.compile_layers,
            positions,
            self.before_layer,
            self.on_layer_backward,
        )
        return self._norm(language_model.norm, hidden)


class PatchLinear(nn.Conv2d):
    """The patch embedding as what it is, one matrix product: each of its inputs is one patch.

    cuDNN takes 2 to 4 ms for 50 000 patches where the product takes 0.1 (H100).
    """

    def forward(self, pixels: Tensor) -> Tensor:
        """(P, values of a patch), in any shape -> (P, C)."""
        return F.linear(pixels.flatten(1), self.weight.flatten(1), self.bias)


def _scale_pixels(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 to [-1, 1]: in float32 first, as the processor does; bfloat16 would double the rounding error."""
    return (pixels.float() / 127.5 - 1).to(dtype)


def _last_norm(norm: nn.Module, hidden: Tensor) -> Tensor:
    return norm(hidden)


def merge_patches(hidden_PC: Tensor, patches_by_merge: tuple[tuple[int, int], ...]) -> Tensor:
    """(M, C): the mean of each square of ``merge_size`` patches, which lie side by side in merge-block order.

    For merge size 2 transformers' bilinear interpolation is this mean; for 3 and more it is not, and a
    model trained with the one would be asked with the other, so those are refused.
    """
    merged, start = [], 0
    for merge_size, num_patches in patches_by_merge:
        if merge_size not in (1, 2):
            raise ValueError(
                f"merge size {merge_size}: transformers' model merges by a mean only for 1 and 2"
            )
        rows = hidden_PC[start : start + num_patches]
        merged.append(rows if merge_size == 1 else rows.unflatten(0, (-1, merge_size**2)).mean(1))
        start += num_patches
    if start != hidden_PC.shape[0]:
        raise ValueError(f"patches_by_merge counts {start} patches, the batch has {hidden_PC.shape[0]}")
    return merged[0] if len(merged) == 1 else torch.cat(merged)


def head_dims(hf_model: VideoLlama3ForConditionalGeneration) -> tuple[int, int]:
    """Head dimensions that attention must serve: the encoder's and the language model's."""
    vision: Any = hf_model.config.vision_config
    text: Any = hf_model.config.text_config
    text_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return vision.hidden_size // vision.num_attention_heads, text_dim


def _refuse_what_packs_cannot(hf_model: VideoLlama3ForConditionalGeneration) -> None:
    """ValueError for what our attention would silently leave out."""
    vision: Any = hf_model.config.vision_config
    text: Any = hf_model.config.text_config
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        raise ValueError("text_config.use_sliding_window: packs know full attention only; set it to false")
    if text.attention_dropout or vision.attention_dropout:
        raise ValueError(
            "attention_dropout: the variable-length kernels have none; set it to 0 in both configs"
        )
