"""machine.memory=auto: what each level keeps is measured in the run itself, on the worst pack that it will meet.

A dry run is a micro-batch whose loss counts zero times: it goes through the engine as every other, and leaves
weights, gradients and random numbers as they were.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from vl3train.config.choices import Recompute
from vl3train.config.schema import TrainConfig
from vl3train.contracts.records import Batch, Cursor
from vl3train.data.extremes import blank_batch, worst_pack
from vl3train.data.loader import OpenData
from vl3train.engine.memory.device import DeviceMemory, device_memory
from vl3train.engine.memory.host import require
from vl3train.engine.ranks import RunError
from vl3train.engine.zero.engine import Zero
from vl3train.model.activations.budget import ActivationBudget, level_scale
from vl3train.model.activations.offload import buffer_bytes
from vl3train.model.activations.work import RecomputePlan, pack_size, recompute_rates
from vl3train.model.packed_forward import PackedModel

MOST_DRY_RUNS = 4
"""Of those that look for a better budget after the first."""


class Fitted(NamedTuple):
    """What was found, and the dry run that showed it."""

    budget: ActivationBudget
    levels: RecomputePlan  # of the worst pack
    peak_bytes: int
    limit_bytes: int


class DryRun(NamedTuple):
    """Bytes of one micro-batch, the most over all ranks."""

    kept_bytes: int  # more than before it, when its forward pass is done
    peak_bytes: int


def fit_run(
    cfg: TrainConfig,
    engine: Zero,
    packed: PackedModel,
    data: OpenData,
    first: Cursor,
    last_step: int,
    say: Callable[[str], None],
) -> None:
    """Fit the activations of steps ``first.step`` to ``last_step`` into the device; say what is tried and chosen.

    All ranks call it. Raises RunError on every rank where the worst pack does not fit.
    """
    memory, widths = device_memory(engine.rank.device), row_bytes(packed)
    worst = worst_pack(
        data.plan,
        first,
        last_step,
        lambda patches, tokens: patches * sum(widths.vision) + tokens * sum(widths.language),
    )
    pack = worst.pack
    name = f"the worst pack (step {worst.step}, {pack.num_patches:,} patches, {pack.num_tokens:,} tokens"
    if worst.steps_scanned < worst.steps_left:
        name += f"; {worst.steps_scanned:,} of {worst.steps_left:,} steps looked at"
    keys = [data.index.key(row) for row in pack.samples[:5]]
    batch = blank_batch(data, pack, cfg.machine.loss_chunk_tokens)
    pack_name = f"{name}; samples {', '.join(keys)}, ...)"
    fitted = fit_memory(engine, packed, batch, memory, pack_name=pack_name, say=say)
    peak, limit = fitted.peak_bytes / 2**30, fitted.limit_bytes / 2**30
    say(f"memory: {peak:.1f} of {limit:.1f} GiB on {name}): {fitted.levels}")


class RowBytes(NamedTuple):
    """Bytes of a hidden row that each layer of a tower has to keep at least, one entry a layer."""

    vision: tuple[int, ...]
    language: tuple[int, ...]


def row_bytes(packed: PackedModel) -> RowBytes:
    """Of the model as it trains: a tower without a backward pass keeps nothing."""
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
) -> Fitted:
    """Find the budget of activation memory, and let ``packed`` choose its levels by it from now on.

    ``batch`` is the worst pack, ``pack_name`` says which it is; ``say`` gets a line for each dry run: most compile
    something, which takes seconds. All ranks call it with the same. Raises RunError on
    every rank where the pack does not fit even with every layer's input on the host.
    """
    fitting = Fitting(engine, packed, batch, memory, pack_name, say)
    # The budget counts the last layer like every other: whatever its share of supervised tokens, a pack takes no more.
    packed.whole_last_layer = True
    with torch.random.fork_rng([engine.rank.device] if engine.rank.device.type == "cuda" else []):
        try:
            fitted = fitting.run()
        finally:
            packed.whole_last_layer = False
    if engine.zero_stage == 3:
        # Computing a layer again gathers its weights from all ranks: all must do it in the same layers.
        packed.choose_plan = lambda *_: fitted.levels
    else:
        packed.choose_plan = lambda batch, reserved_bytes: fitted.budget.levels(
            pack_size(batch), reserved_bytes=reserved_bytes
        )
    if engine.offload_schedule is not None:
        engine.offload_schedule.budget = fitted.budget
    return fitted


class Fitting:
    """Dry runs of one pack, and what follows from them."""

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
        self.out_of_memory = ""  # what the device said last
        self.host_bytes = 0  # that inputs of layers took in a dry run; torch keeps them

    def run(self) -> Fitted:
        """The largest budget that a dry run has shown to fit; RunError on every rank where none was."""
        start, first = self._start()
        limit = self._limit()  # now that libraries have taken what they need
        budget = ActivationBudget(total_bytes=0, vision_bytes=0, rates=self.rates, **self._kept(start, first))
        vision, total = budget.needed_bytes(self.size, start)
        # At no moment of a step is there more of a tower than that: what is left over may be kept too.
        spare = limit - first.peak_bytes
        budget = replace(budget, total_bytes=total + spare, vision_bytes=vision + max(spare, 0))
        found = (
            Fitted(replace(budget, total_bytes=total), start, first.peak_bytes, limit) if spare >= 0 else None
        )
        peak = first.peak_bytes
        for _ in range(MOST_DRY_RUNS):
            levels = budget.levels(self.size)
            if found is not None and levels == found.levels:
                return found._replace(budget=budget)
            _, used = budget.needed_bytes(self.size, levels)
            dry = self._dry_run(levels)
            if dry is None:
                _, fitted = budget.needed_bytes(self.size, found.levels if found else budget.least_kept())
                budget = replace(budget, total_bytes=(used + fitted) // 2)
                continue
            peak = dry.peak_bytes
            if peak <= limit:
                found = Fitted(budget, levels, peak, limit)
            elif levels == budget.least_kept():
                break
            budget = replace(budget, total_bytes=used + limit - peak)
        if found is None:
            raise self._refusal(f"{peak / 2**30:.1f} GiB were taken at the peak of a step")
        return found

    def _start(self) -> tuple[RecomputePlan, DryRun]:
        """A dry run that keeps little: every layer's input, or not even that where inputs alone take much."""
        inputs = self.size.patches * sum(self.row_bytes.vision) + self.size.tokens * sum(
            self.row_bytes.language
        )
        # An engine whose backward pass ran out of memory may be left in disorder: better not to try.
        much = inputs > (self._limit() - max(self.engine.rank.gather(self.memory.held()))) // 4
        for level in (Recompute.offload,) if much else (Recompute.layer, Recompute.offload):
            levels = self._all_at(level)
            # Twice: what compiles, tunes and loads kernels in the first takes memory of its own.
            if self._dry_run(levels) is not None and (dry := self._dry_run(levels)) is not None:
                return levels, dry
        raise self._refusal(self.out_of_memory)

    def _refusal(self, why: str) -> RunError:
        return RunError(
            f"machine.memory=auto: {self.pack_name} does not fit, though every layer computes everything again and "
            f"its input waits on the host. Model and optimizer hold {self.memory.held() / 2**30:.1f} of the "
            f"{self._limit() / 2**30:.1f} GiB that this process may use; then: {why}\nLower "
            "step.max_tokens or step.max_patches, spread the model over more GPUs with machine.zero_stage=2 or 3, or "
            "train adapters (adapter=lora)."
        )

    def _require_host_memory(self, levels: RecomputePlan) -> None:
        """RunError on every rank where a host cannot hold the inputs that go there and AdamW's means to come."""
        sent = [
            rows * size
            for tower, sizes, rows in zip(
                levels, self.row_bytes, (self.size.patches, self.size.tokens), strict=True
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
            + (" and AdamW's means" if schedule is not None else ""),
            way_out="lower step.max_tokens or step.max_patches, or spread the model over more GPUs with "
            "machine.zero_stage=2 or 3",
            say=self.say,
            already=self.host_bytes,
        )
        self.host_bytes = needed

    def _kept(self, start: RecomputePlan, first: DryRun) -> dict[str, dict[Recompute, int]]:
        """Bytes that one layer of each tower keeps of a row, by level: from dry runs with one layer at another."""
        towers = zip(start._fields, (self.size.patches, self.size.tokens), strict=True)
        scale = level_scale(self.engine.zero_stage)
        if self.packed.keeps_more_at_nothing:
            scale = (Recompute.nothing, *scale)
        kept: dict[str, dict[Recompute, int]] = {}
        for tower, rows in towers:
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
                        continue  # a level of which not even one layer fits is none to choose
                    more = -(-(dry.kept_bytes - first.kept_bytes) // rows)
                    found[level] = more + (0 if level_of_start is Recompute.offload else least)
            # A level that keeps no less than the one before it is none to choose either.
            if least and found.get(Recompute.mlp, 0) >= found.get(Recompute.elementwise, 0):
                found.pop(Recompute.mlp, None)
            if found.get(Recompute.nothing, 0) <= found.get(Recompute.elementwise, 0):
                found.pop(Recompute.nothing, None)  # as in frozen layers
            kept[f"{tower}_kept"] = {level: found[level] for level in scale if level in found}
        return kept

    def _all_at(self, level: Recompute) -> RecomputePlan:
        return RecomputePlan(
            (level,) * self.rates.vision.num_layers, (level,) * self.rates.language.num_layers
        )

    def _dry_run(self, levels: RecomputePlan) -> DryRun | None:
        """One micro-batch; None where it did not fit on one of the ranks."""
        self._require_host_memory(levels)
        self.packed.choose_plan = lambda *_: levels
        started = time.perf_counter()
        self.memory.reset_peak()
        before, kept, problem = self.memory.held(), 0, ""
        try:
            loss = self.engine.forward(self.batch).loss_sum
            kept = self.memory.held() - before
            self.engine.backward(loss * 0)
        except torch.OutOfMemoryError as error:
            problem = str(error)
        results = self.engine.rank.gather((problem, kept, self.memory.peak()))
        if problems := [text for text, *_ in results if text]:
            self.out_of_memory = problems[0]
        dry = DryRun(max(kept for _, kept, _ in results), max(peak for *_, peak in results))
        found = "does not fit" if problems else f"{dry.peak_bytes / 2**30:.1f} GiB"
        self.say(f"memory: tried {levels}: {found}, {time.perf_counter() - started:.1f} s")
        return None if problems else dry

    def _limit(self) -> int:
        """What every rank may hold, less what its optimizer will take in the first step or needs free on its way."""
        scattered = 0 if self.engine.offload_schedule is None else self.engine.offload_schedule.scattered()
        return min(self.engine.rank.gather(self.memory.limit() - self.engine.states_to_come() - scattered))
