"""Options of the section ``optim``: AdamW and the steps it does."""

from __future__ import annotations

from dataclasses import dataclass

from vl3train.config.choices import Dtype, MasterDtype, Schedule


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW, its schedule, clipping, and steps that it leaves out."""

    learning_rate: float | None = None
    """Peak learning rate of all that trains, parts and adapters, in place of the rates of stage, model and adapter.
    What is written closer wins: a part's own rate (stage.learning_rates.projector) over this one in the same file or
    command line, and the command line over a file. Unset: those rates."""

    weight_decay: float = 0.0
    """Decoupled weight decay; not applied to biases and norms."""

    beta1: float = 0.9
    """Decay of AdamW's first moment (of gradients)."""

    beta2: float = 0.999
    """Decay of AdamW's second moment (of squared gradients)."""

    eps: float = 1e-8
    """AdamW's epsilon."""

    state_dtype: Dtype = Dtype.float32
    """Format of AdamW's two moments. float32 takes 8 bytes for each trained parameter; bfloat16 takes 4, with
    stochastic rounding so that small changes are not lost (needs zero_stage 1 or more)."""

    master_dtype: MasterDtype = MasterDtype.float32
    """Master copy of trained bfloat16 weights. float32: 4 bytes for each weight. split: the same values in 2 bytes,
    the 16 bits that the weight lacks (needs machine.offload_optimizer=true). bfloat16: no masters, the weights
    themselves are rounded stochastically (needs zero_stage=1 and state_dtype=bfloat16)."""

    schedule: Schedule = Schedule.cosine
    """cosine falls to min_lr_fraction at the last step; constant keeps the peak."""

    warmup_fraction: float = 0.03
    """Share of the steps in which the learning rates rise linearly."""

    min_lr_fraction: float = 0.0
    """Learning rate at the end of the cosine, as a share of the peak."""

    max_grad_norm: float = 1.0
    """Gradients of the whole model are scaled down to at most this L2 norm. 0: no clipping."""

    spike_limit: float = 20.0
    """A step whose loss or gradient norm is this many deviations above the median of the last 64 steps is skipped: it
    changes nothing. A step that is not finite always is (docs/bad_numbers.md). 0: no limit."""

    max_skipped_steps: int = 8
    """After this many skipped steps in a row the run goes back to a checkpoint, and passes over them and as many steps
    before them. A second time at the same place it ends."""
