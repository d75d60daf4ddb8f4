"""What a build of November 2026 wrote, before options, metrics and folders were renamed, is still read.

``run_before_2026_12`` holds a whole run that was stopped after half of its steps; its README says how it was made.
"""

from __future__ import annotations

import json
import shutil

import pytest

from tests.engine.runs import EARLIER, EARLIER_WORDS, run
from vl3train.contracts.bad_step import numbered_from_1
from vl3train.engine.ranks import RunError
from vl3train.report.page import runs_table
from vl3train.report.run_log import read_run


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy, and the working folder: the run's options name it by relative paths."""
    shutil.copytree(EARLIER, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def as_if_sampled_by_the_rules_of_today(folder):
    """Since then, ``RenderSettings.rules`` was raised: other frames of clips, so no run goes on by itself."""
    with pytest.raises(RunError, match=r"plan\.index: the checkpoint has '956c662976339827'") as refused:
        run(EARLIER_WORDS)
    now = str(refused.value).partition("this run has '")[2][:16]
    stored = folder / "run/checkpoints/step_00000003/resume.json"
    stored.write_text(stored.read_text().replace("956c662976339827", now))


def test_its_checkpoint_is_resumed_and_goes_on_as_the_run_that_was_never_stopped(folder, capsys):
    before = lines(folder / "run/metrics.jsonl")
    as_if_sampled_by_the_rules_of_today(folder)
    run(EARLIER_WORDS)
    assert "resumed after step 3 from run/checkpoints/step_00000003" in capsys.readouterr().out
    straight, resumed = lines(folder / "straight/metrics.jsonl"), lines(folder / "run/metrics.jsonl")
    assert resumed[:3] == [numbered_from_1(line) for line in before]
    # The index of today rejects the two pictures that are cut off; before, they failed in each step that had them.
    # So the steps that follow have other samples, and only the counts of the first three can be compared.
    assert [line["step"] for line in resumed] == [line["step"] + 1 for line in straight] == [1, 2, 3, 4, 5, 6]
    assert [line["failed_samples"] for line in resumed[3:]] == [0, 0, 0]
    assert all("skipped_samples" not in line for line in resumed[3:])
    state = json.loads((folder / "run/checkpoints/step_00000006/resume.json").read_text())
    assert state["failed_samples"]["failed"] == sum(line["skipped_samples"] for line in before) == 2
    assert "bad_samples" not in state
    evaluations = lines(folder / "run/evaluations.jsonl")
    assert [line["when"] for line in evaluations] == ["start", "end"]
    assert evaluations[0] == lines(EARLIER / "run/evaluations.jsonl")[0]
    assert len((folder / "run/ledger.rank0.jsonl").read_text().splitlines()) == 2


def test_its_figures_are_in_a_report():
    problems = []
    log = read_run(EARLIER / "run", problems)
    assert problems == []
    assert [line["failed_samples"] for line in log.steps] == [1, 0, 1]
    assert log.evaluation(first=True)["shape"]["samples"] == 3
    assert "<td>2</td></tr>" in runs_table([log]), "two samples failed"
