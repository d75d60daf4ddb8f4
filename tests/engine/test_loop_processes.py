"""Runs of two real processes, killed or asked to stop, go on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from tests.engine.jobs import start_job
from tests.engine.planted import PLANTED_AT
from tests.engine.runs import figures, run


@pytest.mark.two_processes
def test_killed_in_stage_3_and_started_again_the_log_is_that_of_a_run_never_killed(
    warm_python, demo_words, tmp_path
):
    """All its processes at once, in the moment before its second checkpoint gets its name."""
    words = [*demo_words, "run.evaluate_at_end=false"]
    stage1 = run([*words, "stage=1", f"run.output_dir={tmp_path / 'stage1'}", "run.num_steps=1"])
    words += ["stage=3", f"stage.init_from={stage1 / 'checkpoints/step_00000001/weights'}"]
    words += ["run.num_steps=9", "data.num_workers=1"]
    straight = [*words, f"run.output_dir={tmp_path / 'straight'}"]
    process, _ = start_job(warm_python, "vl3train.train", straight)
    assert process.wait(timeout=400) == 0
    killed = [*words, f"run.output_dir={tmp_path / 'killed'}"]
    at = {PLANTED_AT: str(tmp_path / "mark")}
    planted = ["kill_all@rename", "0", *killed]
    process, _ = start_job(warm_python, "tests.engine.planted", planted, environment=at)
    process.wait(timeout=400)
    assert (tmp_path / "killed/checkpoints/step_00000004.partial").exists(), "all of it, but for its name"
    assert len(figures(tmp_path / "killed")) < 9, "it was killed before it was done"
    process, _ = start_job(warm_python, "vl3train.train", killed)
    assert process.wait(timeout=400) == 0
    assert figures(tmp_path / "killed", "learning_rates") == figures(tmp_path / "straight", "learning_rates")


@pytest.mark.long
@pytest.mark.two_processes
def test_adapters_on_4_bits_train_alike_on_two_ranks_that_share_gradients_and_on_one(
    warm_python, demo_words, tmp_path
):
    words = [*demo_words, "run.evaluate_at_end=false"]
    stage1 = run([*words, "stage=1", f"run.output_dir={tmp_path / 'stage1'}", "run.num_steps=1"])
    words += ["stage=3", f"stage.init_from={stage1 / 'checkpoints/step_00000001/weights'}", "run.num_steps=3"]
    words += ["adapter=lora", "adapter.rank=8", "adapter.base_4bit=nf4", "machine.zero_stage=2"]
    alone = run([*words, f"run.output_dir={tmp_path / 'alone'}"])
    process, _ = start_job(warm_python, "vl3train.train", [*words, f"run.output_dir={tmp_path / 'two'}"])
    assert process.wait(timeout=400) == 0
    found, wanted = (
        [
            [json.loads(line)[name] for name in ("loss", "grad_norm")]
            for line in (out / "metrics.jsonl").open()
        ]
        for out in (tmp_path / "two", alone)
    )
    assert len(found) == 3
    assert found == [pytest.approx(line, rel=1e-4) for line in wanted]


@pytest.mark.two_processes
@pytest.mark.parametrize("warm", [True, pytest.param(False, marks=pytest.mark.long)], ids=["warm", "anew"])
def test_asked_to_stop_under_torchrun_it_saves(warm_python, demo_words, tmp_path, warm):
    """Under torchrun itself, which sends SIGTERM to the processes of each rank, its loader's workers among them."""
    python = warm_python if warm else [sys.executable]
    words = [*demo_words, "stage=1", f"run.output_dir={tmp_path}", "data.num_workers=1", "run.num_steps=200"]
    words += ["run.save_steps=1000", "run.evaluate_at_end=false", "step.global_packs=4"]
    process, _ = start_job(python, "vl3train.train", words, stdout=subprocess.PIPE)
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=400)
    assert process.returncode == 1, "torchrun has one code for all ends but the good one"
    done = len(figures(tmp_path))
    assert f"stopped on request after step {done}; give the same command again to resume" in told
    assert (tmp_path / "checkpoints" / "latest").read_text() == f"step_{done:08d}"
