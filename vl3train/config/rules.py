"""Rules that span several options, and what follows from them. Changes no config, imports no torch."""

from __future__ import annotations

import netrc
import os
from pathlib import Path

from vl3train.config.choices import (
    AdapterKind,
    Attention,
    Device,
    Dtype,
    GemmBackend,
    MasterDtype,
    Memory,
    Recompute,
    Tracker,
    WandbMode,
)
from vl3train.config.problems import Problem, show
from vl3train.config.ranges import range_problems
from vl3train.config.schema import PARTS, TrainConfig
from vl3train.config.start import start_problems

ADAPTER_PARTS = ("language_model", "vision_encoder")


def problems(cfg: TrainConfig) -> list[Problem]:
    """Everything that keeps this config from being run, at once. Empty when the run may start.

    The recipe is not looked into: its problems come from vl3train.data.recipe.
    """
    found = range_problems(cfg)
    if {problem.key for problem in found} & {"stage.number", "machine.dp_size", "step.global_packs"}:
        return found  # the rules below divide by these and choose by the stage
    return [
        *found,
        *rate_problems(cfg),
        *cost_problems(cfg),
        *start_problems(cfg),
        *budget_problems(cfg),
        *machine_problems(cfg),
        *adapter_problems(cfg),
        *folder_problems(cfg),
        *tracking_problems(cfg),
    ]


def effective_learning_rates(cfg: TrainConfig) -> dict[str, float]:
    """Peak learning rate of each part the stage trains, the model's own rates in place of the stage's.

    Parts come in the order of schema.PARTS; one that is not in it is frozen.
    """
    rates = cfg.stage.learning_rates
    return {part: cfg.model.learning_rates.get(part, rates[part]) for part in PARTS if part in rates}


def adapter_rates(cfg: TrainConfig) -> dict[str, float]:
    """Peak learning rate of the adapters on each part that has them; their full weights are frozen."""
    if cfg.adapter.kind is AdapterKind.none:
        return {}
    own, rates = cfg.adapter.learning_rate, effective_learning_rates(cfg)
    return {part: rates[part] if own is None else own for part in cfg.adapter.parts}


def full_rates(cfg: TrainConfig) -> dict[str, float]:
    """Peak learning rate of each part whose full weights are trained."""
    with_adapters = adapter_rates(cfg)
    return {part: rate for part, rate in effective_learning_rates(cfg).items() if part not in with_adapters}


def rate_problems(cfg: TrainConfig) -> list[Problem]:
    """Parts that do not exist and rates that train nothing."""
    found = []
    if not cfg.stage.learning_rates and cfg.adapter.kind is AdapterKind.none:
        way_out = f"name parts with a rate each: {', '.join(PARTS)}"
        found.append(Problem("stage.learning_rates", "{}", "nothing would be trained", way_out))
    for owner in ("stage", "model"):
        for part, rate in getattr(cfg, owner).learning_rates.items():
            key = f"{owner}.learning_rates.{part}"
            if part not in PARTS:
                found.append(
                    Problem(key, rate, "the model has no such part", f"parts are {', '.join(PARTS)}")
                )
            elif not 0 < rate < 1:
                way_out = (
                    "a part is frozen by not naming it" if rate == 0 else "published rates are 2e-6 to 1e-3"
                )
                found.append(Problem(key, rate, "a learning rate must be between 0 and 1", way_out))
    return found


def cost_problems(cfg: TrainConfig) -> list[Problem]:
    """Costs that the planner cannot weigh."""
    names = ("token", "token_pair", "patch", "patch_pair")
    found = []
    if set(cfg.model.costs) != set(names):
        way_out = f"give {', '.join(names)}"
        found.append(Problem("model.costs", cfg.model.costs, "these are not the four costs", way_out))
    found += [
        Problem(
            f"model.costs.{name}", value, "must be 0 or more", "leave model.costs out: the model has its own"
        )
        for name, value in cfg.model.costs.items()
        if value < 0
    ]
    return found


