"""The packed forward: transformers' modules, driven once over samples that lie end to end on one row.

Letters: T tokens, P patches, M merged visual tokens, N of them kept, U supervised tokens, C encoder hidden
size, H language-model hidden size. No line here waits for the device: bounds and lengths come with the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import VideoLlama3ForConditionalGeneration

from vl3train.config.choices import Recompute
from vl3train.contracts.families import family_lengths
from vl3train.contracts.records import Batch
from vl3train.contracts.shapes import tower_shapes
from vl3train.model.activations.last_layer import last_positions
from vl3train.model.activations.work import RecomputePlan, uniform_plan
from vl3train.model.attention.backends import make_segments
from vl3train.model.compiling import compiled
from vl3train.model.layers.layers import GradientSums, Layer, decoder_layer, encoder_layer
from vl3train.model.layers.tower import NO_CALLBACKS, LayerCallbacks, Tower, layer_runner, run_layers
from vl3train.model.layers.whole_layers import call_layers
from vl3train.model.loss import grade_logits, loss_with_gradients, score_logits, supervised_loss


class PackedOutput(NamedTuple):
    """What one micro-batch gives. A tuple: DeepSpeed's ZeRO-3 hooks find tensors in tuples and dicts only."""

    loss_sum: Tensor  # 0-d float32, sum over the supervised tokens; differentiable
    token_losses: Tensor  # (U,) float32, detached
    correct: Tensor  # (U,) bool, the label has the highest logit


