"""The quickstart, shortened: the same commands on fewer samples and steps. Two real processes, four stages."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
INSTALLED = Path(sys.executable).parent


@pytest.fixture(scope="module")
def warm_commands(warm_python, tmp_path_factory):
    """A folder for PATH, with ``python`` and ``vl3train`` that need not import everything anew."""
    folder = tmp_path_factory.mktemp("bin")
    for name, words in (("python", []), ("vl3train", ["-m", "vl3train.cli.main"])):
        (folder / name).write_text(f'#!/bin/sh\nexec {shlex.join([*warm_python, *words])} "$@"\n')
        (folder / name).chmod(0o755)
    return folder


def quickstart(out, commands):
    environment = {
        **os.environ,
        "VIRTUAL_ENV": sys.prefix,  # else the script would make an environment of its own
        "PATH": os.pathsep.join([str(commands), str(INSTALLED), os.environ["PATH"]]),
        "OMP_NUM_THREADS": "1",
    }
    command = ["bash", str(ROOT / "scripts/quickstart.sh"), "--fast", "--nproc", "2", "--out", str(out)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def out(tmp_path_factory, warm_commands):
    """What the quickstart left."""
    out = tmp_path_factory.mktemp("out") / "quickstart"
    # The warm ones have set up DeepSpeed for a CPU.
    first = quickstart(out, INSTALLED if torch.cuda.is_available() else warm_commands)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    return out


@pytest.mark.two_processes
def test_it_trains_four_stages_exports_answers_and_reports(out):
    stages = sorted(path.name[0] for path in (out / "runs").iterdir())
    assert stages == ["1", "2", "3", "4"]
    moments = []
    for run in sorted((out / "runs").iterdir()):
        for line in (run / "evaluations.jsonl").read_text().splitlines():
            entry = json.loads(line)
            moments.append((entry["stage"], entry["when"]))
            assert len(entry["sources"]) >= 10, "every task is measured before stage 1 and after every stage"
    assert moments == [(1, "start"), (1, "end"), (2, "end"), (3, "end"), (4, "end")]
    questions = (out / "data" / "questions.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == len(questions)
    assert {"image" in line for line in answers} == {True, False}
    assert any("video" in line for line in answers)
    page = (out / "report" / "report.html").read_text()
    assert page.count("data:image/") > len(answers) // 2
    assert (out / "export" / "model.safetensors").exists()


@pytest.mark.two_processes
@pytest.mark.long
def test_a_second_run_says_what_exists(out, warm_commands):
    """With the installed vl3train; only the Python that checks and launches is a warm one."""
    before = {
        path: path.stat().st_mtime_ns for path in out.rglob("*") if path.suffix in (".safetensors", ".tar")
    }
    (warm_commands / "vl3train").unlink()
    second = quickstart(out, INSTALLED if torch.cuda.is_available() else warm_commands)
    assert second.returncode == 0, second.stdout[-3000:] + second.stderr[-3000:]
    assert second.stdout.count("this run is finished") == 4
    assert "export exists" in second.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before
