"""Takes the figures of one row, in a process of its own for each rank."""

from __future__ import annotations

import ctypes
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.data.packs import draw_packs, pack_batch
from benchmarks.gpu.engine import Step, own_step
from benchmarks.gpu.model import build_row_model, mix_of
from benchmarks.gpu.rows import Row
from benchmarks.gpu.stock import stock_step
from benchmarks.kernels.host_syncs import count_syncs
from vl3train.contracts.records import Batch, RenderedSample
from vl3train.engine.monitor.compile_log import take_compiles
from vl3train.engine.monitor.meter import MATMUL_SIZE, measure_matmul
from vl3train.model.activations.flops import FlopRates, flop_rates

WARM_UP_STEPS = 2
"""The first step compiles and makes AdamW's moments. Where these are kept on the host, they cross the link twice within
it, and the second step pays for that."""


class Work:
    """The packs of a row's steps, the same on every rank, and the share of this one.

    Each step has packs of its own, as in a run: with shapes that came before, cuDNN's attention takes plans that it had
    built, which a run of transformers' forward does not find (it built one for each shape, a second for both passes:
    https://github.com/modelscope/FunASR/issues/3704).
    """

    def __init__(self, row: Row, rates: FlopRates, rank: int) -> None:
        self.row, self.rank, self.rates = row, rank, rates
        self.clip_id = mix_of(row.model).video_pad_id
        self.kernels: dict[str, str] = {}  # by what they make, where it is ours to choose
        num_steps = WARM_UP_STEPS + row.steps
        self.all_batches: list[Batch] = []  # of all steps and ranks
        packs = draw_packs(
            row.packs_a_step * row.ranks * num_steps,
            max_tokens=row.max_tokens,
            image_merge_size=row.image_merge_size,
            mix=mix_of(row.model),
            fill=row.fill,
        )
        self.steps = [self._step(packs[i::num_steps]) for i in range(num_steps)]

    def _step(self, packs: list[list[RenderedSample]]) -> dict[str, Any]:
        batches = [pack_batch(pack) for pack in packs]
        self.all_batches += batches
        costs = [self.rates.of(batch) for batch in batches]
        mine = shares(costs, self.row.ranks)[self.rank]
        own = [batches[i] for i in mine]
        if torch.cuda.is_available():
            own = [batch.pin_memory() for batch in own]
        return {
            "batches": own,
            "packs": [packs[i] for i in mine],
            "flops": sum(costs),
            "tokens": sum(batch.num_planned_tokens for batch in batches),
            "longest": max(batch.num_planned_tokens for batch in batches),
            "patches": sum(len(batch.pixel_values) for batch in batches),
            "supervised": sum(len(batch.supervised_positions) for batch in batches),
        }

    def data(self, number: int) -> list[Any]:
        """What the row's step takes as its step ``number``."""
        step = self.steps[number]
        if self.row.way == "packed_stock":
            return list(step["packs"])
        if self.row.way == "padded":
            return [sample for pack in step["packs"] for sample in pack]
        return list(step["batches"])


