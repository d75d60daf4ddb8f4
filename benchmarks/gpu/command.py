"""The row that is nearest to what users run: shards on disk, loader, encoder, optimizer, logging, all in."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.data.drawn_shards import write_recipe, write_tokenizer
from benchmarks.gpu.model import build_model, mix_of
from benchmarks.gpu.rows import Row
from vl3train.model.weights.hf_folder import save_weights
from vl3train.model.weights.processor import build_processor

WARM_UP_STEPS = 2
SAMPLES_A_PACK = 17
"""At most, of 16 384 tokens; more samples than the steps need cost seconds."""
POLL_SECONDS = 0.005


def measure_command(
    row: Row, device: torch.device, tell: Callable[[dict[str, Any]], None] = lambda _: None
) -> dict[str, Any]:
    """Run ``vl3train train`` on drawn shards; figures from the wall-clock between lines of its metrics.jsonl.

    ``tell`` gets the figures so far after each step: what a time limit cuts off is not lost. What the run says is
    shown as it comes, for the same reason.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = prepare_run(row, device, Path(folder))
        metrics = Path(folder) / "run" / "metrics.jsonl"
        times: list[float] = []
        found: dict[str, Any] = {}
        processes = start_ranks(words, row.ranks)
        try:
            for late in watch(metrics, WARM_UP_STEPS + row.steps, processes):
                times.append(late)
                if len(times) > WARM_UP_STEPS:
                    lines = metrics.read_text().splitlines()[: len(times)]
                    found = figures(times, [json.loads(line) for line in lines], row)
                    tell(found)
        finally:
            for process in processes:  # the run's last act would be a checkpoint of 24 GB
                process.kill()
                process.wait()
        return found


def start_ranks(words: list[str], ranks: int) -> list[subprocess.Popen[bytes]]:
    """What torchrun would start. It would give each a session of its own, and they would outlive this row."""
    command = [sys.executable, "-u", "-m", "vl3train.train", *words]
    of_host = {**os.environ, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [
        subprocess.Popen(command, env={**of_host, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]


def prepare_run(row: Row, device: torch.device, folder: Path) -> list[str]:
    """Write shards and a checkpoint of random weights; the words of the run that trains on them."""
    started = time.perf_counter()
    small = row.model == "tiny"
    cores = len(os.sched_getaffinity(0))
    num_samples = (row.steps + WARM_UP_STEPS) * row.packs_a_step * row.ranks * SAMPLES_A_PACK
    recipe = write_recipe(
        folder / "drawn",
        num_samples,
        mix_of(row.model),
        image_merge_size=row.image_merge_size,
        max_tokens=row.max_tokens * 3 // 4,
        processes=1 if small else cores,
    )
    write_tokenizer(folder / "tokenizer")
    drawn = time.perf_counter()
    if device.type == "cpu":
        write_weights(row.model, "cpu", folder)
    else:  # in a process of its own: what it holds of the GPU goes with it
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            pool.submit(write_weights, row.model, str(device), folder).result()
    print(f"shards in {drawn - started:.1f} s, weights in {time.perf_counter() - drawn:.1f} s", flush=True)
    tracker = "wandb" if importlib.util.find_spec("wandb") else "none"
    workers = 0 if small else max(1, min(12, cores - 3))
    return [
        "stage=2",
        f"stage.image_merge_size={row.image_merge_size}",
        f"stage.init_from={folder / 'weights'}",
        "model=debug" if small else f"model={row.model}",
        f"data.root={folder}",
        f"data.recipe={recipe}",
        f"data.plan_cache={folder / 'plans'}",
        f"data.num_workers={workers}",
        f"data.max_visual_tokens={row.max_tokens * 5 // 8}",
        *(["data.max_frames=180", "data.video_min_pixels=3136"] if small else []),
        f"step.max_tokens={row.max_tokens}",
        f"step.max_patches={row.max_tokens * 4}",
        f"step.global_packs={row.packs_a_step * row.ranks}",
        "machine=cpu" if device.type == "cpu" else "machine=one_gpu",
        f"machine.dp_size={row.ranks}",
        "machine.dtype=bfloat16",
        f"machine.zero_stage={row.zero_stage}",
        f"machine.offload_optimizer={str(row.offload_optimizer).lower()}",
        f"optim.state_dtype={row.state_dtype}",
        f"optim.master_dtype={row.master_dtype}",
        f"machine.attention={row.attention}",
        f"machine.memory={row.memory if device.type == 'cuda' else 'given'}",
        f"machine.recompute_vision={row.recompute_vision}",
        f"machine.recompute_language={row.recompute_language}",
        f"machine.compile_layers={str(row.compile_layers).lower()}",
        f"tracking={tracker}",
        *(["tracking.mode=offline"] if tracker == "wandb" else []),
        f"run.output_dir={folder / 'run'}",
        "run.num_steps=1000",
        "run.save_steps=1000",
        "run.evaluate_at_end=false",
    ]


def write_weights(size: str, device: str, folder: Path) -> None:
    """A checkpoint of random weights, with the tokenizer of the drawn words."""
    model, processor = build_model(size, torch.device(device)), build_processor(folder / "tokenizer")
    model.config.image_token_id, model.config.video_token_id = (
        processor.image_token_id,
        processor.video_token_id,
    )
    save_weights(model, processor, folder / "weights")


def watch(metrics: Path, wanted: int, processes: list[subprocess.Popen[bytes]]) -> Iterator[float]:
    """When each of the first ``wanted`` lines came, in seconds, as it comes."""
    seen = 0
    while seen < wanted:
        time.sleep(POLL_SECONDS)
        codes = [process.poll() for process in processes]  # before the lines: what a rank wrote last counts
        written = min(wanted, metrics.read_bytes().count(b"\n") if metrics.exists() else 0)
        for _ in range(seen, written):
            yield time.perf_counter()
        seen = written
        if any(code is not None for code in codes) and seen < wanted:
            raise RuntimeError(f"a rank ended (exit codes {codes}) after {seen} of {wanted} steps")


def figures(times: list[float], lines: list[dict[str, Any]], row: Row) -> dict[str, Any]:
    """Figures of the steps after the warm-up."""
    counted = lines[WARM_UP_STEPS:]
    total = times[-1] - times[WARM_UP_STEPS - 1]
    flops = sum(line["useful_tflops"] * line["step_seconds"] for line in counted)  # of rank 0
    waited = sum(line["data_wait_fraction"] * line["step_seconds"] for line in counted)
    tokens, patches = (sum(line[key] for line in counted) for key in ("tokens", "patches"))
    return {
        "tflops": flops / total,
        "seconds_a_pack": total / len(counted) / row.packs_a_step,
        "work_a_pack_tflop": flops / len(counted) / row.packs_a_step,
        "tokens_a_second": tokens / total,
        "patches_a_second": patches / total,
        "peak_gib": lines[-1]["memory_gib"],
        "data_wait_fraction": waited / total,
        "recompiles": sum(line["recompiles"] for line in counted),
        "fill": [line["fill"] for line in counted],
        "step_seconds": [late - early for early, late in pairwise(times[WARM_UP_STEPS - 1 :])],
        "step_tflops": [line["useful_tflops"] for line in counted],
        "loss": lines[-1]["loss"],
        "skipped_samples": sum(line["failed_samples"] for line in lines),
        "wandb": importlib.util.find_spec("wandb") is not None,
    }
