"""Load a checkpoint of another layout into a running engine. Each rank reads the ranges that it will hold.

This rank's buffers are filled with the values that it would have saved, had the run always had its layout. DeepSpeed
then loads them as it loads its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vl3train.engine.zero.engine import Zero
from vl3train.engine.zero.reshard.buffers import own_buffers, problems
from vl3train.engine.zero.reshard.layouts import Groups, Layout
from vl3train.engine.zero.reshard.shards import (
    BASE_OPTIMIZER,
    MASTER,
    MASTERS,
    MASTERS_OF_STAGE_3,
    OPTIMIZER,
    STEP,
    Shards,
)


def load_other_layout(engine: Zero, folder: Path, saved: Layout) -> None:
    """Load what an engine of another layout saved in ``folder``. All ranks call it.

    Raises RunError on every rank, with every reason, where the state cannot be divided anew; nothing has changed then.
    """
    layout = Layout(dp_size=engine.rank.dp_size, zero_stage=engine.zero_stage)
    groups = groups_of(engine)
    shards = Shards(folder / "state", saved, groups)
    found = problems(shards, layout, groups)
    engine.rank.agree("\n".join(found) if found else None)
    buffers = own_buffers(shards, layout, groups, engine.rank.index)
    if layout.zero_stage == 3:
        engine.optimizer.checkpoint_event_prologue()
    _load_weights(engine, shards)
    _load_optimizer(engine, buffers, version=shards.model_states(0)["ds_version"])
    if layout.zero_stage == 3:
        engine.optimizer.checkpoint_event_epilogue()
    counters = shards.model_states(0)
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine.engine, name, counters[name])


def groups_of(engine: Zero) -> Groups:
    """The engine's groups of trained parameters, in the order of its buffers; in stage 3 its sub-groups."""
    if engine.zero_stage:
        shapes = engine.engine._get_zero_param_shapes()
        return [{name: shape.numel() for name, shape in group.items()} for group in shapes]
    names = engine.engine.param_names
    return [
        {names[parameter]: parameter.numel() for parameter in group["params"]}
        for group in engine.optimizer.param_groups
    ]


@torch.no_grad()
def _load_weights(engine: Zero, shards: Shards) -> None:
    """The model's weights; in stage 3 those that are frozen, because the optimizer has the others."""
    module: nn.Module = engine.engine.module
    for name, parameter in module.named_parameters():
        if engine.zero_stage == 3 and parameter.requires_grad:
            continue
        if not (engine.save_frozen or parameter.requires_grad):
            continue
        whole = shards.weight(name)
        assert whole is not None, f"{shards.folder} has no {name}"
        if engine.zero_stage == 3:
            part: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
            first = engine.rank.index * part.numel()
            values = whole[first : first + part.numel()]
            part.data[: len(values)] = values.to(part.device, part.dtype)
        else:
            parameter.copy_(whole.view(parameter.shape))
    for name, buffer in module.named_buffers():
        if (saved := shards.weight(name)) is not None:
            buffer.copy_(saved.view(buffer.shape))


def _load_optimizer(engine: Zero, buffers: list[dict[str, Any]], *, version: str) -> None:
    """Masters, moments and counts; the options of each group stay those of this run. ``version`` of DeepSpeed."""
    zero, base = engine.optimizer, getattr(engine.optimizer, "optimizer", engine.optimizer)
    masters = [buffer.pop(MASTER) for buffer in buffers]
    if engine.offload_schedule is None:
        base.state.clear()  # else the device would hold them twice
    if engine.zero_stage == 3:
        zero._set_fp32_optimizer_param_groups()
    options = base.state_dict()["param_groups"]
    if engine.zero_stage == 3:
        zero._clear_fp32_optimizer_param_groups()
    numbers = [number for group in options for number in group["params"]]
    state = {
        "state": {number: buffer for number, buffer in zip(numbers, buffers, strict=True) if buffer},
        "param_groups": options,
    }
    if engine.zero_stage == 0:
        parameters = [parameter for group in base.param_groups for parameter in group["params"]]
        for buffer, parameter in zip(buffers, parameters, strict=True):
            buffer.update(
                {name: value.view(parameter.shape) for name, value in buffer.items() if name != STEP}
            )
        base.load_state_dict(state)
        return
    if engine.zero_stage == 3:
        own = {
            OPTIMIZER: state,
            MASTERS_OF_STAGE_3: masters,
            "loss_scaler": zero.loss_scaler,
            "dynamic_loss_scale": zero.dynamic_loss_scale,
            "overflow": False,
        }
    else:
        own = {BASE_OPTIMIZER: state, MASTERS: masters, "ds_version": version}
    zero.load_state_dict([own] * engine.rank.dp_size, load_optimizer_states=True, load_from_fp32_weights=True)
