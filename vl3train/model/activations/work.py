"""What each layer of a pack computes again in the backward pass, and how many operations that is.

Like model/activations/flops.py from integers alone: products with weights and attention, elementwise work counts
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from torch import nn

from vl3train.config.choices import Recompute
from vl3train.contracts.records import Batch
from vl3train.model.activations.last_layer import last_positions
from vl3train.model.trainable import part_of

NOTHING_RECOMPUTED = (Recompute.nothing, Recompute.elementwise)


class RecomputePlan(NamedTuple):
    """One level for each layer of the two towers, first layer first."""

    vision: tuple[Recompute, ...]
    language: tuple[Recompute, ...]

    def __str__(self) -> str:
        """In words, as ``encoder 27 x elementwise, language model 19 x mlp 9 x elementwise``."""
        towers = zip(("encoder", "language model"), self, strict=True)
        return ", ".join(
            " ".join([tower, *(f"{len(list(run))} x {level.value}" for level, run in groupby(levels))])
            for tower, levels in towers
        )


class PackSize(NamedTuple):
    """What decides the work and the memory of a pack, from the host."""

    patches: int
    patch_pairs: int  # in one frame, each with each
    tokens: int
    token_pairs: int  # in one sample, each with itself and those before it


def pack_size(batch: Batch) -> PackSize:
    """The size of one micro-batch."""
    return PackSize(
        patches=sum(batch.frame_lengths),
        patch_pairs=sum(length**2 for length in batch.frame_lengths),
        tokens=sum(batch.segment_lengths),
        token_pairs=sum(length**2 for length in batch.segment_lengths) // 2,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerWork:
    """Operations that one layer of a tower does again for each row and each attended pair of rows."""

    num_layers: int
    mlp_row: int
    """The products that widen the row."""
    layer_row: int
    """All products but the last, whose result no gradient needs."""
    projection_row: int
    """The product that follows attention."""
    layer_pair: int
    forward_row: int
    """All products."""
    backward_row: int
    """Those of the gradients, of rows and of weights that train; 0 where nothing has one."""
    has_backward: bool
    """Where nothing in or before the tower trains, its layers keep nothing and do nothing again."""

    def of(self, level: Recompute, rows: int, pairs: int) -> int:
        """Operations that one layer at this level does again."""
        if not self.has_backward or level in NOTHING_RECOMPUTED:
            return 0
        if level is Recompute.mlp:
            return self.mlp_row * rows
        return self.layer_row * rows + self.layer_pair * pairs

    def past_attention(self, level: Recompute) -> int:
        """What of it one row of a layer at this level does again after attention."""
        if not self.has_backward or level in NOTHING_RECOMPUTED:
            return 0
        return self.mlp_row + (self.projection_row if level is not Recompute.mlp else 0)

    def forward(self, rows: int, pairs: int) -> int:
        """Operations of the whole tower's forward pass."""
        return self.num_layers * (self.forward_row * rows + self.layer_pair * pairs)

    def backward(self, rows: int, pairs: int) -> int:
        """Operations of the whole tower's backward pass, without what is done again."""
        if not self.has_backward:
            return 0
        return self.num_layers * (self.backward_row * rows + 2 * self.layer_pair * pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecomputeRates:
    """Of a model as it trains. What is outside of the towers' layers counts for nothing but ``supervised_token``."""

    vision: TowerWork
    language: TowerWork
    supervised_token: int
    """Its logits, where the loss computes them again, whatever the levels."""

    def of(self, batch: Batch, levels: RecomputePlan) -> int:
        """Operations of one micro-batch that are done again."""
        size, positions = pack_size(batch), last_positions(batch)
        left_out = 0 if positions is None else size.tokens - positions.shape[0]
        return (
            sum(self.vision.of(level, size.patches, size.patch_pairs) for level in levels.vision)
            + sum(self.language.of(level, size.tokens, size.token_pairs) for level in levels.language)
            - self.language.past_attention(levels.language[-1]) * left_out
            + self.supervised_token * batch.supervised_positions.shape[0]
        )

    def forward(self, size: PackSize) -> int:
        """Operations of the forward pass."""
        return self.vision.forward(size.patches, size.patch_pairs) + self.language.forward(
            size.tokens, size.token_pairs
        )

    def backward(self, size: PackSize) -> int:
        """Operations of the backward pass, without what is done again."""
        return self.vision.backward(size.patches, size.patch_pairs) + self.language.backward(
            size.tokens, size.token_pairs
        )


def recompute_rates(hf_model: Any, *, recomputes_logits: bool) -> RecomputeRates:
    """Rates of the model as it trains: call it after set_trainable and add_adapters.

    ``recomputes_logits`` where the loss makes logits once more for their gradients (model/loss.py).

    Adapters count in the products they sit on; the narrow ones that a layer which is not compiled keeps are counted
    all the same. Not counted: what of a layer's last product is done again after all, where an adapter sits on it or
    where DeepSpeed's linear function of ZeRO-3 takes torch's place (2 % of a step was seen).
    """
    trained = {part_of(name) for name, parameter in hf_model.named_parameters() if parameter.requires_grad}
    vision, text = hf_model.config.vision_config, hf_model.config.text_config
    text_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    encoder_layers = hf_model.model.vision_model.encoder.layers
    decoder_layers = hf_model.model.language_model.layers
    head = hf_model.get_output_embeddings()
    language_backward = bool(trained)  # every part that trains has its gradient through the language model
    return RecomputeRates(
        vision=_tower_work(
            encoder_layers,
            ("fc1",),
            "out_proj",
            4 * vision.hidden_size,
            has_backward="vision_encoder" in trained,
        ),
        language=_tower_work(
            decoder_layers,
            ("gate_proj", "up_proj"),
            "o_proj",
            4 * text_dim * text.num_attention_heads,
            has_backward=language_backward,
        ),
        supervised_token=2 * head.in_features * head.out_features * (language_backward and recomputes_logits),
    )


def _tower_work(
    layers: nn.ModuleList, widening: tuple[str, ...], projection: str, pair: int, *, has_backward: bool
) -> TowerWork:
    """``widening`` are the MLP's products that widen the row, the one that narrows it again is left out."""
    layer: Any = layers[0]
    mlp_row = sum(_products(getattr(layer.mlp, name)) for name in widening)
    return TowerWork(
        num_layers=len(layers),
        mlp_row=mlp_row,
        layer_row=mlp_row + _products(layer.self_attn),
        projection_row=_products(getattr(layer.self_attn, projection)),
        layer_pair=pair,
        forward_row=_products(layer),
        backward_row=has_backward * (_products(layer) + _products(layer, trained=True)),
        has_backward=has_backward,
    )


def _products(module: nn.Module, *, trained: bool = False) -> int:
    """Operations of all linear layers in a module, or of those whose weight is ``trained``, for one row."""
    linears = (
        part
        for part in module.modules()
        if isinstance(part, nn.Linear) and (part.weight.requires_grad or not trained)
    )
    return sum(2 * linear.in_features * linear.out_features for linear in linears)