def budget_problems(cfg: TrainConfig) -> list[Problem]:
    """Budgets that no sample, or no set of ranks, could keep."""
    data, step, stage = cfg.data, cfg.step, cfg.stage
    found = []
    if step.global_packs % cfg.machine.dp_size:
        below = step.global_packs // cfg.machine.dp_size * cfg.machine.dp_size
        near = [str(packs) for packs in (below, below + cfg.machine.dp_size) if packs]
        what = f"does not divide over machine.dp_size={cfg.machine.dp_size} ranks"
        found.append(Problem("step.global_packs", step.global_packs, what, f"take {' or '.join(near)}"))
    if data.max_visual_tokens >= step.max_tokens:
        what = f"leaves no room for text in a pack of step.max_tokens={step.max_tokens}"
        way_out = f"raise step.max_tokens, or lower this to about {step.max_tokens * 5 // 8}"
        found.append(Problem("data.max_visual_tokens", data.max_visual_tokens, what, way_out))
    merge = max(stage.image_merge_size, stage.video_merge_size)
    patches = data.max_visual_tokens * merge**2
    if patches > step.max_patches:
        what = (
            f"a sample of data.max_visual_tokens={data.max_visual_tokens} at merge size {merge} has "
            f"{patches} patches"
        )
        way_out = f"set it to {patches} or more, or lower data.max_visual_tokens"
        found.append(Problem("step.max_patches", step.max_patches, what, way_out))
    if data.max_frames > data.max_visual_tokens:
        what = f"more frames than data.max_visual_tokens={data.max_visual_tokens}, and each has one at least"
        found.append(Problem("data.max_frames", data.max_frames, what, "lower it"))
    pairs = (
        ("min_frames", "max_frames"),
        ("image_min_pixels", "image_max_pixels"),
        ("video_min_pixels", "video_max_pixels"),
    )
    for low, high in pairs:
        if getattr(data, low) > getattr(data, high):
            what = f"is more than data.{high}={getattr(data, high)}"
            found.append(Problem(f"data.{low}", getattr(data, low), what, "swap or change one of them"))
    return found


def machine_problems(cfg: TrainConfig) -> list[Problem]:
    """Number formats and kernels that cannot go together."""
    machine = cfg.machine
    found = []
    if machine.zero_stage == 0 and machine.dtype is Dtype.bfloat16:
        # deepspeed 0.19.8 steps the optimizer once while it is built: Adam counts one step too many
        what = "DeepSpeed counts Adam's steps wrongly with machine.dtype=bfloat16"
        found.append(
            Problem("machine.zero_stage", 0, what, "use machine.zero_stage=1 or machine.dtype=float32")
        )
    if machine.zero_stage == 0 and cfg.optim.state_dtype is Dtype.bfloat16:
        what = "each rank would round the same states another way, and the ranks' weights would part"
        way_out = "use machine.zero_stage=1, 2 or 3, or float32"
        found.append(Problem("optim.state_dtype", show(cfg.optim.state_dtype), what, way_out))
    if cfg.optim.master_dtype is MasterDtype.bfloat16:
        needed = {
            "machine.dtype=bfloat16": machine.dtype is Dtype.bfloat16,
            "machine.zero_stage=1": machine.zero_stage == 1,
            "optim.state_dtype=bfloat16": cfg.optim.state_dtype is Dtype.bfloat16,
        }
        if lacking := [words for words, is_so in needed.items() if not is_so]:
            what, way_out = (
                "weights without masters are updated by one way only",
                f"set {' and '.join(lacking)}",
            )
            found.append(Problem("optim.master_dtype", show(cfg.optim.master_dtype), what, way_out))
    if cfg.optim.master_dtype is MasterDtype.split and not machine.offload_optimizer:
        what = "masters are put together piece by piece, where states wait on the host and nowhere else"
        way_out = "set machine.offload_optimizer=true, or this to float32"
        found.append(Problem("optim.master_dtype", show(cfg.optim.master_dtype), what, way_out))
    if machine.offload_optimizer:
        needed = {
            "machine.dtype=bfloat16": machine.dtype is Dtype.bfloat16,
            "machine.zero_stage=1": machine.zero_stage == 1,
            "optim.state_dtype=float32": cfg.optim.state_dtype is Dtype.float32,
        }
        if lacking := [words for words, is_so in needed.items() if not is_so]:
            what = "states wait on the host under float32 masters that ZeRO-1 has cut, and nowhere else"
            way_out = f"set {' and '.join(lacking)}, or this to false"
            found.append(Problem("machine.offload_optimizer", True, what, way_out))
    for key in ("recompute_vision", "recompute_language"):
        level = getattr(machine, key)
        in_part = level in (Recompute.elementwise, Recompute.mlp)
        if machine.zero_stage == 3 and machine.memory is Memory.given and in_part:
            what = "ZeRO-3's linear layers cannot be computed again in part"
            found.append(Problem(f"machine.{key}", show(level), what, "use layer or nothing"))
    if machine.memory is Memory.auto and machine.device is Device.cpu:
        what = "measures a GPU, and machine.device=cpu"
        found.append(Problem("machine.memory", show(machine.memory), what, "use given"))
    if machine.compile_layers and machine.zero_stage == 3:
        what = "the hooks with which ZeRO-3 fetches weights cannot be compiled"
        found.append(
            Problem("machine.compile_layers", True, what, "set it to false, or use machine.zero_stage=1 or 2")
        )
    if machine.gemm_backend is GemmBackend.quack and not machine.compile_layers:
        what = "serves compiled layers only"
        way_out = "set machine.compile_layers=true, or use machine.gemm_backend=auto"
        found.append(Problem("machine.gemm_backend", show(machine.gemm_backend), what, way_out))
    if machine.gemm_backend is GemmBackend.quack and machine.device is Device.cpu:
        what = "needs a GPU, and machine.device=cpu"
        found.append(Problem("machine.gemm_backend", show(machine.gemm_backend), what, "use auto"))
    if machine.gemm_backend is GemmBackend.quack and machine.dtype is Dtype.float32:
        what = "computes in 16 bits only, and machine.dtype=float32"
        found.append(Problem("machine.gemm_backend", show(machine.gemm_backend), what, "use auto"))
    if machine.attention in (Attention.flash_attn_4, Attention.flash_attn, Attention.torch_varlen):
        if machine.device is Device.cpu:
            what = "needs a GPU, and machine.device=cpu"
            found.append(Problem("machine.attention", show(machine.attention), what, "use auto or reference"))
        if machine.dtype is Dtype.float32:
            what = "computes in 16 bits only, and machine.dtype=float32"
            way_out = "use machine.attention=reference or machine.dtype=bfloat16"
            found.append(Problem("machine.attention", show(machine.attention), what, way_out))
    return found


