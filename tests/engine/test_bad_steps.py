"""Runs that meet bad numbers: skipped steps, the way back, and the same bits wherever such a run is stopped."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from tests.engine.bad_numbers import plant
from tests.engine.jobs import start_job
from tests.engine.runs import figures, run
from tests.long import first_of
from vl3train.contracts.bad_step import read_bad_step
from vl3train.engine.bad_steps import limits
from vl3train.engine.ranks import RunError
from vl3train.model.weights.headers.manifest import MANIFEST, digests_of, list_files, manifest_text

NAN = math.nan
NOT_KEPT = ("param_groups", "overflow")
"""Rates belong to a step; and whether the last gradients were not finite, which the next step finds out anew."""


@pytest.fixture(scope="module")
def words(demo_words):
    return [*demo_words, "stage=1", "run.evaluate_at_end=false", "optim.max_skipped_steps=2"]


def strict(path):
    def refuse(text):
        raise AssertionError(f"{path}: {text} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def saved(folder, step):
    """Weights, masters, moments and counts of a checkpoint, as bytes; not the rates, which belong to the step."""
    checkpoint = folder / f"checkpoints/step_{step:08d}"
    found = {path.name: path.read_bytes() for path in checkpoint.glob("weights/*.safetensors")}
    for path in sorted(checkpoint.rglob("*optim_states.pt")):
        state = torch.load(path, weights_only=False)["optimizer_state_dict"]
        found[path.name] = as_bytes({key: value for key, value in state.items() if key not in NOT_KEPT})
    return found


def as_bytes(value):
    if isinstance(value, torch.Tensor):
        return value.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return [(key, as_bytes(one)) for key, one in value.items() if key not in NOT_KEPT]
    return [as_bytes(one) for one in value] if isinstance(value, list | tuple) else str(value)


def test_a_step_that_is_not_finite_is_skipped_told_and_kept(words, tmp_path, monkeypatch, capsys):
    plant({2: NAN}, monkeypatch.setattr)
    words = [*words, "run.save_steps=1", "run.keep_checkpoints=9", "run.log_steps=2"]
    run([*words, f"run.output_dir={tmp_path}", "run.num_steps=4"])
    assert saved(tmp_path, 3) == saved(tmp_path, 2)
    assert saved(tmp_path, 4) != saved(tmp_path, 3)
    lines = strict(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 3, 4], "a skipped step is always logged"
    assert [line.get("skipped", False) for line in lines] == [False, True, False]
    assert (lines[1]["loss"], lines[1]["loss_text"]) == (None, "nan")
    strict_whole = (tmp_path / "bad_steps/step_00000003.json").read_text()
    assert "NaN" not in strict_whole
    bad = read_bad_step(tmp_path / "bad_steps/step_00000003.json")
    assert (bad.step, bad.reason, bad.most_loss) == (3, "loss nan, gradient norm inf", None), (
        "DeepSpeed says inf"
    )
    [wrong] = bad.not_finite
    assert wrong == bad.samples[0]
    assert wrong.supervised_tokens > 0
    assert math.isnan(bad.source_losses[wrong.source])
    assert len(bad.samples) > 1
    told = "gradient norm inf; not finite: the loss of "
    said = capsys.readouterr().out
    assert "step 3 is skipped and changes nothing: loss nan, " in said
    assert told + wrong.key in said
    state = json.loads((tmp_path / "checkpoints/step_00000004/resume.json").read_text())["bad_steps"]
    assert len(state["limits"]["losses"]) == 3, "a skipped step is no part of the limits"


def test_a_spike_is_skipped_once_there_are_limits(words, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "WINDOW", 4)
    plant({1: 1000.0, 4: 1000.0}, monkeypatch.setattr)
    run([*words, f"run.output_dir={tmp_path}", "run.num_steps=6", "optim.spike_limit=30"])
    lines = strict(tmp_path / "metrics.jsonl")
    assert [line.get("skipped", False) for line in lines] == [False] * 4 + [True, False], (
        "no limits at step 2"
    )
    bad = read_bad_step(tmp_path / "bad_steps/step_00000005.json")
    assert bad.loss > bad.most_loss
    assert bad.reason.startswith("loss ")
    assert "over its limit of" in bad.reason


@pytest.mark.parametrize(
    "stops",
    first_of([[2, 4]], [[6], [7]]),  # before the row and within it; within it; behind it
    ids=["one", "others"],
)
def test_a_row_of_bad_steps_sends_the_run_back_and_the_same_from_every_stop(
    words, tmp_path, monkeypatch, capsys, stops
):
    """Steps 6 and 7 are bad: the run goes back to the checkpoint of step 3 and passes over 4 to 7."""
    plant({5: NAN, 6: math.inf}, monkeypatch.setattr)
    words = [*words, "run.num_steps=9", "run.save_steps=3", "run.evaluate_steps=4", "run.best_figure=loss"]
    straight = run([*words, f"run.output_dir={tmp_path / 'straight'}"])
    assert [line["step"] for line in strict(straight / "metrics.jsonl")] == [1, 2, 3, 8, 9]
    assert [line["step"] for line in strict(straight / "metrics.replaced.jsonl")] == [4, 5, 6, 7]
    state = json.loads((straight / "checkpoints/step_00000009/resume.json").read_text())["bad_steps"]
    assert state["passed_over"] == [[3, 7]]
    assert "passes over steps 4 to 7" in capsys.readouterr().out
    assert [line["step"] for line in strict(straight / "evaluations.jsonl")] == [8]
    assert [line["step"] for line in strict(straight / "evaluations.replaced.jsonl")] == [4]
    best = (straight / "best.json").read_text()
    assert [one["step"] for one in json.loads(best)["history"]] == [8], "that of step 4 is undone"
    for stop_after in stops:
        stopped = [*words, f"run.output_dir={tmp_path / f'stopped{stop_after[0]}'}"]
        for steps in stop_after:
            run([*stopped, f"run.stop_after_steps={steps}"])
        resumed = run(stopped)
        assert figures(resumed, "learning_rates") == figures(straight, "learning_rates")
        assert saved(resumed, 9) == saved(straight, 9)
        assert (resumed / "best.json").read_text() == best
    # Its last steps: passed over, they are done.
    monkeypatch.undo()
    plant({7: NAN, 8: NAN}, monkeypatch.setattr)
    ended = run([*words, f"run.output_dir={tmp_path / 'ended'}", "run.save_steps=2"])
    assert (ended / "checkpoints/latest").read_text() == "step_00000009"
    history = json.loads((ended / "best.json").read_text())["history"]
    assert [one["step"] for one in history] == [4], (
        "that of step 8 is undone, and no later one writes the file"
    )


def test_a_second_row_at_the_same_place_ends_the_run_and_says_what_to_do(words, tmp_path, monkeypatch):
    plant(dict.fromkeys(range(4, 9), NAN), monkeypatch.setattr)
    words = [*words, f"run.output_dir={tmp_path}", "run.num_steps=12"]
    for _ in range(2):  # the same command again comes to the same end
        with pytest.raises(
            RunError, match=r"skipped, the last of them step 8\. That is the second"
        ) as caught:
            run(words)
        assert "vl3train inspect --dump" in str(caught.value)


def test_without_a_checkpoint_to_go_back_to_the_run_ends_and_says_the_way_out(words, tmp_path, monkeypatch):
    words = [*words, "run.num_steps=8"]
    plant({0: NAN, 1: NAN}, monkeypatch.setattr)
    with pytest.raises(RunError, match=r"no checkpoint of step 0 or before to go back to.*starts wrong"):
        run([*words, f"run.output_dir={tmp_path / 'first'}"])
    monkeypatch.undo()
    plant({5: NAN, 6: NAN}, monkeypatch.setattr)
    words += [f"run.output_dir={tmp_path / 'later'}", "run.save_steps=100"]
    with pytest.raises(RunError, match=r"Or give the same command with run\.save_steps=3: it starts"):
        run(words)
    done = run([*words, "run.save_steps=3"])
    assert [line["step"] for line in strict(done / "metrics.jsonl")] == [1, 2, 3, 8]


def test_a_run_that_ends_before_a_step_has_trained_is_not_finished(words, tmp_path, monkeypatch):
    """Fewer steps than may be skipped in a row; the same command again comes to the same end."""
    words = [*words, f"run.output_dir={tmp_path}", "run.num_steps=3", "optim.max_skipped_steps=8"]
    plant(dict.fromkeys(range(2), NAN), monkeypatch.setattr)
    run([*words, "run.stop_after_steps=2"])
    monkeypatch.undo()
    plant({2: NAN}, monkeypatch.setattr)
    for _ in range(2):
        with pytest.raises(RunError, match=r"at step 3, and trained nothing: .*look at stage\.init_from"):
            run(words)
        assert not (tmp_path / "finished.json").exists()
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "checkpoints")
    run(words)
    assert (tmp_path / "finished.json").exists()


@pytest.mark.two_processes
def test_bad_numbers_of_one_rank_are_those_of_all_and_the_right_samples_are_named(
    warm_python, words, tmp_path
):
    words = [
        *words,
        f"run.output_dir={tmp_path}",
        "run.num_steps=4",
        "run.save_steps=1",
        "run.keep_checkpoints=9",
    ]
    process, _ = start_job(warm_python, "tests.engine.planted", ["nan", "1", *words])
    assert process.wait(timeout=240) == 0
    assert [line.get("skipped", False) for line in strict(tmp_path / "metrics.jsonl")] == [
        False,
        False,
        True,
        False,
    ]
    assert saved(tmp_path, 3) == saved(tmp_path, 2)
    assert saved(tmp_path, 4) != saved(tmp_path, 3)
    bad = read_bad_step(tmp_path / "bad_steps/step_00000003.json")
    assert {sample.rank for sample in bad.samples} == {0, 1}
    assert [sample.rank for sample in bad.not_finite] == [1]


KINDS = {
    "stage 3": ["machine.zero_stage=3"],
    "no masters": ["machine.dtype=bfloat16", "optim.state_dtype=bfloat16", "optim.master_dtype=bfloat16"],
    "split masters": ["machine.dtype=bfloat16", "machine.offload_optimizer=true", "optim.master_dtype=split"],
    "lora": ["adapter=lora", "adapter.parts=[vision_encoder]", "adapter.rank=2"],
}


@pytest.mark.parametrize(
    "kind",
    first_of("lora", *(kind for kind in KINDS if kind != "lora")),
)
def test_going_back_in_the_process_is_as_a_start_from_the_checkpoint(words, tmp_path, monkeypatch, kind):
    """Step 4 is bad: back to the checkpoint of step 2, and past 3 and 4."""
    words = [*words, *KINDS[kind], "optim.max_skipped_steps=1", "run.num_steps=6"]
    back = tmp_path / "back"
    plant({3: NAN}, monkeypatch.setattr)
    run([*words, f"run.output_dir={back}", "run.keep_checkpoints=9"])
    assert [line["step"] for line in strict(back / "metrics.jsonl")] == [1, 2, 5, 6]
    monkeypatch.undo()
    anew = Path(shutil.copytree(back, tmp_path / "anew"))
    (anew / "finished.json").unlink()
    for name in ("step_00000004", "step_00000006"):
        shutil.rmtree(anew / "checkpoints" / name, ignore_errors=True)
    checkpoint = anew / "checkpoints" / "step_00000002"
    resume = json.loads((checkpoint / "resume.json").read_text())
    resume["bad_steps"]["passed_over"] = [[2, 4]]
    (checkpoint / "resume.json").write_text(json.dumps(resume))
    files = list_files(checkpoint)
    (checkpoint / MANIFEST).write_text(manifest_text(files, digests_of(checkpoint, files)))
    run([*words, f"run.output_dir={anew}"])
    assert figures(anew) == figures(back)
    assert saved(anew, 6) == saved(back, 6)
