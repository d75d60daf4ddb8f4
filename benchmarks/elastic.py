"""Runs that go on with other ranks and ZeRO stages, and what a save costs.

    python -m benchmarks.elastic changes [--work DIR] [--quick]
    python -m benchmarks.elastic saves ROW [--tiny]

Changes take four processes on the CPU, and 20 minutes on two cores. ROW is one of benchmarks/gpu/rows.py that runs the
train command, as 2b_train_command.

- changes: each kind of training goes from 4 ranks to 2, 1 and 4 again, each time in another ZeRO stage where it has
  one, a step in each layout. A change is *equal* where loss and norm of the next step are those of a run that stayed
  on one rank: to five digits in float32, to 5 % in bfloat16, whose sums round otherwise.
- saves: the train command, twice: saved while training goes on, far enough apart that a save is written before the next
  one, and saved while training waits. The stall is the ``save_seconds`` of the second save. AdamW's moments stay on
  the GPU: a host of 128 GiB has no room for them beside a copy and two checkpoints.

Figures go to benchmarks/results/elastic.jsonl; ``--quick`` and ``--tiny`` keep none.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.figures import RESULTS, Figures
from benchmarks.gpu.command import prepare_run, start_ranks, watch
from benchmarks.gpu.rows import ROWS
from benchmarks.gpu.rows import tiny as make_tiny
from benchmarks.kills.place import LONGEST_SECONDS, Place, make_place
from tests.engine.jobs import start_job
from vl3train.contracts.exit_codes import STOPPED

LORA = ["adapter=lora", "adapter.rank=4", "adapter.modules_to_save=[projector]"]
BFLOAT16 = ["machine.dtype=bfloat16"]
CHAINS: dict[str, tuple[list[str], list[tuple[int, int]], float]] = {
    # options; ranks and ZeRO stage of each launch; how near the losses are
    "full, float32": ([], [(4, 1), (2, 3), (1, 0), (4, 2)], 1e-5),
    "full, bfloat16": (BFLOAT16, [(4, 2), (2, 1), (1, 3), (4, 1)], 0.05),
    "LoRA": (LORA, [(4, 3), (2, 2), (1, 1), (4, 3)], 1e-5),
    "moments on the host": (
        [*BFLOAT16, "machine.offload_optimizer=true"],
        [(4, 1), (2, 1), (1, 1), (4, 1)],
        0.05,
    ),
    "split masters": (
        [*BFLOAT16, "machine.offload_optimizer=true", "optim.master_dtype=split"],
        [(4, 1), (2, 1), (1, 1), (4, 1)],
        0.05,
    ),
}
SAVE_STEPS = {"false": 2, "true": 24}
"""Steps between saves, by run.save_in_background: 31 GB of the 2B took less than 24 steps of two seconds to write."""


def main() -> int:
    """Measure; returns 1 where a change was not equal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    changes = parts.add_parser("changes")
    changes.add_argument("--work", type=Path, help="a folder that stays")
    changes.add_argument("--quick", action="store_true", help="the first kind only, from one rank to two")
    saves = parts.add_parser("saves")
    saves.add_argument("row", choices=[name for name, row in ROWS.items() if row.way == "command"])
    saves.add_argument("--tiny", action="store_true", help="the debug model, on the CPU")
    args = parser.parse_args()
    if args.part == "saves":
        return measure_saves(args.row, tiny=args.tiny)
    return measure_changes(args.work or Path(tempfile.mkdtemp(prefix="vl3train-elastic-")), quick=args.quick)