def adapter_problems(cfg: TrainConfig) -> list[Problem]:
    """Adapters on parts that cannot have them, or without a rate."""
    if cfg.adapter.kind is AdapterKind.none:
        return []
    found = []
    if not cfg.adapter.parts:
        way_out = f"name one of {', '.join(ADAPTER_PARTS)}, or set adapter=none"
        found.append(Problem("adapter.parts", "[]", "no part gets an adapter", way_out))
    if "language_model" in cfg.stage.learning_rates and "language_model" not in cfg.adapter.parts:
        # peft would keep a second copy of the whole language model
        what = "the language model cannot train in full beside adapters on another part"
        way_out = "add language_model, or freeze it with ~stage.learning_rates.language_model"
        found.append(Problem("adapter.parts", show(cfg.adapter.parts), what, way_out))
    if cfg.machine.compile_layers and cfg.adapter.dropout > 0:
        what = "torch 2.11 fails to compile dropout in layers that are computed again (7B on an H100)"
        way_out = "set adapter.dropout=0, or this to false"
        found.append(Problem("machine.compile_layers", True, what, way_out))
    for part in cfg.adapter.parts:
        if part not in ADAPTER_PARTS:
            way_out = f"they can sit on {', '.join(ADAPTER_PARTS)}; the projector is trained in full"
            found.append(Problem("adapter.parts", part, "adapters cannot sit on this part", way_out))
        elif cfg.adapter.learning_rate is None and part not in cfg.stage.learning_rates:
            what = f"unset, and stage {cfg.stage.number} gives {part} no rate that its adapters could take"
            found.append(Problem("adapter.learning_rate", None, what, "set it; 1e-4 is a common choice"))
    return found


def folder_problems(cfg: TrainConfig) -> list[Problem]:
    """Folders that are missing, or already hold something else."""
    found = []
    if not Path(cfg.data.root).expanduser().is_dir():
        way_out = "set it to the folder your shards are in"
        if (cfg.data.recipe or "").startswith("demo_"):
            way_out = f"make it with `vl3train demo {cfg.data.root}`"
        found.append(Problem("data.root", cfg.data.root, "no such folder", way_out))
    output = Path(cfg.run.output_dir).expanduser()
    if output.exists() and not output.is_dir():
        found.append(Problem("run.output_dir", output, "is a file", "name a folder"))
    return found


def tracking_problems(cfg: TrainConfig) -> list[Problem]:
    """W&B that is told to be online and cannot be."""
    if cfg.tracking.kind is Tracker.none or cfg.tracking.mode is not WandbMode.online or wandb_key_is_set():
        return []
    way_out = "run `wandb login`, set WANDB_API_KEY, or use tracking.mode=offline and `wandb sync` later"
    return [Problem("tracking.mode", "online", "no W&B key is set", way_out)]


def wandb_key_is_set() -> bool:
    """Whether W&B would find a key: in the environment, or where ``wandb login`` leaves it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    if not file.is_file():
        return False
    host = (
        os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0].split(":")[0]
    )
    return host in netrc.netrc(file).hosts
