"""A run goes on with another number of ranks, and in another ZeRO stage: the same command, and the same training."""

from __future__ import annotations

import json

import pytest

from tests.conftest import made_once
from tests.engine.jobs import start_job
from tests.engine.runs import run
from tests.long import first_of

KINDS = {
    "full": ["machine.zero_stage={}"],
    "lora": [
        "adapter=lora",
        "adapter.rank=4",
        "adapter.modules_to_save=[projector]",
        "machine.zero_stage={}",
    ],
}
PATHS = {"full": (1, 3, 0), "lora": (2, 1, 3)}
"""For each kind the ZeRO stages of its runs on one rank, on several, and on one rank again. More kinds:
tests/engine/zero/reshard/test_load.py."""


@pytest.fixture(scope="module")
def start(demo_words, tmp_path_factory):
    words = [*demo_words, "stage=1", "run.num_steps=1", "run.evaluate_at_end=false"]
    out = made_once(tmp_path_factory, "elastic", lambda out: run([*words, f"run.output_dir={out}"]))
    return [
        *demo_words,
        "stage=3",
        f"stage.init_from={out / 'checkpoints/step_00000001/weights'}",
        "run.num_steps=3",
        "run.evaluate_at_end=false",
        "step.global_packs=4",
    ]


def losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)[name] for line in lines for name in ("loss", "grad_norm")]


def words_of(start, kind, out, zero_stage):
    """The command of a run; only its ZeRO stage ever changes."""
    return [*start, *(word.format(zero_stage) for word in KINDS[kind]), f"run.output_dir={out}"]


def near(straight):
    """Of float32 to its last digits but two: sums are made in another order."""
    return pytest.approx(losses(straight), rel=1e-5)


def test_in_another_zero_stage_it_goes_on(demo_words, tmp_path, capsys):
    words = [*demo_words, "stage=1", "run.num_steps=3", "run.evaluate_at_end=false"]
    straight = run(words_of(words, "full", tmp_path / "straight", 1))
    for zero_stage in (0, 3, 2):
        run([*words_of(words, "full", tmp_path / "moved", zero_stage), "run.stop_after_steps=1"])
    assert losses(tmp_path / "moved") == near(straight)
    said = capsys.readouterr().out
    assert "saved with machine.dp_size=1 machine.zero_stage=3: its optimizer state is divided anew" in said


@pytest.mark.two_processes
@pytest.mark.parametrize(("num_ranks", "kinds"), first_of((2, ["lora"]), (4, ["full", "lora"])))
def test_on_more_ranks_and_on_one_again_it_is_the_same_training(
    start, warm_python, tmp_path, num_ranks, kinds
):
    on_more_ranks = []
    for kind in kinds:
        one, several, _ = PATHS[kind]
        run(words_of(start, kind, tmp_path / kind / "straight", one))
        run([*words_of(start, kind, tmp_path / kind / "moved", one), "run.stop_after_steps=1"])
        words = words_of(start, kind, tmp_path / kind / "moved", several)
        on_more_ranks.append([*words, "run.stop_after_steps=1"])
    file = tmp_path / "runs.json"
    file.write_text(json.dumps(on_more_ranks))
    process, _ = start_job(warm_python, "tests.engine.runs_worker", [str(file)], num_ranks=num_ranks)
    assert process.wait(timeout=400) == 0
    for kind in kinds:
        *_, again = PATHS[kind]
        run(words_of(start, kind, tmp_path / kind / "moved", again))
        assert losses(tmp_path / kind / "moved") == near(tmp_path / kind / "straight"), kind
