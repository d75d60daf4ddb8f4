"""Useful floating-point operations of a training step, from integers alone.

What the model must compute, once: the forward pass, gradients of inputs where something below trains, gradients of
weights that train. A prefix that samples share counts once. Causal attention counts half. After attention, the last
layer counts only supervised tokens: the loss reads no others. Padding, recomputation, elementwise work and the
optimizer count nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from vl3train.contracts.records import Batch
from vl3train.model.layers.nf4_linear import Nf4Linear, is_frozen
from vl3train.model.packed_forward import head_dims
from vl3train.model.trainable import REPLACED, part_of


@dataclass(frozen=True, slots=True, kw_only=True)
class FlopRates:
    """Operations for each row (patch, visual token, token, supervised token) and each attended pair of rows."""

    patch: int
    patch_pair: int
    visual_token: int
    token: int
    token_pair: int
    supervised_token: int

    def of(self, batch: Batch) -> int:
        """Useful operations of one micro-batch, forward and backward."""
        return (
            self.patch * sum(batch.frame_lengths)
            + self.patch_pair * sum(length**2 for length in batch.frame_lengths)
            + self.visual_token * batch.kept.shape[0]
            + self.token * sum(batch.segment_lengths)
            + self.token_pair * batch.doubled_pairs // 2
            + self.supervised_token * batch.supervised_positions.shape[0]
        )


def flop_rates(hf_model: Any) -> FlopRates:
    """Rates of the model as it trains: call it after set_trainable and add_adapters.

    An adapter's two products count like any other. Where only adapters of the language model train, its first layer's
    input gets a gradient too: all layers are then one compiled graph (model/packed_forward.py).
    """
    learning = {"vision_encoder": False, "projector": False, "language_model": False}
    for name, parameter in hf_model.named_parameters():
        learning[part_of(name)] |= parameter.requires_grad
    vision_backward = learning["vision_encoder"]
    projector_backward = vision_backward or learning["projector"]
    language_backward = projector_backward or learning["language_model"]

    last = len(hf_model.model.language_model.layers) - 1
    read_by_loss = re.compile(rf"lm_head|language_model\.layers\.{last}\.(self_attn\.o_proj|mlp)\.")
    rows = dict.fromkeys(("patch", "visual_token", "token", "supervised_token"), 0)
    for name, module in hf_model.named_modules():
        if REPLACED in name or not isinstance(module, nn.Linear | nn.Conv2d | Nf4Linear):
            continue  # peft keeps the frozen original of a part it trains a copy of
        if isinstance(module, nn.Conv2d):  # the patch embedding: a product over one patch, of pixels
            kernel = module.kernel_size[0] * module.kernel_size[1]
            work, input_gradient, row = module.in_channels * kernel * module.out_channels, False, "patch"
        else:
            work = module.in_features * module.out_features
            part = part_of(f"{name}.weight")
            if part == "vision_encoder":
                row, input_gradient = "patch", vision_backward
            elif part == "projector":
                first = name.endswith("readout.0")
                row, input_gradient = "visual_token", vision_backward if first else projector_backward
            else:
                row = "supervised_token" if read_by_loss.search(f"{name}.") else "token"
                input_gradient = language_backward
        rows[row] += 2 * work * (1 + input_gradient + (not is_frozen(module)))

    vision, text = hf_model.config.vision_config, hf_model.config.text_config
    _, text_dim = head_dims(hf_model)
    return FlopRates(
        **rows,
        # Two products a pair forward (scores, values), four backward.
        patch_pair=4 * vision.hidden_size * vision.num_hidden_layers * (3 if vision_backward else 1),
        token_pair=4
        * text_dim
        * text.num_attention_heads
        * text.num_hidden_layers
        * (3 if language_backward else 1),
    )
