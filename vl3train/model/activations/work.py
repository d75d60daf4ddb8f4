"""What each layer recomputes in the backward pass, and how many operations that is.

Counted from integers alone, like model/activations/flops.py: matrix products with weights, and attention. Elementwise
work counts nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from torch import nn

from vl3train.config.choices import Recompute
from vl3train.contracts.records import Batch
from vl3train.model.activations.last_layer import last_positions
from vl3train.model.layers.nf4_linear import Nf4Linear, is_frozen
from vl3train.model.trainable import part_of

NOTHING_RECOMPUTED = (Recompute.nothing, Recompute.elementwise)


class RecomputePlan(NamedTuple):
    """One level for each layer of the two towers, first layer first."""

    vision: tuple[Recompute, ...]
    language: tuple[Recompute, ...]

    def __str__(self) -> str:
        """In words: ``encoder 27 x elementwise, language model 19 x mlp 9 x elementwise``."""
        towers = zip(("encoder", "language model"), self, strict=True)
        return ", ".join(
            " ".join([tower, *(f"{len(list(run))} x {level.value}" for level, run in groupby(levels))])
            for tower, levels in towers
        )


def uniform_plan(vision: Recompute, language: Recompute, num_layers: tuple[int, int]) -> RecomputePlan:
    """The same level in all layers of a tower; ``num_layers`` are the encoder's and the language model's."""
    return RecomputePlan((vision,) * num_layers[0], (language,) * num_layers[1])


class PackSize(NamedTuple):
    """What decides the work and the memory of a pack; integers of the host."""

    patches: int
    patch_pairs: int  # in one frame, each with each
    tokens: int
    token_pairs: int  # each with those that it attends to, in its sample and in the prefix of a branch


def pack_size(batch: Batch) -> PackSize:
    """The size of one micro-batch."""
    return PackSize(
        patches=sum(batch.frame_lengths),
        patch_pairs=sum(length**2 for length in batch.frame_lengths),
        tokens=sum(batch.segment_lengths),
        token_pairs=batch.doubled_pairs // 2,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerWork:
    """Operations of one layer of a tower for each row and for each attended pair of rows."""

    num_layers: int
    mlp_row: int
    """The MLP's products from hidden_size to intermediate_size."""
    layer_row: int
    """All matrix products but the last, whose result no gradient needs."""
    projection_row: int
    """The product that follows attention."""
    layer_pair: int
    forward_row: int
    """All matrix products."""
    backward_row: int
    """Products of the backward pass: gradients of rows, and of weights that train; 0 without a backward pass."""
    has_backward: bool
    """False where nothing in or before the tower trains: its layers keep nothing and recompute nothing."""

    def of(self, level: Recompute, rows: int, pairs: int) -> int:
        """Operations that one layer at this level recomputes."""
        if not self.has_backward or level in NOTHING_RECOMPUTED:
            return 0
        if level is Recompute.mlp:
            return self.mlp_row * rows
        return self.layer_row * rows + self.layer_pair * pairs

    def past_attention(self, level: Recompute) -> int:
        """Operations that one row of a layer at this level recomputes after attention."""
        if not self.has_backward or level in NOTHING_RECOMPUTED:
            return 0
        return self.mlp_row + (self.projection_row if level is not Recompute.mlp else 0)

    def forward(self, rows: int, pairs: int) -> int:
        """Operations of the whole tower's forward pass."""
        return self.num_layers * (self.forward_row * rows + self.layer_pair * pairs)

    def backward(self, rows: int, pairs: int) -> int:
        """Operations of the whole tower's backward pass, without recomputation."""
        if not self.has_backward:
            return 0
        return self.num_layers * (self.backward_row * rows + 2 * self.layer_pair * pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecomputeRates:
    """Operations of a model as it trains: of the two towers' layers, and of the logits. Nothing else is counted."""

    vision: TowerWork
    language: TowerWork
    supervised_token: int
    """Of a supervised token's logits, where the loss recomputes them, whatever the plan; else 0."""

    def of(self, batch: Batch, plan: RecomputePlan) -> int:
        """Operations of one micro-batch that are recomputed."""
        size, positions = pack_size(batch), last_positions(batch)
        left_out = 0 if positions is None else size.tokens - positions.shape[0]
        return (
            sum(self.vision.of(level, size.patches, size.patch_pairs) for level in plan.vision)
            + sum(self.language.of(level, size.tokens, size.token_pairs) for level in plan.language)
            - self.language.past_attention(plan.language[-1]) * left_out
            + self.supervised_token * batch.supervised_positions.shape[0]
        )

    def forward(self, size: PackSize) -> int:
        """Operations of the forward pass."""
        return self.vision.forward(size.patches, size.patch_pairs) + self.language.forward(
            size.tokens, size.token_pairs
        )

    def backward(self, size: PackSize) -> int:
        """Operations of the backward pass, without recomputation."""
        return self.vision.backward(size.patches, size.patch_pairs) + self.language.backward(
            size.tokens, size.token_pairs
        )


def recompute_rates(hf_model: Any, *, recomputes_logits: bool) -> RecomputeRates:
    """Rates of the model as it trains: call it after set_trainable and add_adapters.

    ``recomputes_logits``: whether the loss recomputes logits for their gradients (model/loss.py).

    An adapter counts with the product it sits on. Two small errors: the adapters' low-rank products count as recomputed
    also where a layer that is not compiled keeps them; and a layer's last product does not count, although it is
    recomputed where it has an adapter or where ZeRO-3 replaces torch's linear function (2 % of a step was seen).
    """
    trained = {part_of(name) for name, parameter in hf_model.named_parameters() if parameter.requires_grad}
    encoder_layers = hf_model.model.vision_model.encoder.layers
    decoder_layers = hf_model.model.language_model.layers
    head = hf_model.get_output_embeddings()
    language_backward = bool(trained)  # the gradients of every part come through the language model
    return RecomputeRates(
        vision=_tower_work(
            encoder_layers,
            ("fc1",),
            "out_proj",
            has_backward="vision_encoder" in trained,
        ),
        language=_tower_work(
            decoder_layers,
            ("gate_proj", "up_proj"),
            "o_proj",
            has_backward=language_backward,
        ),
        supervised_token=2 * head.in_features * head.out_features * (language_backward and recomputes_logits),
    )


def _tower_work(
    layers: nn.ModuleList, to_intermediate: tuple[str, ...], projection: str, *, has_backward: bool
) -> TowerWork:
    """``to_intermediate`` names the MLP's products to intermediate_size, ``projection`` the one after attention."""
    layer: Any = layers[0]
    mlp_row = sum(_products(getattr(layer.mlp, name)) for name in to_intermediate)
    projected: Any = getattr(layer.self_attn, projection)
    return TowerWork(
        num_layers=len(layers),
        mlp_row=mlp_row,
        layer_row=mlp_row + _products(layer.self_attn),
        projection_row=_products(projected),
        layer_pair=4 * projected.in_features,  # scores and values, 2 operations for each value of all heads
        forward_row=_products(layer),
        backward_row=has_backward * (_products(layer) + _products(layer, trained=True)),
        has_backward=has_backward,
    )


def _products(module: nn.Module, *, trained: bool = False) -> int:
    """Operations of all linear layers in a module for one row; ``trained``: only of those whose weight trains."""
    linears = (
        part
        for part in module.modules()
        if isinstance(part, nn.Linear | Nf4Linear) and not (trained and is_frozen(part))
    )
    return sum(2 * linear.in_features * linear.out_features for linear in linears)
