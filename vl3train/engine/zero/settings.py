"""The settings that DeepSpeed gets."""

from __future__ import annotations

from typing import Any

from vl3train.config.choices import Dtype
from vl3train.config.optim_options import OptimConfig
from vl3train.config.schema import MachineConfig


def deepspeed_config(
    machine: MachineConfig, optim: OptimConfig, num_micro_batches: int, dp_size: int
) -> dict[str, Any]:
    """The DeepSpeed settings of a run. One micro-batch is one pack, so its batch size is 1."""
    bf16 = machine.dtype is Dtype.bfloat16
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": num_micro_batches,
        "train_batch_size": num_micro_batches * dp_size,
        "gradient_clipping": optim.max_grad_norm,
        "zero_optimization": {"stage": machine.zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        # With it DeepSpeed would wait for the device, and for every copy in progress, in each micro-batch. We measure
        # throughput ourselves (engine/monitor/meter.py).
        "timers": {"throughput": {"enabled": False}},
    }
    if bf16 and machine.zero_stage in (1, 2):
        # Sums over micro-batches in bfloat16 would depend on how the tokens fall into micro-batches.
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config
