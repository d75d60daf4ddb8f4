"""The best checkpoint by a held-out figure, and when a run ends early."""

from __future__ import annotations

import json
import math

import pytest

from vl3train.config.choices import BestFigure
from vl3train.config.schema import RunConfig
from vl3train.engine.best import BEST_FILE, Best, best_checkpoint, start_best


def figures(loss: float, accuracy: float = 0.0):
    return {"a": {"loss": loss, "accuracy": accuracy, "samples": 2, "supervised_tokens": 3}}


def counted(values, figure=BestFigure.loss, patience=None):
    best = Best(figure=figure, patience=patience)
    was_best = [best.count(10 * (i + 1), figures(value, value)) for i, value in enumerate(values)]
    return best, was_best


@pytest.mark.parametrize(
    ("figure", "values", "step", "was_best"),
    [
        (BestFigure.loss, [3.0, 2.0, 2.5, 1.0], 40, [True, True, False, True]),
        (BestFigure.loss, [2.0, 2.0], 10, [True, False]),
        (BestFigure.accuracy, [0.1, 0.6, 0.6, 0.2], 20, [True, True, False, False]),
        (BestFigure.loss, [math.nan, 3.0, math.nan], 20, [False, True, False]),
        (BestFigure.loss, [math.nan], None, [False]),
        (BestFigure.none, [1.0], None, [False]),
    ],
)
def test_the_best_is_the_earliest_of_the_best_figures(figure, values, step, was_best):
    best, found = counted(values, figure)
    assert (best.step, found) == (step, was_best)


def test_a_run_ends_after_so_many_evaluations_that_are_no_better():
    best = Best(figure=BestFigure.loss, patience=2)
    over = []
    for i, value in enumerate([3.0, 2.0, 2.1, 1.9, 2.0, math.nan]):
        best.count(10 * (i + 1), figures(value))
        over.append(best.is_over)
    assert over == [False, False, False, False, False, True]
    assert "the best is 1.9000 after step 40, 2 of 2 evaluations ago" in best.told()
    assert not counted([1.0, 2.0, 3.0])[0].is_over


def test_a_run_that_goes_back_forgets_what_came_later():
    best, _ = counted([3.0, 1.0, 2.0])
    assert best.count(20, figures(2.5))
    assert best.history == [(10, 3.0), (20, 2.5)]


def test_the_figure_is_of_all_samples_together():
    two = figures(1.0, 0.5) | {"b": {"loss": 4.0, "accuracy": 1.0, "samples": 6, "supervised_tokens": 1}}
    for figure, value in ((BestFigure.loss, 1.75), (BestFigure.accuracy, 0.875)):
        best = Best(figure=figure)
        best.count(5, two)
        assert best.history == [(5, value)]


def test_a_resumed_run_has_the_history_up_to_its_step(tmp_path):
    lines = [{"step": 0, "when": "start", "sources": figures(0.1)}]
    lines += [{"step": step, "when": "step", "sources": figures(3 - step / 10)} for step in (10, 20, 30)]
    best = start_best(RunConfig(best_figure=BestFigure.loss, patience=3), lines, 20)
    assert best.history == [(10, 2.0), (20, 1.0)]
    best.write(tmp_path)
    assert json.loads((tmp_path / BEST_FILE).read_text()) == {
        "figure": "loss",
        "step": 20,
        "value": 1.0,
        "checkpoint": "checkpoints/step_00000020",
        "history": [{"step": 10, "value": 2.0}, {"step": 20, "value": 1.0}],
    }
    assert best_checkpoint(tmp_path) is None, "it was deleted"
    (tmp_path / "checkpoints" / "step_00000020").mkdir(parents=True)
    assert best_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step_00000020"
    whole = (tmp_path / BEST_FILE).read_text()
    for damaged in (
        "{",
        whole.replace("step_00000020", "step_00000010"),
        whole.replace('"step": 20', '"step": 30', 1),
    ):
        (tmp_path / BEST_FILE).write_text(damaged)
        with pytest.raises(ValueError, match="is damaged"):
            best_checkpoint(tmp_path)
