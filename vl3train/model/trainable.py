"""Which parts of the model train, and at which learning rate."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from vl3train.config.schema import PARTS
from vl3train.model.layers.nf4_linear import sizes_in_4_bits

PART_PREFIXES: dict[str, tuple[str, ...]] = {
    "vision_encoder": ("model.vision_model",),
    "projector": ("model.projector",),
    "language_model": ("model.language_model", "lm_head"),
}
"""Prefixes of each part's parameters in transformers' model. The head belongs to the language model, tied or not."""

# Wrappers only add something before (PackedModel "model.", peft "base_model.model.") or after these names.
_PART_PATTERNS = {
    part: re.compile(r"(^|\.)(" + "|".join(re.escape(prefix) for prefix in prefixes) + r")\.")
    for part, prefixes in PART_PREFIXES.items()
}


def part_of(parameter_name: str) -> str:
    """The part that a parameter belongs to, with or without the prefixes of PackedModel and peft.

    Raises ValueError for a name of no part.

    >>> part_of("base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.default.weight")
    'language_model'
    >>> part_of("lm_head.weight")
    'language_model'
    """
    for part, pattern in _PART_PATTERNS.items():
        if pattern.search(parameter_name):
            return part
    raise ValueError(f"parameter {parameter_name} is in none of the parts {', '.join(PARTS)}")


def set_trainable(hf_model: nn.Module, trainable: Collection[str]) -> None:
    """Train exactly the named parts and freeze every other one.

    The head trains with the language model. Call it before add_adapters, never after: from then on peft decides. Raises
    ValueError for an unknown part.
    """
    if unknown := sorted(set(trainable) - set(PART_PREFIXES)):
        raise ValueError(
            f"stage.learning_rates: no part named {', '.join(unknown)}; "
            f"the parts are {', '.join(PART_PREFIXES)}"
        )
    for name, parameter in hf_model.named_parameters():
        parameter.requires_grad_(part_of(name) in trainable)


REPLACED = ".original_module."
"""In names of weights of which peft trains a copy: they are kept, and the model does not use them."""


def count_parameters(hf_model: nn.Module) -> dict[str, tuple[int, int]]:
    """Numbers of trainable and of all parameters of each part; a tied head counts once, and what peft replaced not."""
    counts = dict.fromkeys(PART_PREFIXES, (0, 0))
    for name, parameter in hf_model.named_parameters():
        if REPLACED in name:
            continue
        trainable, total = counts[part_of(name)]
        size = parameter.numel()
        counts[part_of(name)] = (trainable + size * parameter.requires_grad, total + size)
    for name, size in sizes_in_4_bits(hf_model):
        trainable, total = counts[part_of(name)]
        counts[part_of(name)] = trainable, total + size
    return counts


def parameter_groups(
    hf_model: nn.Module, learning_rates: Mapping[str, float], weight_decay: float
) -> list[dict[str, Any]]:
    """One AdamW group for each part that trains, with "name", "params", "lr" and "weight_decay".

    With weight decay, biases and norms form a group of their own, without it. A part's rate holds for what trains in
    it, full weights or adapters. Raises ValueError when a parameter trains and has no rate, or a rate has nothing to
    train.
    """
    groups: dict[str, dict[str, Any]] = {}
    seen: set[str] = set()
    for name, parameter in hf_model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = part_of(name)
        if part not in learning_rates:
            raise ValueError(f"{name} would train, but stage.learning_rates has no rate for {part}")
        seen.add(part)
        group_name, decay = part, weight_decay
        if weight_decay > 0 and _is_bias_or_norm(name):
            group_name, decay = f"{part}.no_decay", 0.0
        group = groups.setdefault(
            group_name, {"name": group_name, "params": [], "lr": learning_rates[part], "weight_decay": decay}
        )
        group["params"].append(parameter)
    if idle := sorted(set(learning_rates) - seen):
        raise ValueError(f"stage.learning_rates names {', '.join(idle)}, where no parameter trains")
    return list(groups.values())


def _is_bias_or_norm(name: str) -> bool:
    # By name, not by shape: ZeRO-3 flattens every weight to one dimension.
    module, _, leaf = name.rpartition(".")
    return leaf == "bias" or "norm" in module.rpartition(".")[2]
