"""machine.memory=auto: what each level keeps is measured in the run itself, on the worst pack that it will meet.

A dry run is a micro-batch whose loss is multiplied by zero. It goes through the engine like every other, and leaves
weights, gradients and random numbers as they were.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from vl3train.config.choices import Recompute
from vl3train.contracts.records import Batch
from vl3train.engine.memory.device import DeviceMemory
from vl3train.engine.memory.host import require
from vl3train.engine.memory.known import KnownFit
from vl3train.engine.ranks import RunError
from vl3train.engine.zero.engine import Zero
from vl3train.model.activations.budget import ActivationBudget, level_scale
from vl3train.model.activations.offload import buffer_bytes
from vl3train.model.activations.work import RecomputePlan, pack_size, recompute_rates, uniform_plan
from vl3train.model.packed_forward import PackedModel

MOST_DRY_RUNS = 4
"""Dry runs that look for a better budget, after those that measure what each level keeps."""


class Fitted(NamedTuple):
    """What was found, and the dry run that showed it."""

    budget: ActivationBudget
    plan: RecomputePlan  # of the worst pack
    peak_bytes: int
    limit_bytes: int


class DryRun(NamedTuple):
    """Bytes of one micro-batch, the most over all ranks."""

    kept_bytes: int  # what its forward pass left in memory
    peak_bytes: int


class RowBytes(NamedTuple):
    """The fewest bytes of a hidden row that each layer of a tower must keep, one entry a layer."""

    vision: tuple[int, ...]
    language: tuple[int, ...]


def row_bytes(packed: PackedModel) -> RowBytes:
    """Row bytes of the model as it trains: a tower without a backward pass keeps nothing."""
    config: Any = packed.model.config
    rates = recompute_rates(packed.model, recomputes_logits=not packed.makes_logits_once)
    width = packed.model.dtype.itemsize
    return RowBytes(
        *(
            (hidden * width * tower.has_backward,) * tower.num_layers
            for tower, hidden in (
                (rates.vision, config.vision_config.hidden_size),
                (rates.language, config.text_config.hidden_size),
            )
        )
    )


def fit_memory(
    engine: Zero,
    packed: PackedModel,
    batch: Batch,
    memory: DeviceMemory,
    *,
    pack_name: str,
    say: Callable[[str], None],
    known: KnownFit | None = None,
) -> Fitted:
    """Find the budget of activation memory, and let ``engine`` choose its plans by it from now on.

    ``batch`` is the worst pack, ``pack_name`` says which it is. ``say`` gets a line for each dry run: most compile
    something, which takes seconds. A budget that is ``known`` needs one dry run, where it still fits. All ranks call it
    with the same arguments. Raises RunError on every rank where the pack does not fit even with every layer's input on
    the host.
    """
    fitting = Fitting(engine, packed, batch, memory, pack_name, say)
    with torch.random.fork_rng([engine.rank.device] if engine.rank.device.type == "cuda" else []):
        fitted = fitting.confirm(known.budget) if known is not None and known.budget is not None else None
        fitted = fitted or fitting.run()
    if known is not None:
        known.found(fitted.budget)
    if not packed.recomputes_in_part:
        # To recompute a layer, all ranks gather its weights: all must recompute the same layers.
        engine.choose_plans_by(lambda batch, reserved_bytes: fitted.plan)
    else:

        def choose(batch: Batch, reserved_bytes: int) -> RecomputePlan:
            plan = fitted.budget.plan(pack_size(batch), reserved_bytes=reserved_bytes)
            if known is not None:
                known.note(plan)
            return plan

        engine.choose_plans_by(choose)
    if engine.offload_schedule is not None:
        engine.offload_schedule.budget = fitted.budget
    return fitted


class Fitting:
    """Dry runs of one pack, and the budget that follows from them."""

    def __init__(
        self,
        engine: Zero,
        packed: PackedModel,
        batch: Batch,
        memory: DeviceMemory,
        pack_name: str,
        say: Callable[[str], None],
    ) -> None:
        self.engine, self.packed, self.batch, self.memory = engine, packed, batch, memory
        self.pack_name, self.say = pack_name, say
        self.size = pack_size(batch)
        self.rates = recompute_rates(packed.model, recomputes_logits=not packed.makes_logits_once)
        self.row_bytes = row_bytes(packed)
        self.out_of_memory = ""  # the device's newest message
        self.host_bytes = 0  # that layers' inputs took on the host in dry runs; torch keeps this memory

    def confirm(self, budget: ActivationBudget) -> Fitted | None:
        """The budget of an earlier start, where a dry run shows that it fits; None where it does not."""
        plan = budget.plan(self.size)
        for _ in range(2):  # in the first, compiling, tuning and loading kernels take memory of their own
            dry = self._dry_run(plan)
            if dry is None:
                return None
            if dry.peak_bytes <= (limit := self._limit()):
                return Fitted(budget, plan, dry.peak_bytes, limit)
        return None

    def run(self) -> Fitted:
        """The largest budget that a dry run has shown to fit; RunError on every rank where none fits."""
        start, first = self._start()
        limit = self._limit()  # after the first dry run: libraries have taken what they need
        budget = ActivationBudget(total_bytes=0, vision_bytes=0, rates=self.rates, **self._kept(start, first))
        vision, total = budget.needed_bytes(self.size, start)
        # No moment of a step needs more of a tower than that: the rest of the device may be kept too.
        spare = limit - first.peak_bytes
        budget = replace(budget, total_bytes=total + spare, vision_bytes=vision + max(spare, 0))
        found = (
            Fitted(replace(budget, total_bytes=total), start, first.peak_bytes, limit) if spare >= 0 else None
        )
        peak = first.peak_bytes
        for _ in range(MOST_DRY_RUNS):
            plan = budget.plan(self.size)
            if found is not None and plan == found.plan:
                return found._replace(budget=budget)
            _, used = budget.needed_bytes(self.size, plan)
            dry = self._dry_run(plan)
            if dry is None:
                _, fitted = budget.needed_bytes(self.size, found.plan if found else budget.least_kept())
                budget = replace(budget, total_bytes=(used + fitted) // 2)
                continue
            peak = dry.peak_bytes
            if peak <= limit:
                found = Fitted(budget, plan, peak, limit)
            elif plan == budget.least_kept():
                break
            budget = replace(budget, total_bytes=used + limit - peak)
        if found is None:
            raise self._refusal(f"{peak / 2**30:.1f} GiB were in use at the peak of a step")
        return found

    def _start(self) -> tuple[RecomputePlan, DryRun]:
        """A dry run that keeps little: every layer's input, or not even that where inputs alone take much."""
        inputs = self.size.patches * sum(self.row_bytes.vision) + self.size.tokens * sum(
            self.row_bytes.language
        )
        # An engine whose backward pass ran out of memory may be left in disorder, so we do not try what may not fit.
        much = inputs > (self._limit() - max(self.engine.rank.gather(self.memory.held()))) // 4
        for level in (Recompute.offload,) if much else (Recompute.layer, Recompute.offload):
            plan = self._all_at(level)
            # Twice: in the first, compiling, tuning and loading kernels take memory of their own.
            if self._dry_run(plan) is not None and (dry := self._dry_run(plan)) is not None:
                return plan, dry
        raise self._refusal(self.out_of_memory)

    def _refusal(self, why: str) -> RunError:
        return RunError(
            f"machine.memory=auto: {self.pack_name} does not fit, although every layer recomputes everything and its "
            f"input waits on the host. Model and optimizer hold {self.memory.held() / 2**30:.1f} of the "
            f"{self._limit() / 2**30:.1f} GiB that this process may use; then: {why}\nLower "
            "step.max_tokens or step.max_patches, spread the model over more GPUs with machine.zero_stage=2 or 3, or "
            "train adapters (adapter=lora)."
        )

    def _require_host_memory(self, plan: RecomputePlan) -> None:
        """RunError on every rank where a host cannot hold the layers' inputs and the optimizer state still to come."""
        sent = [
            rows * size
            for tower, sizes, rows in zip(
                plan, self.row_bytes, (self.size.patches, self.size.tokens), strict=True
            )
            for level, size in zip(tower, sizes, strict=True)
            if size and level is Recompute.offload
        ]
        needed = sum(buffer_bytes(size, self.engine.rank.device) for size in sent)
        if needed <= self.host_bytes:
            return
        schedule = self.engine.offload_schedule
        require(
            self.engine.rank,
            needed + (0 if schedule is None else schedule.optimizer.host_bytes_to_come()),
            what=f"machine.memory=auto: {self.pack_name} needs the inputs of {len(sent)} layers on the host. These"
            + (" and the optimizer state" if schedule is not None else ""),
            way_out="lower step.max_tokens or step.max_patches, or spread the model over more GPUs with "
            "machine.zero_stage=2 or 3",
            say=self.say,
            already=self.host_bytes,
        )
        self.host_bytes = needed

    def _kept(self, start: RecomputePlan, first: DryRun) -> dict[str, dict[Recompute, int]]:
        """Bytes that one layer of each tower keeps of a row, by level: from dry runs that change one layer's level."""
        scale = level_scale(in_part=self.packed.recomputes_in_part)
        if self.packed.keeps_more_at_nothing:
            scale = (Recompute.nothing, *scale)
        return {
            f"{tower}_kept": self._kept_of(tower, rows, scale, start, first)
            for tower, rows in zip(start._fields, (self.size.patches, self.size.tokens), strict=True)
        }

    def _kept_of(
        self, tower: str, rows: int, scale: tuple[Recompute, ...], start: RecomputePlan, first: DryRun
    ) -> dict[Recompute, int]:
        """Of one tower, whose pack has ``rows``: the levels that are worth choosing, in the order of ``scale``."""
        least: int = getattr(self.row_bytes, tower)[0]
        level_of_start: Recompute = getattr(start, tower)[0]
        found: dict[Recompute, int] = {}
        for level in scale:
            if level is Recompute.offload or not least:
                found[level] = 0
            elif level is Recompute.layer:
                found[level] = least
            else:
                one = (level, *getattr(start, tower)[1:])
                dry = self._dry_run(start._replace(**{tower: one}))
                if dry is None:
                    continue  # not even one layer fits at this level
                more = -(-(dry.kept_bytes - first.kept_bytes) // rows)
                found[level] = more + (0 if level_of_start is Recompute.offload else least)
        # A level that keeps no less than the one before it is not worth choosing.
        if least and found.get(Recompute.mlp, 0) >= found.get(Recompute.elementwise, 0):
            found.pop(Recompute.mlp, None)
        if found.get(Recompute.nothing, 0) <= found.get(Recompute.elementwise, 0):
            found.pop(Recompute.nothing, None)  # as in frozen layers
        return found

    def _all_at(self, level: Recompute) -> RecomputePlan:
        return uniform_plan(level, level, (self.rates.vision.num_layers, self.rates.language.num_layers))

    def _dry_run(self, plan: RecomputePlan) -> DryRun | None:
        """One micro-batch; None where it did not fit on one of the ranks."""
        self._require_host_memory(plan)
        started = time.perf_counter()
        self.memory.reset_peak()
        before, kept, problem = self.memory.held(), 0, ""
        try:
            # The budget counts the last layer like every other. So it also fits packs with more supervised tokens.
            loss = self.engine.forward(self.batch, plan=plan, whole_last_layer=True).loss_sum
            kept = self.memory.held() - before
            self.engine.backward(loss * 0)
        except torch.OutOfMemoryError as error:
            problem = str(error)
        results = self.engine.rank.gather((problem, kept, self.memory.peak()))
        if problems := [text for text, *_ in results if text]:
            self.out_of_memory = problems[0]
        dry = DryRun(max(kept for _, kept, _ in results), max(peak for *_, peak in results))
        found = "does not fit" if problems else f"{dry.peak_bytes / 2**30:.1f} GiB"
        self.say(f"memory: tried {plan}: {found}, {time.perf_counter() - started:.1f} s")
        return None if problems else dry

    def _limit(self) -> int:
        """What every rank may hold, less the optimizer state of the first step and the free space its copies need."""
        scattered = 0 if self.engine.offload_schedule is None else self.engine.offload_schedule.scattered()
        return min(self.engine.rank.gather(self.memory.limit() - self.engine.states_to_come() - scattered))
