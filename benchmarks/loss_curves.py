"""Loss curves of 200 steps: packs under the engine against transformers' own forward, one sample at a time.

    python -m benchmarks.loss_curves            # on a CPU the second order of the data for the reference alone
    python -m benchmarks.loss_curves --tiny     # a few steps; nothing is kept
    python -m benchmarks.loss_curves --processes 3   # curves drawn at a time; five on each GPU if left out

Every curve starts from the same weights and sees the same samples in the same steps, with the same AdamW, schedule
and clipping; only who computes the gradient differs. What run-to-run noise is show the reference with the samples of
each step turned round (other rounding, nothing else) and on a second order of the data (seed 1). JSON lines go to
benchmarks/results/loss_curves.jsonl (or $OUT), loss_curves_gpu.jsonl on a GPU, and the tables to Markdown beside it
when all are drawn; till then each curve's losses stand in a file that ends in .part. docs/numerics.md says what they
mean.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.curves.tables import Curve, curve_line, figure_lines, kept_curves, markdown
from benchmarks.curves.task import Task, make_task
from benchmarks.data.packs import pack_batch
from benchmarks.gpu.engine import PlainEngine
from benchmarks.gpu.stock import full_loss, padded_inputs
from vl3train.config.choices import Dtype, MasterDtype
from vl3train.config.optim_options import OptimConfig
from vl3train.config.schema import MachineConfig
from vl3train.contracts.records import RenderedSample
from vl3train.contracts.tokens import IGNORE_INDEX
from vl3train.engine.optim.build import build_optimizer, rate_factor, set_rates
from vl3train.engine.ranks import Rank, join
from vl3train.engine.start.kernels import choose_kernels
from vl3train.engine.step import train_step
from vl3train.engine.zero.engine import Zero
from vl3train.model.packed_forward import PackedModel
from vl3train.model.trainable import parameter_groups

RATES = {"vision_encoder": 2e-3, "projector": 2e-3, "language_model": 1e-3}  # configs/model/debug.yaml
SAMPLES_A_STEP = 8
PACKS_A_STEP = 2
PROCESSES_A_GPU = 5
"""A small model waits for the host nearly all the time."""


def curves(*, cuda: bool, tiny: bool) -> list[Curve]:
    """All that this machine can draw, the reference first; compiled layers need a compiler, on a CPU one for C++."""
    found = [
        Curve(packed=packed, dtype=dtype)
        for dtype in (Dtype.float32, Dtype.bfloat16)
        for packed in (False, True)
    ]
    found.append(Curve(packed=True, dtype=Dtype.bfloat16, rounded=True))
    again = found if cuda else found[:1]  # a CPU is slow
    if not tiny:
        compiled = [
            Curve(packed=True, dtype=dtype, compiled=True) for dtype in (Dtype.float32, Dtype.bfloat16)
        ]
        found = [*found, *compiled]
    turned = replace(found[0], turned=True)
    return [*found, turned, *(replace(curve, seed=1) for curve in again)]


def main() -> None:
    """Draw every curve, write lines and tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="a few steps on few samples; nothing is kept")
    parser.add_argument(
        "--table", action="store_true", help="only write the tables anew, from the curves that were kept"
    )
    parser.add_argument(
        "--processes",
        type=int,
        help=f"curves drawn at a time, spread over the GPUs: {PROCESSES_A_GPU} on each if left out, 1 on a CPU",
    )
    args = parser.parse_args()
    if args.processes is not None and args.processes < 1:
        parser.error(f"--processes {args.processes}: at least 1")
    out = Path(os.environ.get("OUT") or Path(__file__).parent / "results")
    if args.table:
        for kept in out.glob("loss_curves*.jsonl"):
            kept.with_suffix(".md").write_text(markdown(kept_curves(kept)))
        return
    cuda = torch.cuda.is_available() and not args.tiny
    processes = args.processes or (PROCESSES_A_GPU * torch.cuda.device_count() if cuda else 1)
    drawn = curves(cuda=cuda, tiny=args.tiny)
    kept = out / f"loss_curves{'_gpu' if cuda else ''}.jsonl"
    part = kept.with_suffix(".jsonl.part")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        task = make_task(Path(folder), scale=0.02 if args.tiny else 0.25, part_steps=2 if args.tiny else 40)
        with (Path(os.devnull) if args.tiny else part).open("w") as file:
            for curve, losses in draw_all(drawn, task, 4 if args.tiny else 200, processes, cuda):
                found[curve] = losses
                file.write(json.dumps(curve_line(curve, losses)) + "\n")
                file.flush()
    found = {curve: found[curve] for curve in drawn}  # tables have the reference first
    lines, table = list(figure_lines(found, cuda)), markdown(found)
    print(table)
    if args.tiny:
        print("\n".join(json.dumps(line) for line in lines))
        return
    kept.write_text("".join(json.dumps(line) + "\n" for line in lines))
    kept.with_suffix(".md").write_text(table)
    part.unlink()