def measure_changes(folder: Path, *, quick: bool) -> int:
    """Every chain, and what was equal."""
    folder.mkdir(parents=True, exist_ok=True)
    place = make_place(folder)
    start = [*place.options(), "run.num_steps=1", "step.global_packs=4"]
    launch(place, [*start, f"run.output_dir={folder / 'start'}"], 1)
    weights = folder / "start" / "checkpoints" / "step_00000001" / "weights"
    tried = equal = 0
    for number, (kind, (options, layouts, near)) in enumerate(CHAINS.items()):
        layouts = [(1, 1), (2, 3)] if quick else layouts
        if quick and number:
            break
        words = [
            *(word for word in start if not word.startswith(("stage=", "run.num_steps="))),
            *(
                "stage=3",
                f"stage.init_from={weights}",
                "run.evaluate_steps=0",
                f"run.num_steps={len(layouts)}",
            ),
            *options,
        ]
        straight, moved = folder / f"{number}-straight", folder / f"{number}-moved"
        for one in (straight, moved):
            shutil.rmtree(one, ignore_errors=True)
        launch(place, [*words, f"run.output_dir={straight}"], 1)
        for number_done, (ranks, zero_stage) in enumerate(layouts, start=1):
            more = [f"machine.zero_stage={zero_stage}", "run.stop_after_steps=1", f"run.output_dir={moved}"]
            launch(place, [*words, *more], ranks, wanted=0 if number_done == len(layouts) else STOPPED)
        wanted, found = figures_of(straight), figures_of(moved)
        for step in range(1, len(layouts)):
            is_equal = found[step] is not None and all(
                abs(mine - its) <= near * abs(its)
                for mine, its in zip(found[step], wanted[step], strict=True)
            )
            tried, equal = tried + 1, equal + is_equal
            print(
                f"| {kind} | {told(layouts[step - 1])} -> {told(layouts[step])} | "
                f"{found[step][0]:.6f} | {wanted[step][0]:.6f} | {'equal' if is_equal else 'NOT EQUAL'} |",
                flush=True,
            )
    figures = Figures("elastic-changes", keep=False, packages=("torch", "deepspeed", "transformers"))
    figures.file = None if quick else RESULTS / "elastic.jsonl"
    figures.add("elastic_changes_tried", tried, "1", "higher", aim=12)
    figures.add("elastic_changes_equal", equal, "1", "higher", aim=tried)
    return int(equal < tried)


def launch(place: Place, words: list[str], ranks: int, *, wanted: int = 0) -> None:
    """One launch of the train command; raises RuntimeError where its exit code is not ``wanted``."""
    log = place.folder / "launches.log"
    with log.open("a") as file:
        process, _ = start_job(
            place.python,
            "tests.engine.planted",
            ["none", "0", *words],
            launcher="vl3train.launch",
            num_ranks=ranks,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        code = process.wait(timeout=LONGEST_SECONDS)
    if code != wanted:
        raise RuntimeError(f"{ranks} ranks end with {code}: {log.read_text()[-2000:]}")


def told(layout: tuple[int, int]) -> str:
    """A layout for a person."""
    return f"{layout[0]} ranks, ZeRO-{layout[1]}"


def figures_of(run: Path) -> list[tuple[float, float]]:
    """Loss and norm of each step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines]


def measure_saves(name: str, *, tiny: bool) -> int:
    """The train command of a row, saved in the background and not."""
    row = replace(ROWS[name], offload_optimizer=False)
    row = replace(make_tiny(row), attention="reference") if tiny else row
    device = torch.device("cpu" if tiny else "cuda")
    figures = Figures("elastic-saves", keep=False, packages=("torch", "deepspeed", "transformers"))
    figures.file = None if tiny else RESULTS / "elastic.jsonl"
    stalls = {}
    with tempfile.TemporaryDirectory() as folder:
        words = prepare_run(row, device, Path(folder))
        files = list((Path(folder) / "weights").glob("*.safetensors"))
        num_parameters = sum(path.stat().st_size for path in files) // 2
        for background, save_steps in SAVE_STEPS.items():
            run = Path(folder) / f"run-{background}"
            more = [f"run.output_dir={run}", f"run.save_in_background={background}", "run.keep_checkpoints=1"]
            processes = start_ranks([*words, *more, f"run.save_steps={save_steps}"], row.ranks)
            try:
                for _ in watch(run / "metrics.jsonl", 2 * save_steps + 1, processes):
                    pass
            finally:
                for process in processes:
                    process.kill()
                    process.wait()
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            waited = [line["save_seconds"] for line in lines if line["save_seconds"]]
            steps = sorted(line["step_seconds"] for line in lines[1:])
            print(
                f"background={background}: waited {waited}, steps of {steps[len(steps) // 2]:.2f} s",
                flush=True,
            )
            stalls[background] = waited[1]
            checkpoint = min((run / "checkpoints").glob("step_????????"))
            size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
            shutil.rmtree(run)
    note = f"row {name}; the first save stalls {waited[0]:.2f} s"
    figures.add("save_stall_seconds_2b", stalls["true"], "s", "lower", note, aim=2)
    ratio = stalls["false"] / stalls["true"]
    note = f"run.save_in_background=false: {stalls['false']:.1f} s"
    figures.add("save_stall_ratio", ratio, "1", "higher", note, aim=10)
    figures.add("checkpoint_bytes_per_parameter", size / num_parameters, "byte", "lower", f"row {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
