"""A disk that does not take a checkpoint or a log ends no training; damage sends a run back, and nothing is lost."""

from __future__ import annotations

import contextlib
import json
import shutil

import pytest

from tests.contracts.full_disk import files_of_at_most
from tests.engine.runs import figures, run, weights
from vl3train.engine import loop
from vl3train.engine.checkpoints import saver
from vl3train.engine.held_out import in_run
from vl3train.engine.held_out.evaluations_file import read_evaluations
from vl3train.engine.ranks import OneRankError, RunError


@pytest.fixture(scope="module")
def words(demo_words):
    return [*demo_words, "stage=1", "run.num_steps=5", "run.evaluate_at_end=false"]


@pytest.fixture(scope="module")
def straight(words, tmp_path_factory):
    return run([*words, f"run.output_dir={tmp_path_factory.mktemp('straight')}"])


def full_at(steps, monkeypatch, size=20_000):
    """Let the saves after these steps find the disk full."""
    write = saver.write_checkpoint

    def write_checkpoint(checkpoints, snapshot, **settings):
        with files_of_at_most(size) if snapshot.step in steps else contextlib.nullcontext():
            return write(checkpoints, snapshot, **settings)

    monkeypatch.setattr(saver, "write_checkpoint", write_checkpoint)


def steps_of(folder):
    return sorted(path.name[-1] for path in (folder / "checkpoints").glob("step_*"))


def test_a_full_disk_keeps_the_old_checkpoint_and_the_run_goes_on(
    words, straight, tmp_path, monkeypatch, capsys
):
    full_at({4}, monkeypatch)
    run([*words, f"run.output_dir={tmp_path}", "run.keep_checkpoints=9"])
    said = capsys.readouterr().out
    assert "could not be written" in said
    assert "the newest checkpoint is that of step 2. The run goes on and tries again" in said
    assert steps_of(tmp_path) == ["2", "5"], "nothing is left of the one of step 4"
    assert figures(tmp_path) == figures(straight)


def test_where_the_last_save_fails_the_run_ends_with_the_reason_and_resumes(
    words, straight, tmp_path, monkeypatch
):
    full_at({5}, monkeypatch)
    with pytest.raises(
        RunError, match=r"could not be written.*newest checkpoint is that of step 4"
    ) as caught:
        run([*words, f"run.output_dir={tmp_path}"])
    assert "Free disk space and start again" in str(caught.value)
    assert not (tmp_path / "finished.json").exists()
    monkeypatch.undo()
    run([*words, f"run.output_dir={tmp_path}"])
    assert figures(tmp_path) == figures(straight)
    assert len((tmp_path / "metrics.replaced.jsonl").read_text().splitlines()) == 1, "step 5 was done twice"


def test_figures_that_the_disk_does_not_take_come_later(words, straight, tmp_path, monkeypatch, capsys):
    log_step = loop.log_step

    def log(run, step_batches, *more):
        with files_of_at_most(1000) if step_batches.cursor.step in (2, 3) else contextlib.nullcontext():
            log_step(run, step_batches, *more)

    monkeypatch.setattr(loop, "log_step", log)
    run([*words, f"run.output_dir={tmp_path}"])
    assert figures(tmp_path) == figures(straight)
    said = capsys.readouterr().out
    assert "metrics.jsonl cannot be written" in said
    assert "is written again, with the 3 lines that waited" in said


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_folder_that_is_moved_away_is_told_and_may_come_back(
    words, straight, tmp_path, monkeypatch, capsys, comes_back
):
    """It is away at the save and the evaluation after step 2."""
    folder, away = tmp_path / "run", tmp_path / "away"
    log_step = loop.log_step

    def log(run, step_batches, *more):
        if step_batches.cursor.step == 1:
            folder.rename(away)
        if step_batches.cursor.step == 3 and comes_back:
            away.rename(folder)
        log_step(run, step_batches, *more)

    monkeypatch.setattr(loop, "log_step", log)
    words = [*words, f"run.output_dir={folder}", "run.evaluate_steps=2"]
    if comes_back:
        run(words)
        assert figures(folder) == figures(straight)
        assert steps_of(folder) == ["4", "5"]
        assert [line["step"] for line in read_evaluations(folder / "evaluations.jsonl")] == [4]
    else:
        with pytest.raises(
            RunError, match=r"moved or deleted, .*Move it back, and give the same command again"
        ):
            run(words)
        assert not folder.exists()
    said = capsys.readouterr().out
    assert ("is written again, with the 3 lines that waited" in said) is comes_back
    assert said.count("The run goes on") == (3 if comes_back else 5), "lines, and each save and evaluation"


