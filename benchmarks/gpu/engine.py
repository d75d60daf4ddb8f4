"""The project's own step, under the engine that users run and under a loop of plain PyTorch."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.data.packs import draw_packs, pack_batch
from benchmarks.gpu.model import mix_of
from benchmarks.gpu.rows import Row
from vl3train.config.choices import Device, Dtype, MasterDtype, Recompute
from vl3train.config.optim_options import OptimConfig
from vl3train.config.schema import PARTS, MachineConfig
from vl3train.contracts.records import Batch, RenderedSample
from vl3train.engine.memory.device import device_memory
from vl3train.engine.memory.fit import fit_memory, row_bytes
from vl3train.engine.memory.warmup import LAYERS_WARMED_UP, num_sizes, plans_to_warm_up, warm_up
from vl3train.engine.optim.build import build_optimizer
from vl3train.engine.ranks import Rank, join
from vl3train.engine.step import train_step
from vl3train.engine.zero.engine import Zero
from vl3train.engine.zero.gradient_sums import add_gradients, put_gradients
from vl3train.engine.zero.transfer import Reading, Transfer
from vl3train.model.activations.work import RecomputePlan, uniform_plan
from vl3train.model.attention.backends import choose_attention
from vl3train.model.attention.check import right_attention
from vl3train.model.kernels.check import choose_gemm_backend
from vl3train.model.packed_forward import PackedModel, head_dims
from vl3train.model.trainable import count_parameters, parameter_groups

RATE = 1e-6
say = functools.partial(print, flush=True)
Step = Callable[[list[Any], int], float]
"""(what one step is made of, supervised tokens of all ranks) -> loss."""


def own_step(
    row: Row, hf_model: Any, device: torch.device, batches: list[Batch]
) -> tuple[Step, dict[str, str]]:
    """One step through vl3train's train_step, on batches, and whose kernels make attention and products.

    ``batches`` are all that will come, of all ranks.
    """
    own = own_engine(row, hf_model, device)
    if row.zero_stage < 3:
        started = time.perf_counter()
        levels = Recompute(row.recompute_vision), Recompute(row.recompute_language)
        given = uniform_plan(*levels, LAYERS_WARMED_UP)
        plans = plans_to_warm_up(own.packed) if row.memory == "auto" else [given]
        warm_up(own.engine, other_batches(row), plans)
        say(f"warmed_up in {time.perf_counter() - started:.1f} s")
    if row.memory == "auto" and device.type == "cuda":
        own.fit(batches)
    return own.step, own.kernels


class OwnEngine(NamedTuple):
    """The project's engine over a row's model, and whose kernels make attention and products."""

    engine: Any
    packed: PackedModel
    device: torch.device
    kernels: dict[str, str]

    def fit(self, batches: list[Batch]) -> None:
        """Choose what the layers keep for the largest of ``batches``, which are all that will come, of all ranks."""
        widths = row_bytes(self.packed)
        worst = max(
            batches,
            key=lambda batch: (
                len(batch.pixel_values) * sum(widths.vision) + batch.num_planned_tokens * sum(widths.language)
            ),
        )
        memory = device_memory(self.device)
        fitted = fit_memory(self.engine, self.packed, worst, memory, pack_name="the worst pack", say=say)
        peak, limit = fitted.peak_bytes / 2**30, fitted.limit_bytes / 2**30
        print(f"memory: {peak:.1f} of {limit:.1f} GiB: {fitted.plan}", flush=True)

    def step(self, batches: list[Any], num_supervised: int) -> float:
        """One step; ``num_supervised`` tokens of all ranks."""
        return train_step(
            self.engine, batches, num_supervised_tokens=num_supervised, num_sources=1, stop_requested=False
        ).loss


def own_engine(row: Row, hf_model: Any, device: torch.device, *, shares_prefix: bool = False) -> OwnEngine:
    """The engine of a row, not warmed up. With ``shares_prefix`` kernels are checked against float64, as a run's are.

    Raises ValueError where none that serves is right.
    """
    machine = MachineConfig(
        dtype=Dtype.bfloat16,
        zero_stage=row.zero_stage,
        device=Device(device.type),
        offload_optimizer=row.offload_optimizer,
    )
    if shares_prefix:
        shapes = hf_model.config, device, head_dims(hf_model), torch.bfloat16
        attention = right_attention(row.attention, *shapes, shares_prefix=True)
    else:
        attention = choose_attention(row.attention, device, head_dims(hf_model), torch.bfloat16)
    gemm_backend = choose_gemm_backend(
        row.gemm_backend, hf_model.config, device, torch.bfloat16, compiled=row.compile_layers
    )
    print(f"attention: {attention.name} ({attention.reason})", flush=True)
    print(f"gemm_backend: {gemm_backend.name} ({gemm_backend.reason})", flush=True)
    packed = PackedModel(
        hf_model,
        attention.name,
        recompute_vision=Recompute(row.recompute_vision),
        recompute_language=Recompute(row.recompute_language),
        compile_layers=row.compile_layers,
        gemm_backend=gemm_backend.name,
    )
    trained = {part: RATE for part in PARTS if count_parameters(hf_model)[part][0]}
    groups = parameter_groups(hf_model, trained, 0.0)
    optim = OptimConfig(state_dtype=Dtype(row.state_dtype), master_dtype=MasterDtype(row.master_dtype))
    rank = join(machine)
    if row.way == "plain_loop":
        engine: Any = PlainEngine(packed, groups, optim, rank)
    else:
        engine = Zero(
            packed,
            build_optimizer(groups, optim, device, offload_optimizer=machine.offload_optimizer),
            machine=machine,
            optim=optim,
            num_micro_batches=row.packs_a_step,
            rank=rank,
            save_frozen=not row.lora,
        )
    engine.train(True)
    return OwnEngine(engine, packed, device, {"attention": attention.name, "gemm_backend": gemm_backend.name})


def other_batches(row: Row) -> Iterator[Batch]:
    """What ``vl3train train`` would warm_up on a GPU: packs of the sizes that the row has, in no step of it."""
    count = num_sizes(row.max_tokens) if torch.cuda.is_available() else 2  # a CPU has no kernels to load
    return map(pack_batch, other_packs(row, count))


def other_packs(row: Row, count: int) -> list[list[RenderedSample]]:
    """Packs of the row's mix that none of its steps has, those with most patches first."""
    mix = replace(mix_of(row.model), blank=True)
    packs = draw_packs(
        count,
        max_tokens=row.max_tokens,
        image_merge_size=row.image_merge_size,
        seed=1,
        mix=mix,
        fill=row.fill,
    )
    return sorted(packs, key=lambda pack: -sum(len(sample.patches) for sample in pack))


