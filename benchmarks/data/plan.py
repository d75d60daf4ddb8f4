"""The planner: ten million samples, balance beside the usual ways to pack, resume at step a million."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data.mixture import MAX_TOKENS, mixture
from benchmarks.figures import Figures
from vl3train.config.schema import StepConfig
from vl3train.data.plan.costs import rank_packs
from vl3train.data.plan.order import epoch_order
from vl3train.data.plan.plan import Plan
from vl3train.data.plan.sample_table import SampleTable

FILL = 0.985
OPEN_PATCHES = 131_072  # never full before the tokens are: eight a token
BUFFER = 64  # samples that the usual packer looks at


def step_config(packs: int, **changes: Any) -> StepConfig:
    """16 384 tokens a pack; a step closes when its packs are full."""
    limits = {"max_tokens": MAX_TOKENS, "max_patches": OPEN_PATCHES, "max_samples": None, "fill": FILL}
    return StepConfig(global_packs=packs, **(limits | changes))


def plan_figures(figures: Figures, quick: bool) -> None:
    """All figures of the plan; ``quick`` takes a tenth of the samples and names the figures so."""
    size, called = (1_000_000, "plan_1m") if quick else (10_000_000, "plan_10m")
    said = f"{size:,} samples"
    warm_up()
    for packs in (64, 8, 512):
        found = in_child("cold", size, packs)
        note = f"K={packs}, {said}; permutation, step table and first step; {found['steps']:,} steps"
        name = "" if packs == 64 else f"_k{packs}"
        figures.add(f"{called}_seconds{name}", found["seconds"], "s", "lower", note, 10)
        figures.add(
            f"{called}_peak_gib{name}",
            found["gib"],
            "GiB",
            "lower",
            f"whole process, lengths of all samples included; {note}",
            1,
        )
    with tempfile.TemporaryDirectory() as cache:
        in_child("write", size, 8, cache)
        found = in_child("resume", size, 8, cache)
    note = (
        f"new process, step {found['step']:,} of {found['steps']:,} (8 samples a step), {said}; from the table of "
        f"lengths to the step's packs"
    )
    figures.add("resume_seconds", found["seconds"], "s", "lower", note, 1)
    balance_figures(figures, 300_000 if quick else 4_000_000, 100 if quick else 400)


def balance_figures(figures: Figures, size: int, most_steps: int) -> None:
    """Fill, balance and the time of a step, beside the usual ways to pack."""
    table = mixture(size)
    slowest, fills = [], []
    for packs in (8, 64, 512):
        plan = Plan(table, 0, step_config(packs))
        found = planned(plan, most_steps)
        slowest.append(float(np.quantile(found["seconds"], 0.99)))
        fills.append(float(np.mean(found["fill"])))
        note = f"K={packs}, {len(found['fill'])} steps"
        name = f"balance_p99_k{packs}"
        figures.add(name, quantile(found["balance"]), "max/mean", "lower", note + about(found), 1.02)
        for kind, make in (("next_fit", next_fit), ("first_fit_per_rank", first_fit_per_rank)):
            usual = make(table, packs, len(found["fill"]))
            figures.add(
                f"{name}_{kind}", quantile(usual["balance"]), "max/mean", "lower", note + about(usual)
            )
        default = planned(Plan(table, 0, StepConfig(global_packs=packs, max_samples=None)), most_steps)
        figures.add(
            f"{name}_default_caps",
            quantile(default["balance"]),
            "max/mean",
            "lower",
            f"K={packs}, step.fill=0.95 and step.max_patches=65536, which this mixture fills before its tokens"
            + about(default),
        )
    figures.add("fill", min(fills), "share of tokens", "higher", f"least of K=8, 64, 512: {fills}", 0.98)
    figures.add("plan_step_seconds_p99", max(slowest), "s", "lower", f"most of K=8, 64, 512: {slowest}", 0.2)


def about(found: dict[str, list[float]]) -> str:
    """Mean fill and balance in words."""
    return f"; fill {np.mean(found['fill']):.4f}, mean balance {np.mean(found['balance']):.4f}"


def quantile(values: list[float]) -> float:
    """The 99th of a hundred."""
    return float(np.quantile(values, 0.99))


def planned(plan: Plan, most_steps: int) -> dict[str, list[float]]:
    """Fill, balance and seconds of the plan's first steps; the last, short one is left out."""
    found: dict[str, list[float]] = {"fill": [], "balance": [], "seconds": []}
    plan.step_packs(plan.cursor_at(0))
    for step in range(min(most_steps, plan.steps_in_epoch(0) - 1)):
        start = time.perf_counter()
        packs = plan.step_packs(plan.cursor_at(step))
        found["seconds"].append(time.perf_counter() - start)
        costs = np.array([pack.cost for pack in packs], float)
        found["balance"].append(costs.max() / costs.mean())
        tokens = sum(pack.num_tokens for pack in packs)
        found["fill"].append(tokens / (len(packs) * plan.step.max_tokens))
    assert len(rank_packs(packs, 0, 4)) == len(packs) // 4
    return found