@pytest.mark.parametrize(
    "name", ["engine/state/mp_rank_00_model_states.pt", "random/rank_0.pt", "resume.json", "MANIFEST.json"]
)
def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before(words, straight, tmp_path, name, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(straight, folder)
    (folder / "finished.json").unlink()
    file = folder / "checkpoints" / "step_00000005" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    processor = [folder / "processor" / one for one in ("tokenizer.json", "processor_config.json")]
    for one in processor:
        one.write_bytes(one.read_bytes()[:-20])
    run([*words, f"run.output_dir={folder}"])
    said = capsys.readouterr().out
    assert all(f"{one.name} has" in said for one in processor)
    assert "processor is written anew, with the tokenizer of " in said
    assert all(one.read_bytes() == (straight / "processor" / one.name).read_bytes() for one in processor)
    assert "step_00000005 is not used: " in said
    assert name in said
    assert "resumed after step 4" in said
    assert figures(folder) == figures(straight)
    assert weights(folder).keys() == weights(straight).keys()


def test_with_all_checkpoints_damaged_nothing_is_started_over_until_they_are_moved_away(
    words, straight, tmp_path, capsys
):
    folder = tmp_path / "copy"
    shutil.copytree(straight, folder)
    for file in folder.glob("checkpoints/step_*/resume.json"):
        file.write_text(file.read_text().replace("cursor", "curser"))
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(RunError, match="none of the checkpoints"):
        run([*words, f"run.output_dir={folder}"])
    assert (folder / "metrics.jsonl").read_bytes() == before
    shutil.rmtree(folder / "checkpoints")
    run([*words, f"run.output_dir={folder}"])
    said = " ".join(capsys.readouterr().out.split())
    assert "there is no checkpoint: the run starts over from its first step. 5 lines of figures" in said
    assert figures(folder) == figures(straight)


def test_an_evaluation_that_cannot_be_written_comes_later(words, tmp_path, monkeypatch, capsys):
    """The disk is full when the first shall be written; the file is damaged before the second, and moved away then."""
    record, calls = in_run.record_evaluation, []

    def disturbed(path, **entry):
        calls.append(entry["step"])
        if calls == [1, 1, 2]:
            path.write_text(path.read_text() + "{")
        if calls == [1, 1, 2, 2]:
            path.unlink()
        with files_of_at_most(0) if len(calls) == 1 else contextlib.nullcontext():
            record(path, **entry)

    monkeypatch.setattr(in_run, "record_evaluation", disturbed)
    run([*words, f"run.output_dir={tmp_path}", "run.num_steps=3", "run.evaluate_steps=1"])
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "evaluations.jsonl cannot be written: File too large. The run goes on; 1 evaluation in memory" in said
    )
    assert "evaluations.jsonl is damaged: line 2 is no evaluation" in said
    assert "no longer count. The run goes on; 1 evaluation in memory" in said
    assert [line["step"] for line in read_evaluations(tmp_path / "evaluations.jsonl")] == [2]
    assert (tmp_path / "finished.json").exists()


def test_a_start_on_a_full_disk_names_the_file(words, straight, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(straight, folder)
    (folder / "finished.json").unlink()
    before = (folder / "config.yaml").read_bytes()
    with (
        files_of_at_most(200),
        pytest.raises(OneRankError, match=r"copy/config.yaml cannot be written: File too"),
    ):
        run([*words, f"run.output_dir={folder}"])
    assert (folder / "config.yaml").read_bytes() == before


def test_damaged_evaluations_are_told(words, straight, tmp_path):
    """They choose the best checkpoint."""
    folder = tmp_path / "copy"
    shutil.copytree(straight, folder)
    (folder / "finished.json").unlink()
    whole = '{"stage": 1, "step": 2, "when": "step", "sources": {}}\n'
    (folder / "evaluations.jsonl").write_text(whole + whole[:20])
    with pytest.raises(
        RunError, match=r"evaluations.jsonl is damaged: line 2 is no evaluation .* move it away"
    ):
        run([*words, f"run.output_dir={folder}"])
    (folder / "evaluations.jsonl").unlink()
    (folder / "evaluations.jsonl").mkdir()
    with pytest.raises(OneRankError, match=r"evaluations.jsonl: Is a directory. Mend that and give the same"):
        run([*words, f"run.output_dir={folder}"])


def test_a_finished_run_that_shall_do_more_is_no_longer_finished(words, straight, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(straight, folder)
    longer = [*words, f"run.output_dir={folder}", "run.num_steps=7", "optim.schedule=constant"]
    run([*longer, "run.stop_after_steps=1"])
    assert not (folder / "finished.json").exists()
    run(longer)
    assert json.loads((folder / "finished.json").read_text())["run"]["num_steps"] == 7
