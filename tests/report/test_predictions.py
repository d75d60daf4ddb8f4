"""The report shows what was answered to the same question step by step, with the question's own pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.data.shards_fixture import make_source
from vl3train.report.cards import pictures_of, question_card
from vl3train.report.predictions import STEPS_SHOWN, in_turn, predictions_of, shown_questions
from vl3train.report.run_log import RunLog
from vl3train.scoring.predictions import Prediction, write_predictions


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("held_out")
    make_source(root / "test", images=2, clips=1, texts=1, seed=4, per_shard=3)
    (root / "recipe.yaml").write_text(
        "name: small\nabout: tests\nsources:\n  - {name: test, held_out: test/shards}\n"
    )
    return root


def make_run(folder, data, answers, *, steps=(0, 10), scores=None):
    """A run that said ``answers[key][at]`` after each of the steps."""
    folder.mkdir()
    config = {"data": {"root": str(data), "recipe": str(data / "recipe.yaml")}, "stage": {}}
    (folder / "config.yaml").write_text(json.dumps(config))
    (folder / "predictions").mkdir()
    for at, step in enumerate(steps):
        predictions = [
            Prediction(
                key=f"test/{key}", answer_number=0, source="test", question=f"{key}?", reference="yes",
                prediction=said[at], is_cut=False, scores=(scores or {}).get(key, {}),
            )
            for key, said in answers.items()
        ]  # fmt: skip
        write_predictions(folder / "predictions" / f"step_{step:06d}.jsonl", predictions)
    return RunLog(name=folder.name, steps=[{"step": 10, "loss": 1.0}], folder=folder)


def test_right_and_wrong_are_told_by_the_last_answer_of_all_runs(data, tmp_path):
    keys = sorted(member_keys(data))
    learned, lost = keys[:2]
    one = make_run(tmp_path / "one", data, {learned: ["no", "yes"], lost: ["yes", "no"]})
    two = make_run(tmp_path / "two", data, {learned: ["no", "yes"], lost: ["yes", "yes"]})
    shown, num_right, num_wrong = shown_questions([one])
    assert (num_right, num_wrong) == (1, 1)
    assert [(found.last.prediction.key, found.last.is_right) for found in shown] == [
        (f"test/{lost}", False), (f"test/{learned}", True),
    ]  # fmt: skip
    both, num_right, num_wrong = shown_questions([one, two])
    assert (num_right, num_wrong) == (2, 0)
    steps = [(answer.run, answer.step, answer.is_right) for answer in both[0].answers]
    assert steps == [("one", 0, False), ("one", 10, True), ("two", 0, False), ("two", 10, True)]
    card = question_card(both[0], several_runs=True)
    assert "two, step 10" in card


def member_keys(data):
    """shard/member of each sample with a picture or clip."""
    from vl3train.data.shards.tar_members import read_members

    return {
        f"{shard.stem}/{member.name.partition('.')[0]}"
        for shard in (data / "test" / "shards").glob("*.tar")
        for member in read_members(shard)
        if not member.name.endswith(".json")
    }


def test_pictures_are_the_samples_own_and_may_be_gone(data, tmp_path):
    keys = sorted(member_keys(data))
    run = make_run(tmp_path / "run", data, {key: ["no", "no"] for key in [*keys, "shard-000000/gone", "x/y"]})
    shown, _, _ = shown_questions([run])
    media = {found.last.prediction.key.removeprefix("test/"): found.media for found in shown}
    assert [len(media[key]) for key in keys] == [1, 1, 1]
    assert media["shard-000000/gone"] == media["x/y"] == []
    counts = sorted(len(pictures_of(media[key][0])) for key in keys)
    assert counts == [1, 1, 4]
    card = question_card(shown[0], several_runs=False)
    assert "<img" in card or not shown[0].media
    (tmp_path / "run" / "config.yaml").write_text(json.dumps({"data": {"recipe": "gone.yaml"}}))
    assert all(found.media == [] for found in shown_questions([run])[0])


def test_few_steps_and_a_score_between_are_shown(data, tmp_path):
    steps = tuple(range(0, 100, 5))
    run = make_run(
        tmp_path / "run",
        data,
        {"a/b": ["no"] * 20},
        steps=steps,
        scores={"a/b": {"anls": 0.62, "exact": 0.0}},
    )
    assert [step for step, _ in predictions_of(run)] == [0, 25, 50, 70, 95]
    assert len(predictions_of(run)) == STEPS_SHOWN
    (shown,), _, _ = shown_questions([run])
    assert not shown.last.is_right
    assert "0.62 no" in question_card(shown, several_runs=False)


def test_sources_come_in_turn_and_changes_first(data, tmp_path):
    answers = {f"{source}/{number}": ["no", "no"] for source in "ab" for number in range(3)}
    answers["b/2"] = ["yes", "no"]
    run = make_run(tmp_path / "run", data, answers)
    _, predictions = predictions_of(run)[0]
    assert len(predictions) == 6
    shown, _, _ = shown_questions([run])
    assert shown[0].last.prediction.key == "test/b/2"
    assert len(in_turn(shown)) == 6
    assert np.isfinite(shown[0].last.score)