class PackedModel(nn.Module):
    """A VideoLLaMA3 of transformers, its modules and parameter names untouched, with a forward over packs.

    ``hf_model`` may carry adapters (model/adapters.py). Its own forward and generate() still work. ``attention`` is the
    name of a backend, from choose_attention. ``recompute_vision`` and ``recompute_language`` make ``given_plan``, the
    plan of a forward pass in training that is given none. ``compile_layers`` fuses the layers' elementwise work, and
    ``gemm_backend`` (model/kernels/check.py) makes the matrix products of compiled layers. ``partitioned_weights`` says
    that ZeRO-3 will hold the weights: it then gathers ``whole_layers`` as they are, each with all that is in it.
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
        partitioned_weights: bool = False,
    ) -> None:
        super().__init__()
        _refuse_what_packs_cannot(hf_model)
        self.model = hf_model
        self.attention = attention
        num_layers = (
            len(hf_model.model.vision_model.encoder.layers),
            len(hf_model.model.language_model.layers),
        )
        self.given_plan = uniform_plan(recompute_vision, recompute_language, num_layers)
        self._nothing = uniform_plan(Recompute.nothing, Recompute.nothing, num_layers)
        self.compile_layers, self.gemm_backend = compile_layers, gemm_backend
        self.partitioned_weights = partitioned_weights
        self._run_layer = layer_runner(compiled=compile_layers)
        self.whole_layers: list[nn.Module] = []
        if compile_layers and partitioned_weights:
            towers = hf_model.model.vision_model.encoder.layers, hf_model.model.language_model.layers
            self.whole_layers = [layer for layers in towers for layer in layers]
            self._run_layer = call_layers(self.whole_layers, self._run_layer)
        self._score = compiled(score_logits, enabled=compile_layers)
        self._grade = compiled(grade_logits, enabled=compile_layers)
        self._norm = compiled(_last_norm, enabled=compile_layers and not partitioned_weights)
        self._scale_pixels = compiled(_scale_pixels, enabled=compile_layers)
        hf_model.model.vision_model.embeddings.patch_embedding.__class__ = PatchLinear

    @property
    def makes_logits_once(self) -> bool:
        """Whether the loss computes its gradients from the logits while it has them, and never recomputes logits.

        With compiled layers it does, where their weights are whole on every rank.
        """
        return self.compile_layers and not self.partitioned_weights

    @property
    def recomputes_in_part(self) -> bool:
        """Whether a part of a layer can be recomputed.

        Not where ZeRO-3 gathers the weights of each linear layer by itself. Of a compiled layer it gathers all.
        """
        return self.compile_layers or not self.partitioned_weights

    @property
    def keeps_more_at_nothing(self) -> bool:
        """Whether compiled layers keep more at nothing than at elementwise (config/choices.py)."""
        return self.compile_layers and self.gemm_backend == "quack"

    def weights_with_sums(self) -> list[tuple[tuple[Tensor, ...], ...]]:
        """Weights whose gradients the layers can add to float32 sums themselves, for each layer of the language model.

        A layer has one group of weights for each matrix product: gate and up, then down. Groups and weights are in
        the order of ``GradientSums``. Empty where layers cannot: they are not compiled, quack does not make their
        products, or not all of these weights are plain and trained.
        """
        if not self.compile_layers or self.gemm_backend != "quack":
            return []
        mlps: list[Any] = [layer.mlp for layer in self.model.model.language_model.layers]
        linears = [linear for mlp in mlps for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
        if not all(type(linear) is nn.Linear and linear.weight.requires_grad for linear in linears):
            return []
        return [((mlp.gate_proj.weight, mlp.up_proj.weight), (mlp.down_proj.weight,)) for mlp in mlps]

    def lay_frozen_weights_together(self) -> None:
        """Store the weights of gate and up of each frozen layer one below the other; for a model on its device.

        quack's products take both as one matrix (model/kernels/quack_gemm.py); weights that lie apart would be copied
        together in each pass. Weights that train lie together already, in DeepSpeed's buffers.
        """
        if self.gemm_backend != "quack":
            return
        for layer in self.model.model.language_model.layers:
            linears: list[Any] = [layer.mlp.gate_proj, layer.mlp.up_proj]
            if all(type(linear) is nn.Linear and not linear.weight.requires_grad for linear in linears):
                together = torch.cat([linear.weight.detach() for linear in linears])
                for linear, weight in zip(linears, together.chunk(2), strict=True):
                    linear.weight.data = weight

    def forward(
        self,
        batch: Batch,
        *,
        plan: RecomputePlan | None = None,
        whole_last_layer: bool = False,
        sums: Sequence[GradientSums] = (),
        callbacks: LayerCallbacks = NO_CALLBACKS,
    ) -> PackedOutput:
        """Loss of one micro-batch, summed over its supervised tokens.

        ``plan`` says what each layer recomputes in the backward pass; without one it is ``given_plan`` in training, and
        nothing otherwise. ``whole_last_layer`` lets the last layer compute all tokens, not only the supervised ones.
        ``sums`` are the gradient sums of each layer of the language model, for ``weights_with_sums``, or none.
        """
        if plan is None:
            plan = self.given_plan if self.training else self._nothing
        inputs_TH = self._embed(batch, self._visual_tokens(batch, plan.vision, callbacks))
        positions = None if whole_last_layer else last_positions(batch)
        hidden = self._language_states(batch, inputs_TH, plan.language, positions, sums, callbacks)
        head, places = self.model.lm_head, batch.supervised_positions
        if positions is not None:
            places = torch.arange(len(positions), device=positions.device)
        supervised = places, batch.supervised_labels, batch.num_loss_chunks
        if self.makes_logits_once and hidden.requires_grad:
            return PackedOutput(*loss_with_gradients(hidden, head, self._grade, *supervised))
        return PackedOutput(*supervised_loss(hidden, head, self._score, *supervised))

    def embedded(self, batch: Batch) -> Tensor:
        """(T, H): what the language model reads, without gradients: token embeddings, visual tokens in their places."""
        with torch.no_grad():
            return self._embed(batch, self._visual_tokens(batch, self._nothing.vision, NO_CALLBACKS))

    def _visual_tokens(self, batch: Batch, levels: Sequence[Recompute], callbacks: LayerCallbacks) -> Tensor:
        """(N, H) projected visual tokens; one dummy row when N is 0: every rank must run every module."""
        vision = self.model.model.vision_model
        # Not through vision.embeddings, which only adds a view: for the compiler a view is another kind of tensor, and
        # it would compile the first layer apart.
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
        tower = self._tower(vision.encoder.layers, encoder_layer)
        hidden_PC = run_layers(tower, hidden_PC, rope, segments, levels, callbacks=callbacks)
        merged_MC = merge_patches(vision.post_layernorm(hidden_PC), batch.patches_by_merge)
        rows_NC = merged_MC.index_select(0, batch.kept) if batch.kept.shape[0] else merged_MC[:1]
        return self.model.model.projector(rows_NC)

    def _embed(self, batch: Batch, visual_NH: Tensor) -> Tensor:
        """(T, H) token embeddings with the visual tokens in their places."""
        embeds_TH = self.model.model.language_model.embed_tokens(batch.input_ids)
        if torch.is_grad_enabled() and not embeds_TH.requires_grad and self.training:
            # Where only adapters train: without it the first layer alone would see rows that need no gradient. It would
            # be compiled apart, and its adapters could not be fused (model/layers/lora_dispatch.py).
            embeds_TH = embeds_TH.requires_grad_()
        if batch.placeholder_positions.shape[0] == 0:
            # Zero, but a path for the gradient: encoder and projector get zero gradients, and the layers of a frozen
            # language model run their backward pass, as on the ranks that have images (ZeRO-3 waits for all ranks).
            return embeds_TH + (visual_NH.sum() * 0).to(embeds_TH.dtype)
        return embeds_TH.index_copy(0, batch.placeholder_positions, visual_NH.to(embeds_TH.dtype))

    def _language_states(
        self,
        batch: Batch,
        inputs_TH: Tensor,
        levels: Sequence[Recompute],
        positions: Tensor | None,
        sums: Sequence[GradientSums],
        callbacks: LayerCallbacks,
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
            shared=batch.shared_prefixes,
            branches=[tokens for _, tokens in family_lengths(batch.segment_lengths, batch.num_branches)],
        )
        tower = self._tower(language_model.layers, decoder_layer)
        hidden = run_layers(
            tower, inputs_TH, rope, segments, levels, positions=positions, sums=sums, callbacks=callbacks
        )
        return self._norm(language_model.norm, hidden)

    def _tower(self, layers: nn.ModuleList, body: Layer) -> Tower:
        return Tower(
            layers=layers,
            body=body,
            run_layer=self._run_layer,
            compiled=self.compile_layers,
            gemm_backend=self.gemm_backend,
        )


class PatchLinear(nn.Conv2d):
    """The patch embedding as one matrix product: each of its inputs is exactly one patch.

    For 50 000 patches cuDNN's convolution takes 2 to 4 ms, the product 0.1 ms (H100).
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

    For merge size 2, transformers' bilinear interpolation is this mean. For 3 and more it is not: a model trained here
    would get other visual tokens there, so ValueError refuses those sizes.
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
    encoder, language_model = tower_shapes(hf_model.config)
    return encoder.head_dim, language_model.head_dim


def _refuse_what_packs_cannot(hf_model: VideoLlama3ForConditionalGeneration) -> None:
    """ValueError for settings that our attention would silently ignore."""
    vision: Any = hf_model.config.vision_config
    text: Any = hf_model.config.text_config
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        raise ValueError("text_config.use_sliding_window: packs know full attention only; set it to false")
    if text.attention_dropout or vision.attention_dropout:
        raise ValueError(
            "attention_dropout: the variable-length kernels have none; set it to 0 in both configs"
        )
