"""Runs of two real processes, killed or asked to stop, go on."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from tests.engine.jobs import kill_job, start_job
from tests.engine.runs import figures, run


@pytest.mark.two_processes
def test_killed_in_stage_3_and_started_again_the_log_is_that_of_a_run_never_killed(
    warm_python, demo_words, tmp_path
):
    words = [*demo_words, "run.evaluate_at_end=false"]
    stage1 = run([*words, "stage=1", f"run.output_dir={tmp_path / 'stage1'}", "run.num_steps=1"])
    words += ["stage=3", f"stage.init_from={stage1 / 'checkpoints/step_00000001/weights'}"]
    words += ["run.num_steps=9", "data.num_workers=1"]
    straight = [*words, f"run.output_dir={tmp_path / 'straight'}"]
    process, _ = start_job(warm_python, "vl3train.train", straight)
    assert process.wait(timeout=240) == 0
    killed = [*words, f"run.output_dir={tmp_path / 'killed'}"]
    process, job = start_job(warm_python, "vl3train.train", killed)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 5:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    kill_job(job)
    process.wait()
    assert len(figures(tmp_path / "killed")) < 9, "it was killed before it was done"
    process, _ = start_job(warm_python, "vl3train.train", killed)
    assert process.wait(timeout=240) == 0
    assert figures(tmp_path / "killed", "learning_rates") == figures(tmp_path / "straight", "learning_rates")


@pytest.mark.two_processes
def test_asked_to_stop_under_torchrun_it_saves(demo_words, tmp_path):
    """Under torchrun itself, which sends SIGTERM to the processes of each rank, its loader's workers among them. All
    start anew here."""
    words = [*demo_words, "stage=1", f"run.output_dir={tmp_path}", "data.num_workers=1", "run.num_steps=200"]
    words += ["run.save_steps=1000", "run.evaluate_at_end=false", "step.global_packs=4"]
    process, _ = start_job([sys.executable], "vl3train.train", words, stdout=subprocess.PIPE)
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 1, "torchrun has one code for all ends but the good one"
    done = len(figures(tmp_path))
    assert f"stopped on request after step {done}; give the same command again to resume" in told
    assert (tmp_path / "checkpoints" / "latest").read_text() == f"step_{done:08d}"
