"""What a tracker gets of a run: read back from what W&B and TensorBoard wrote."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.engine.bad_numbers import plant
from tests.engine.runs import run
from tests.engine.tracking.test_tensorboard_tracker import read, texts
from tests.engine.tracking.test_wandb_tracker import read_run, records
from vl3train.contracts.geometry import PATCH_SIZE

STEPS = 3


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", params=["wandb", "tensorboard"])
def tracked(request, demo_words, tmp_path_factory):
    """The folder of a run, and what tracks it."""
    out = tmp_path_factory.mktemp("tracked") / "run"
    words = [*demo_words, "stage=1", f"tracking={request.param}", "tracking.table_rows=2"]
    words += [f"run.num_steps={STEPS}", "run.evaluate_max_new_tokens=4", "run.evaluate_at_end=true"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        return run([*words, f"run.output_dir={out}"]), request.param


def figures_of(folder, kind):
    """Each figure's values by step."""
    if kind == "tensorboard":
        events = read(folder)
        return {
            name: {one.step: one.value for one in events.Scalars(name)} for name in events.Tags()["scalars"]
        }
    (log,) = folder.rglob("*.wandb")
    found = {}
    for row in read_run(log)[2]:
        for name, value in row.items():
            found.setdefault(name, {})[row["step"]] = value
    return found


def test_figures_are_those_of_metrics_jsonl_under_the_same_steps(tracked):
    folder, kind = tracked
    figures, lines = figures_of(folder, kind), lines_of(folder)
    assert [line["step"] for line in lines] == [1, 2, 3]
    for name in ("loss", "grad_norm", "tokens_per_second"):
        assert figures[name] == pytest.approx({line["step"]: line[name] for line in lines})
    for line in lines:
        assert line["part_grad_norms"].keys() == line["learning_rates"].keys()
        for group in ("source_losses", "part_grad_norms"):
            for name, value in line[group].items():
                assert figures[f"{group}/{name}"][line["step"]] == pytest.approx(value)
        assert math.hypot(*line["part_grad_norms"].values()) == pytest.approx(line["grad_norm"], rel=1e-4)
    (evaluation,) = map(json.loads, (folder / "evaluations.jsonl").read_text().splitlines())
    for source, row in evaluation["sources"].items():
        assert figures[f"held_out/{source}/loss"] == pytest.approx({STEPS: row["loss"]})


def test_the_first_held_out_answers_are_shown_with_what_the_encoder_sees(tracked):
    folder, kind = tracked
    (evaluation,) = map(json.loads, (folder / "evaluations.jsonl").read_text().splitlines())
    if kind == "tensorboard":
        events = read(folder)
        for source in evaluation["sources"]:
            table = texts(events, f"held_out_answers/{source}")[0].splitlines()
            assert len(table) == 2 + 2, "a head and two rows"
            if source != "text":
                (shown,) = events.Images(f"held_out/{source}/1")
                assert (shown.step, shown.height % PATCH_SIZE) == (STEPS, 0)
        return
    (log,) = folder.rglob("*.wandb")
    artifacts = [one.artifact for one in records(log) if one.WhichOneof("record_type") == "artifact"]
    (table,) = [one for one in artifacts if one.type == "run_table"]
    files = {one.path: one.local_path for one in table.manifest.contents}
    rows = json.loads(Path(files["held_out_answers.table.json"]).read_text())["data"]
    assert len(rows) == 2 * len(evaluation["sources"])
    assert all((row[2] is None) == (row[0] == "text") for row in rows)
    assert all(row[2]["path"] in files for row in rows if row[2])


def test_data_and_the_end_are_told(tracked):
    folder, kind = tracked
    if kind == "tensorboard":
        events = read(folder)
        (data,), alerts = texts(events, "data"), texts(events, "alerts")
    else:
        (log,) = folder.rglob("*.wandb")
        found = list(records(log))
        alerts = [one.alert.title for one in found if one.WhichOneof("record_type") == "alert"]
        artifacts = [one.artifact for one in found if one.WhichOneof("record_type") == "artifact"]
        (data,) = [one.metadata for one in artifacts if one.type == "dataset"]
    told = json.loads(data)
    assert set(told) == {"train", "held_out"}
    assert all(source["samples"] > 0 for source in told["train"]["sources"].values())
    assert len(alerts) == 1
    assert alerts[0].startswith("run finished")


def test_skipped_steps_and_a_run_that_goes_back_are_told(demo_words, tmp_path, monkeypatch):
    plant({2: math.nan}, monkeypatch.setattr)
    words = [*demo_words, "stage=1", "tracking=tensorboard", "optim.max_skipped_steps=1", "run.num_steps=4"]
    words += ["run.evaluate_at_end=false", "run.save_steps=1", "run.keep_checkpoints=9"]
    folder = run([*words, f"run.output_dir={tmp_path / 'run'}"])
    alerts = texts(read(folder), "alerts")
    assert [alert.partition(":")[0] for alert in alerts] == [
        "**WARNING** step skipped",
        "**WARNING** run goes back",
        "run finished",
    ]
    assert "step 3 is skipped and changes nothing: loss nan" in alerts[0]
