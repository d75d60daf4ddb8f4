"""Compiled layers under ZeRO-3, which gives a layer its whole weights while it runs, and takes them back.

ZeRO-3 does this in hooks around calls of modules. Hooks cannot be compiled, and a compiled layer calls none of the
modules within it. So the layer itself is called: ZeRO-3 gathers all of its weights at once, then the compiled code
runs, then they are partitioned again; in the backward pass likewise. The compiled code gets the weights through one
stand-in for all layers of a tower, for the modules that hold ZeRO-3's weights have dicts that cannot be traced.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vl3train.model.layers.layers import Layer


def call_layers(layers: Sequence[nn.Module], run_layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``run_layer`` (tower.py) with each layer called as a module, whose forward then is what ``run_layer`` does.

    Args:
        layers: of all towers, before ZeRO-3 takes them over. Their own forward is replaced.
        run_layer: from ``layer_runner``.
    """
    stand_ins = {type(layer): _without_weights(layer) for layer in reversed(layers)}
    for layer in layers:
        layer.forward = _forward

    def run(body: Layer, layer: nn.Module, hidden: Tensor, *rest: Any) -> Tensor:
        def with_weights(rows: Tensor) -> Tensor:
            stand_in = stand_ins[type(layer)]
            _lend_weights(layer, stand_in)
            return run_layer(body, stand_in, rows, *rest)

        return layer(hidden, with_weights)

    return run


def _forward(hidden: Tensor, body: Callable[[Tensor], Tensor]) -> Tensor:
    return body(hidden)


def _without_weights(layer: nn.Module) -> nn.Module:
    """The same modules and settings; its weights are lent before each call."""
    held = {id(one): nn.Parameter(torch.empty_like(one, device="meta"), False) for one in layer.parameters()}
    return copy.deepcopy(layer, held)


def _lend_weights(layer: nn.Module, stand_in: nn.Module) -> None:
    for own, other in zip(layer.modules(), stand_in.modules(), strict=True):
        for name, weight in own._parameters.items():
            other._parameters[name] = weight
