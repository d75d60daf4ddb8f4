"""What adapters can be put on, and what they cannot go together with."""

from __future__ import annotations

import difflib
import re

from vl3train.config.choices import AdapterInit, AdapterKind, Base4Bit
from vl3train.config.problems import Problem, show
from vl3train.config.schema import PARTS, TrainConfig

LINEAR_LAYERS = {
    "language_model": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "vision_encoder": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
}
"""Parts that can have adapters, and the linear layers of each of their layers."""


def adapter_problems(cfg: TrainConfig) -> list[Problem]:
    """Everything about ``adapter`` that cannot run. What needs the model itself is checked in model/adapters.py."""
    if cfg.adapter.kind is AdapterKind.none:
        return []
    return [*_part_problems(cfg), *_name_problems(cfg), *_full_problems(cfg), *_kind_problems(cfg)]


def _part_problems(cfg: TrainConfig) -> list[Problem]:
    """Parts that cannot have adapters, or ranks of parts that have none."""
    adapter, found = cfg.adapter, []
    known = ", ".join(LINEAR_LAYERS)
    for option in ("parts", "base_4bit_parts"):
        named: list[str] = getattr(adapter, option)
        if not named:
            way_out = f"name one of {known}, or leave it out"
            found.append(Problem(f"adapter.{option}", "[]", "names no part", way_out))
        for part in named:
            if part not in LINEAR_LAYERS:
                what = "cannot have adapters" if option == "parts" else "cannot be held in 4 bits"
                way_out = f"name {known}" + (
                    "; adapter.modules_to_save=[projector] trains it in full" if part == "projector" else ""
                )
                found.append(Problem(f"adapter.{option}", part, f"this part {what}", way_out))
    for option in ("part_ranks", "part_alphas"):
        for part, value in getattr(adapter, option).items():
            key = f"adapter.{option}.{part}"
            if part not in adapter.parts:
                way_out = f"adapter.parts has {', '.join(adapter.parts)}"
                found.append(Problem(key, value, "this part gets no adapters", way_out))
            elif value <= 0:
                found.append(Problem(key, value, "must be more than 0", f"set {key} to 1 or more"))
    for part in adapter.parts:
        if adapter.learning_rate is None and part in LINEAR_LAYERS and part not in cfg.stage.learning_rates:
            what = f"null, and stage {cfg.stage.number} gives {part} no rate that its adapters could use"
            found.append(Problem("adapter.learning_rate", None, what, "leave it out: 1e-4 is the default"))
    return found


def _name_problems(cfg: TrainConfig) -> list[Problem]:
    """Plain names of linear layers that none of the parts has. Patterns are matched with the model."""
    names = sorted({name for part in cfg.adapter.parts for name in LINEAR_LAYERS.get(part, ())})
    found = []
    if cfg.adapter.target_modules == []:
        way_out = f"name some of {', '.join(names)}, or leave it out for all of them"
        found.append(Problem("adapter.target_modules", "[]", "names no layer", way_out))
    for name in cfg.adapter.target_modules or []:
        try:
            re.compile(name)
        except re.error as error:
            found.append(Problem("adapter.target_modules", name, f"is no regular expression: {error}", ""))
            continue
        if name.isidentifier() and name not in names:
            likely = difflib.get_close_matches(name, names, n=1)
            way_out = f"did you mean {likely[0]}? " if likely else ""
            what = f"no linear layer of {', '.join(cfg.adapter.parts)} has this name"
            found.append(
                Problem("adapter.target_modules", name, what, f"{way_out}they are {', '.join(names)}")
            )
    return found


def _full_problems(cfg: TrainConfig) -> list[Problem]:
    """What shall train in full beside adapters, and cannot."""
    adapter, found = cfg.adapter, []
    for name in adapter.modules_to_save:
        if name in adapter.parts or name == "language_model":
            what = "has adapters" if name in adapter.parts else "peft would keep a second copy of all of it"
            way_out = "name modules of it, as lm_head, or train without adapters (adapter=none)"
            found.append(Problem("adapter.modules_to_save", name, what, way_out))
    if "language_model" in cfg.stage.learning_rates and "language_model" not in adapter.parts:
        what = "the language model cannot be trained in full while another part has adapters"
        way_out = "add language_model, or freeze it with ~stage.learning_rates.language_model"
        found.append(Problem("adapter.parts", show(adapter.parts), what, way_out))
    return found


def _kind_problems(cfg: TrainConfig) -> list[Problem]:
    """Kinds of adapters and of base weights that the machine cannot run, or that exclude each other."""
    adapter, machine, found = cfg.adapter, cfg.machine, []
    pissa = adapter.init in (AdapterInit.pissa, AdapterInit.pissa_niter_16)
    if machine.compile_layers and adapter.dropout > 0:
        what = "torch 2.11 cannot compile dropout in recomputed layers (seen with the 7B on an H100)"
        way_out = "set adapter.dropout=0, or machine.compile_layers=false"
        found.append(Problem("machine.compile_layers", True, what, way_out))
    if pissa and adapter.use_dora:
        what = "PiSSA changes the weights whose magnitudes DoRA takes"
        found.append(Problem("adapter.init", show(adapter.init), what, "set adapter.use_dora=false"))
    if machine.zero_stage == 3 and (pissa or adapter.use_dora):
        key, value = ("adapter.init", show(adapter.init)) if pissa else ("adapter.use_dora", True)
        what = "needs whole weights, and ZeRO-3 partitions them"
        found.append(Problem(key, value, what, "use machine.zero_stage=1 or 2"))
    if adapter.base_4bit is Base4Bit.none:
        return found
    shown = show(adapter.base_4bit)
    if machine.zero_stage == 3:
        what = "ZeRO-3 partitions and gathers weights in the format that the model computes with"
        way_out = (
            "use machine.zero_stage=1 or 2: 4-bit weights are a quarter of those that ZeRO-3 would share"
        )
        found.append(Problem("adapter.base_4bit", shown, what, way_out))
    if adapter.use_dora:
        what = "DoRA needs the norms of whole weights in each pass"
        found.append(Problem("adapter.base_4bit", shown, what, "set adapter.use_dora=false"))
    full = {*adapter.modules_to_save, *cfg.stage.learning_rates} & set(PARTS) - set(adapter.parts)
    if both := sorted(full & set(adapter.base_4bit_parts)):
        what = f"{', '.join(both)} trains in full, and 4-bit weights are frozen"
        way_out = "leave it out of adapter.base_4bit_parts, or out of what trains"
        found.append(Problem("adapter.base_4bit_parts", show(adapter.base_4bit_parts), what, way_out))
    return found
