"""Number formats, memory options and kernels that cannot go together."""

from __future__ import annotations

from vl3train.config.choices import (
    Attention,
    Device,
    Dtype,
    GemmBackend,
    MasterDtype,
    Memory,
    Recompute,
)
from vl3train.config.problems import Problem, show
from vl3train.config.schema import TrainConfig


def machine_problems(cfg: TrainConfig) -> list[Problem]:
    """Every combination of ``machine`` and ``optim`` that cannot run."""
    return [
        *_precision_problems(cfg),
        *_offload_problems(cfg),
        *_recompute_problems(cfg),
        *_gemm_problems(cfg),
        *_attention_problems(cfg),
    ]


def _precision_problems(cfg: TrainConfig) -> list[Problem]:
    """Number formats of weights, masters and optimizer states."""
    machine, optim = cfg.machine, cfg.optim
    found = []
    if machine.zero_stage == 0 and machine.dtype is Dtype.bfloat16:
        # deepspeed 0.19.8 steps the optimizer once while it is built: Adam counts one step too many
        what = "DeepSpeed counts Adam's steps wrongly with machine.dtype=bfloat16"
        way_out = "use machine.zero_stage=1 or machine.dtype=float32"
        found.append(Problem("machine.zero_stage", 0, what, way_out))
    if machine.zero_stage == 0 and optim.state_dtype is Dtype.bfloat16:
        what = (
            "each rank would round the optimizer state differently, and the weights of the ranks would differ"
        )
        way_out = "use machine.zero_stage=1, 2 or 3, or optim.state_dtype=float32"
        found.append(Problem("optim.state_dtype", show(optim.state_dtype), what, way_out))
    if optim.master_dtype is MasterDtype.bfloat16:
        needed = {
            "machine.dtype=bfloat16": machine.dtype is Dtype.bfloat16,
            "machine.zero_stage=1": machine.zero_stage == 1,
            "optim.state_dtype=bfloat16": optim.state_dtype is Dtype.bfloat16,
        }
        if lacking := [words for words, is_so in needed.items() if not is_so]:
            what = f"training without masters needs {', '.join(needed)}"
            way_out = f"set {' and '.join(lacking)}, or optim.master_dtype=float32"
            found.append(Problem("optim.master_dtype", show(optim.master_dtype), what, way_out))
    if optim.master_dtype is MasterDtype.split and not machine.offload_optimizer:
        what = "split masters need the optimizer state in the host's memory"
        way_out = "set machine.offload_optimizer=true, or optim.master_dtype=float32"
        found.append(Problem("optim.master_dtype", show(optim.master_dtype), what, way_out))
    return found


def _offload_problems(cfg: TrainConfig) -> list[Problem]:
    """What machine.offload_optimizer needs."""
    machine = cfg.machine
    if not machine.offload_optimizer:
        return []
    needed = {
        "machine.dtype=bfloat16": machine.dtype is Dtype.bfloat16,
        "machine.zero_stage=1": machine.zero_stage == 1,
        "optim.state_dtype=float32": cfg.optim.state_dtype is Dtype.float32,
    }
    lacking = [words for words, is_so in needed.items() if not is_so]
    if not lacking:
        return []
    what = f"optimizer state in the host's memory needs {', '.join(needed)}"
    way_out = f"set {' and '.join(lacking)}, or machine.offload_optimizer=false"
    return [Problem("machine.offload_optimizer", True, what, way_out)]


def _recompute_problems(cfg: TrainConfig) -> list[Problem]:
    """Recomputation that the machine or ZeRO-3 does not allow."""
    machine = cfg.machine
    found = []
    for key in ("recompute_vision", "recompute_language"):
        level = getattr(machine, key)
        in_part = level in (Recompute.elementwise, Recompute.mlp)
        given = machine.memory is Memory.given and not machine.compile_layers
        if machine.zero_stage == 3 and given and in_part:
            what = "with ZeRO-3 a part of a layer that is not compiled cannot be recomputed"
            way_out = "use layer or nothing, or machine.compile_layers=true"
            found.append(Problem(f"machine.{key}", show(level), what, way_out))
    if machine.memory is Memory.auto and machine.device is Device.cpu:
        what = "auto measures a GPU, and machine.device=cpu"
        found.append(Problem("machine.memory", show(machine.memory), what, "use given"))
    return found


def _gemm_problems(cfg: TrainConfig) -> list[Problem]:
    """What machine.gemm_backend=quack needs."""
    machine = cfg.machine
    if machine.gemm_backend is not GemmBackend.quack:
        return []
    found: list[tuple[str, str]] = []
    if not machine.compile_layers:
        way_out = "set machine.compile_layers=true, or use machine.gemm_backend=auto"
        found.append(("works in compiled layers only", way_out))
    if machine.device is Device.cpu:
        found.append(("needs a GPU, and machine.device=cpu", "use auto"))
    if machine.dtype is Dtype.float32:
        found.append(("computes in 16 bits only, and machine.dtype=float32", "use auto"))
    shown = show(machine.gemm_backend)
    return [Problem("machine.gemm_backend", shown, what, way_out) for what, way_out in found]


def _attention_problems(cfg: TrainConfig) -> list[Problem]:
    """What attention kernels of GPUs need."""
    machine = cfg.machine
    if machine.attention not in (Attention.flash_attn_4, Attention.flash_attn, Attention.torch_varlen):
        return []
    found = []
    shown = show(machine.attention)
    if machine.device is Device.cpu:
        what = "needs a GPU, and machine.device=cpu"
        found.append(Problem("machine.attention", shown, what, "use auto or reference"))
    if machine.dtype is Dtype.float32:
        what = "computes in 16 bits only, and machine.dtype=float32"
        way_out = "use machine.attention=reference or machine.dtype=bfloat16"
        found.append(Problem("machine.attention", shown, what, way_out))
    return found