def next_fit(table: SampleTable, packs: int, steps: int) -> dict[str, list[float]]:
    """Samples in order; a pack closes at the first that does not fit; K packs in a row are a step."""
    sizes, costs, order = in_order(table)
    made: list[list[int]] = [[]]
    room = MAX_TOKENS
    for row in order:
        if sizes[row] > room:
            if len(made) == packs * steps:
                break
            made.append([])
            room = MAX_TOKENS
        made[-1].append(row)
        room -= sizes[row]
    return measured(
        [made[first : first + packs] for first in range(0, len(made) - packs, packs)], sizes, costs
    )


def first_fit_per_rank(table: SampleTable, packs: int, steps: int) -> dict[str, list[float]]:
    """Each rank packs its own samples, every K-th: one pack at a time, the first of a buffer that fits."""
    sizes, costs, order = in_order(table)
    streams = [order[rank::packs] for rank in range(packs)]
    ranks = []
    for stream in streams:
        buffer, position, mine = stream[:BUFFER], BUFFER, []
        while len(mine) < steps and position < len(stream):
            room, pack = MAX_TOKENS, []
            place = 0
            while place < len(buffer):
                if sizes[buffer[place]] <= room:
                    row = buffer.pop(place)
                    pack.append(row)
                    room -= sizes[row]
                    if position < len(stream):
                        buffer.append(stream[position])
                        position += 1
                else:
                    place += 1
            mine.append(pack)
        ranks.append(mine)
    return measured([list(step) for step in zip(*ranks, strict=False)], sizes, costs)


def in_order(table: SampleTable) -> tuple[list[int], np.ndarray, list[int]]:
    """Tokens, work and the order of the first epoch."""
    costs = Plan(table, 0, step_config(8)).entry_costs(np.arange(sum(table.sizes)))
    return table.num_tokens.tolist(), costs, epoch_order(table.sizes, table.weights, seed=0, epoch=0).tolist()


def measured(steps: list[list[list[int]]], sizes: list[int], costs: np.ndarray) -> dict[str, list[float]]:
    """Fill and balance of steps that are lists of packs of samples."""
    found: dict[str, list[float]] = {"fill": [], "balance": []}
    for step in steps:
        work = np.array([costs[pack].sum() for pack in step], float)
        found["balance"].append(work.max() / work.mean())
        found["fill"].append(sum(sizes[row] for pack in step for row in pack) / (len(step) * MAX_TOKENS))
    return found


def warm_up() -> None:
    """Compile once, or load what an earlier run compiled."""
    Plan(mixture(1000), 0, step_config(8)).step_packs(Plan(mixture(1000), 0, step_config(8)).cursor_at(0))


def in_child(what: str, size: int, packs: int, cache: str = "") -> dict[str, float]:
    """Run one of ``CHILDREN`` in a process of its own, for its memory."""
    words = [sys.executable, "-m", "benchmarks.data.plan", what, str(size), str(packs), cache]
    done = subprocess.run(words, check=True, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    return json.loads(done.stdout.splitlines()[-1])


def cold(size: int, packs: int, cache: str) -> dict[str, float]:
    """Seconds from the table to the first step's packs, and the process's largest memory."""
    table = mixture(size)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of drawing the mixture; Linux
    start = time.perf_counter()
    plan = Plan(table, 0, step_config(packs))
    plan.step_packs(plan.cursor_at(0))
    seconds = time.perf_counter() - start
    status = Path("/proc/self/status").read_text().split()
    peak = int(status[status.index("VmHWM:") + 1]) / 2**20
    return {"seconds": seconds, "gib": peak, "steps": plan.steps_in_epoch(0)}


def write(size: int, packs: int, cache: str) -> dict[str, float]:
    """Plan an epoch and keep it."""
    return {"steps": short_steps(size, packs, cache).steps_in_epoch(0)}


def resume(size: int, packs: int, cache: str) -> dict[str, float]:
    """Seconds from the table to the packs of step a million (or eight tenths of the steps there are)."""
    table = mixture(size)
    step = min(1_000_000, size // 10)
    start = time.perf_counter()
    plan = short_steps(size, packs, cache, table)
    plan.step_packs(plan.cursor_at(step))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "step": step, "steps": plan.steps_in_epoch(0)}


def short_steps(size: int, packs: int, cache: str, table: SampleTable | None = None) -> Plan:
    """A plan of steps of eight samples, kept in ``cache``."""
    step = dataclasses.replace(step_config(packs), max_samples=8)
    return Plan(table or mixture(size), 0, step, cache=Path(cache))


CHILDREN: dict[str, Callable[[int, int, str], dict[str, float]]] = {
    "cold": cold,
    "write": write,
    "resume": resume,
}

if __name__ == "__main__":
    print(json.dumps(CHILDREN[sys.argv[1]](int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])))