def shares(costs: list[int], ranks: int) -> list[list[int]]:
    """Positions of the packs of each rank, equally many and in their order.

    Dealt out dearest first, to the rank that has least work so far.

    >>> shares([1, 5, 4, 2], 2)
    [[0, 1], [2, 3]]
    """
    found: list[list[int]] = [[] for _ in range(ranks)]
    for position in sorted(range(len(costs)), key=lambda i: -costs[i]):
        open_ranks = [r for r in range(ranks) if len(found[r]) < len(costs) // ranks]
        least = min(open_ranks, key=lambda r: sum(costs[i] for i in found[r]))
        found[least].append(position)
    return [sorted(mine) for mine in found]


def prepare(row: Row, rank: int, device: torch.device) -> tuple[Step, Work]:
    """The row's step and what it works on."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    started = time.perf_counter()
    hf_model = build_row_model(row, device)
    work = Work(row, flop_rates(hf_model), rank)
    print(f"model and packs made in {time.perf_counter() - started:.0f} s", flush=True)
    started = time.perf_counter()
    if row.way in ("padded", "packed_stock"):
        step = stock_step(row, hf_model, device)
    else:
        step, work.kernels = own_step(row, hf_model, device, work.all_batches)
    print(f"ready for the first step {time.perf_counter() - started:.0f} s later", flush=True)
    return step, work


def measure(
    name: str,
    row: Row,
    rank: int,
    device: torch.device,
    tell: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Train the row's steps and return its figures; the first steps warm up and are not counted.

    ``tell`` gets the figures so far after each step: what a time limit cuts off is not lost.
    """
    step, work = prepare(row, rank, device)
    timed: list[tuple[float, dict[str, Any]]] = []
    found: dict[str, Any] = {}
    warm_up, recompiles, breaks = 0.0, 0, 0
    mappings: list[int] = []
    wait_for_all(device)
    mapped = memory_mappings(device)
    ended = time.perf_counter()
    for number in range(WARM_UP_STEPS + row.steps):
        of_step = work.steps[number]
        loss = step(work.data(number), of_step["supervised"])
        # From one step's loss to the next one's, as in a run: each step has one update in it, that of the step before.
        started, ended = ended, time.perf_counter()
        took = ended - started
        compiles = take_compiles()
        before, mapped = mapped, memory_mappings(device)
        print(
            f"{name} rank {rank} step {number}: {took:.2f} s, {step_tflops(row, took, of_step):.4g} useful TFLOP/s, "
            f"loss {loss:.4f}, {compiles}, memory mapped or given back {mapped - before} times",
            *compiles.breaks,
            flush=True,
        )
        breaks += len(compiles.breaks)  # those before the first step, too
        if number < WARM_UP_STEPS:
            warm_up += took
            continue
        recompiles += compiles.graphs
        timed.append((took, of_step))
        mappings.append(mapped - before)
        found = {
            **rates_of(row, timed, device),
            "tokens_a_pack": max(of_step["longest"] for of_step in work.steps),
            "warm_up_seconds": warm_up,
            "recompiles": recompiles,
            "graph_breaks": breaks,
            "step_mappings": mappings,
            "kernels": work.kernels,
            "loss": loss,
        }
        tell(found)
    if row.host_syncs and device.type == "cuda":
        waits = count_syncs(lambda: step(work.data(0), work.steps[0]["supervised"]))
        found |= {"host_syncs": sum(waits.values()), "host_syncs_at": dict(waits)}
    return found


def measure_beside(
    row: Row, device: torch.device, tell: Callable[[dict[str, Any]], None] = lambda _: None
) -> dict[str, Any]:
    """Figures of Hugging Face's Trainer over the samples of the row's steps. Work is counted as for our own model."""
    from benchmarks.gpu.trainer import measure_trainer

    with torch.device("meta"):
        counted = flop_rates(build_row_model(replace(row, base_4bit=False), torch.device("meta")))
    work = Work(row, counted, 0)
    seconds, losses = measure_trainer(row, work, WARM_UP_STEPS, device, tell)
    timed = list(zip(seconds, work.steps, strict=True))[WARM_UP_STEPS:]
    longest = max(of_step["longest"] for of_step in work.steps)
    return {**rates_of(row, timed, device), "tokens_a_pack": longest, "loss": losses[-1], "losses": losses}


def rates_of(row: Row, timed: list[tuple[float, dict[str, Any]]], device: torch.device) -> dict[str, Any]:
    """The figures: from the seconds and the work of each timed step, and from memory."""
    total = sum(took for took, _ in timed)
    flops, tokens, patches = (
        sum(of_step[key] for _, of_step in timed) for key in ("flops", "tokens", "patches")
    )
    cuda = device.type == "cuda"
    return {
        "tflops": flops / row.ranks / total / 1e12,
        "seconds_a_pack": total / (len(timed) * row.packs_a_step),
        "work_a_pack_tflop": flops / len(timed) / row.packs_a_step / row.ranks / 1e12,
        "tokens_a_second": tokens / total,
        "patches_a_second": patches / total,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if cuda else None,
        # Memory ran out and had to be given back first: a wait for the device that no count of waits sees.
        "alloc_retries": torch.cuda.memory_stats()["num_alloc_retries"] if cuda else None,
        "step_seconds": [took for took, _ in timed],
        # Packs differ in their work: seconds alone do not tell which step was slow.
        "step_tflops": [step_tflops(row, took, of_step) for took, of_step in timed],
    }


def step_tflops(row: Row, took: float, of_step: dict[str, Any]) -> float:
    """Useful TFLOP/s of one step on each GPU."""
    return of_step["flops"] / row.ranks / took / 1e12


def memory_mappings(device: torch.device) -> int:
    """How often torch took memory of the device or gave some back so far: to give back waits for all that runs."""
    if device.type != "cuda":
        return 0
    statistics = torch.cuda.memory_stats(device)
    return int(statistics["num_device_alloc"] + statistics["num_device_free"])


def wait_for_all(device: torch.device) -> None:
    """Wait until this device, and every rank, is done."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def child(name: str, row: Row, rank: int, tiny: bool, pipe: Any) -> None:
    """In a process of its own: send the figures, or the reason why there are none."""
    device = torch.device("cpu") if tiny else torch.device("cuda", rank)

    def tell(so_far: dict[str, Any]) -> None:
        pipe.send({"so_far": so_far})

    def act() -> dict[str, Any]:
        if row.gpu_gib is not None and not tiny:
            for taken in range(row.ranks) if row.way == "command" else [rank]:
                take_memory(torch.device("cuda", taken), row.gpu_gib)
        if row.way == "command":
            # Loads the data plane, which other rows need not.
            from benchmarks.gpu.command import measure_command

            return measure_command(row, device, tell)
        if row.way == "trainer":
            for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
                os.environ.pop(
                    variable, None
                )  # accelerate would take them for torchrun's and look for other ranks
            return measure_beside(row, device, tell)
        return measure(name, row, rank, device, tell)

    send(pipe, act)


def take_memory(device: torch.device, leave_gib: float) -> None:
    """Take what the GPU has beyond ``leave_gib`` past torch's allocator, as if it were another process's.

    RuntimeError where the GPU has less.
    """
    torch.cuda.set_device(device)
    _, total = torch.cuda.mem_get_info(device)  # makes the context, which is part of what is left
    beyond = total - int(leave_gib * 2**30)
    if beyond < 0:
        raise RuntimeError(f"gpu_gib={leave_gib}, and the GPU has {total / 2**30:.1f} GiB")
    loaded = f"libcudart.so.{str(torch.version.cuda).partition('.')[0]}"  # by torch
    error = ctypes.CDLL(loaded).cudaMalloc(ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(beyond))
    if error:
        raise RuntimeError(f"cudaMalloc of {beyond / 2**30:.1f} GiB: error {error}")
    left = f"{leave_gib} of {total / 2**30:.1f} GiB"
    print(f"{beyond / 2**30:.1f} GiB taken, {left} left to the row", flush=True)


def matmul_child(name: str, row: Row, rank: int, tiny: bool, pipe: Any) -> None:
    """The same for a matrix product: a context left in the command's own process would take memory from the rows."""
    device = torch.device("cuda")
    send(
        pipe,
        lambda: {
            "matmul_tflops": measure_matmul(device),
            "matmul_tflops_lasting": sustained_matmul(device),
            "machine": torch.cuda.get_device_name(),
        },
    )


def sustained_matmul(
    device: torch.device, size: int = MATMUL_SIZE, turns: int = 12, num_matmuls: int = 300
) -> float:
    """TFLOP/s of the same product for as long as some steps take, the median of the second half of the turns.

    A card that reaches its power limit slows down within a second, which ``measure_matmul``, a fifth of one, does not
    see: 773 against 690 on one H100 (benchmarks/log.md, round nine).
    """
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    rates = []
    for _ in range(turns):
        started = time.perf_counter()
        for _ in range(num_matmuls):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        rates.append(num_matmuls * 2 * size**3 / (time.perf_counter() - started) / 1e12)
    return median(rates[turns // 2 :])


def send(pipe: Any, act: Callable[[], dict[str, Any]]) -> None:
    """What ``act`` returns, or why it failed."""
    try:
        pipe.send(act())
    except Exception as error:
        traceback.print_exc(limit=-6)
        pipe.send({"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