def draw_all(
    drawn: Sequence[Curve], task: Task, num_steps: int, processes: int, cuda: bool
) -> Iterator[tuple[Curve, list[float]]]:
    """The losses of every curve in order of its steps, as soon as it is drawn."""
    context = get_context("spawn")
    gpus: Any = context.Queue()
    names = visible_gpus() if cuda else [""]
    for number in range(processes):
        gpus.put(names[number % len(names)])
    with ProcessPoolExecutor(processes, mp_context=context, initializer=take_gpu, initargs=(gpus,)) as pool:
        # Compiled ones take longest: the last first.
        asked = {pool.submit(draw, curve, task, num_steps): curve for curve in reversed(drawn)}
        for done in as_completed(asked):
            yield asked[done], done.result()


def visible_gpus() -> list[str]:
    """The GPUs of this process as CUDA_VISIBLE_DEVICES names them."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    return names.split(",") if names else [str(number) for number in range(torch.cuda.device_count())]


def take_gpu(gpus: Any) -> None:
    """A drawing process's first act: it sees the GPU that is its own, or none."""
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus.get()


def draw(curve: Curve, task: Task, num_steps: int) -> list[float]:
    """The losses of one curve, in order of its steps."""
    started = time.perf_counter()
    rank = join(MachineConfig())
    steps = task.steps(num_steps, SAMPLES_A_STEP, curve.seed)
    losses = (packed_curve if curve.packed else stock_curve)(curve, task, steps, rank)
    seconds = time.perf_counter() - started
    print(f"{curve.name}, seed {curve.seed}: {seconds:.0f} s, last {losses[-1]:.4f}", flush=True)
    return losses


def packed_curve(curve: Curve, task: Task, steps: Sequence[list[RenderedSample]], rank: Rank) -> list[float]:
    """vl3train's own step: packs, its kernels, DeepSpeed."""
    dtype = torch.bfloat16 if curve.dtype is Dtype.bfloat16 else torch.float32
    hf_model = task.model(dtype, rank.device)
    machine = MachineConfig(dtype=curve.dtype, zero_stage=1, compile_layers=curve.compiled)
    attention, gemm_backend = choose_kernels(machine, hf_model, rank)
    print(f"{curve.name}: attention {attention.name}, gemm_backend {gemm_backend.name}", flush=True)
    kept = Dtype.bfloat16 if curve.rounded else Dtype.float32
    optim = OptimConfig(state_dtype=kept, master_dtype=MasterDtype(kept.value))
    engine = Zero(
        PackedModel(hf_model, attention.name, compile_layers=curve.compiled, gemm_backend=gemm_backend.name),
        build_optimizer(parameter_groups(hf_model, RATES, 0.0), optim, rank.device),
        machine=machine,
        optim=optim,
        num_micro_batches=PACKS_A_STEP,
        rank=rank,
    )
    engine.train(True)
    losses = []
    for number, samples in enumerate(steps):
        set_rates(engine.optimizer, rate_factor(number, len(steps), optim))
        result = train_step(
            engine,
            [pack_batch(samples[i::PACKS_A_STEP]) for i in range(PACKS_A_STEP)],
            num_supervised_tokens=count_supervised(samples),
            num_sources=1,
            stop_requested=False,
        )
        losses.append(result.loss)
    return losses


def stock_curve(curve: Curve, task: Task, steps: Sequence[list[RenderedSample]], rank: Rank) -> list[float]:
    """transformers' forward on one sample at a time: no padding, no packing; float32 masters under plain AdamW."""
    dtype = torch.bfloat16 if curve.dtype is Dtype.bfloat16 else torch.float32
    hf_model = task.model(dtype, rank.device)
    optim = OptimConfig()
    engine = PlainEngine(hf_model, parameter_groups(hf_model, RATES, 0.0), optim, rank)
    engine.train(True)
    losses = []
    for number, samples in enumerate(steps):
        set_rates(engine.optimizer, rate_factor(number, len(steps), optim))
        total = torch.zeros((), dtype=torch.float64, device=rank.device)
        for sample in reversed(samples) if curve.turned else samples:
            inputs = padded_inputs([sample], rank.device, task.video_token_id)
            loss = full_loss(hf_model, inputs) / count_supervised(samples)
            engine.backward(loss)
            total += loss.detach()
        engine.step(total.reshape(1)).wait()
        losses.append(float(total))
    return losses


def count_supervised(samples: Sequence[RenderedSample]) -> int:
    """Supervised tokens of some samples."""
    return sum(int((sample.labels != IGNORE_INDEX).sum()) for sample in samples)


if __name__ == "__main__":
    main()