class PlainEngine:
    """What train_step needs of an engine, without DeepSpeed, on one device.

    The same arithmetic as ZeRO-1 on one rank: bfloat16 weights, gradients summed over micro-batches in float32,
    float32 masters under AdamW, clipping by the norm of the whole model.
    """

    def __init__(self, model: Any, groups: list[dict[str, Any]], optim: OptimConfig, rank: Rank) -> None:
        if rank.dp_size > 1:
            raise ValueError("the plain loop is for one rank")
        self.rank, self.model, self.max_norm = rank, model, optim.max_grad_norm
        self.parts: list[str] = []  # whose norms ``step`` reports
        self.transfer = Transfer(rank.device)
        self.weights: list[Tensor] = [weight for group in groups for weight in group["params"]]
        for group in groups:
            group["params"] = [torch.nn.Parameter(weight.detach().float()) for weight in group["params"]]
        self.masters: list[Tensor] = [master for group in groups for master in group["params"]]
        self.sums = [torch.zeros_like(master) for master in self.masters]
        for master, total in zip(self.masters, self.sums, strict=True):
            master.grad = total
        self.begun = False  # whether this step's sums hold a gradient already
        self.optimizer = build_optimizer(groups, optim, rank.device)

    def train(self, training: bool) -> None:
        """As Zero.train."""
        self.model.train(training)

    def forward(
        self, batch: Batch, *, first: bool = False, last: bool = False, plan: RecomputePlan | None = None
    ) -> Any:
        """As Zero.forward; no optimizer state is on its way, whatever the place in the step."""
        del first, last
        return self.model(self.transfer.get(batch), plan=plan)

    def prefetch(self, batch: Batch) -> None:
        """As Zero.prefetch."""
        self.transfer.prefetch(batch)

    def backward(self, loss: Tensor) -> None:
        """Gradients of ``loss``, added to the step's sums and let go."""
        loss.backward()
        pairs = [
            (total.view(-1), weight.grad.reshape(-1))
            for total, weight in zip(self.sums, self.weights, strict=True)
            if weight.grad is not None
        ]
        (add_gradients if self.begun else put_gradients)(pairs)
        for total, weight in zip(self.sums, self.weights, strict=True):
            if weight.grad is None and not self.begun:
                total.zero_()
            weight.grad = None
        self.begun = True

    def finish_micro_batch(self) -> None:
        """Nothing: ``backward`` has added everything."""

    def end_step(self, *, is_skipped: bool) -> None:
        """Nothing: no step is skipped."""

    @torch.no_grad()
    def step(self, totals: Tensor, is_bad: object = None) -> Reading:
        """Clip, update the masters, round them to the weights; ``totals``, the norm before clipping, and 0.

        The 0 says that the step is not skipped: this engine skips none.
        """
        del is_bad
        norm = torch.nn.utils.clip_grad_norm_(self.masters, self.max_norm, foreach=True)
        reading = Reading(torch.cat([totals, norm.to(totals.dtype).reshape(1), totals.new_zeros(1)]))
        self.optimizer.step()
        torch._foreach_copy_(self.weights, self.masters)
        self.begun = False
        return reading
