"""A run goes on with another number of ranks, and in another ZeRO stage: the same command, and the same training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import made_once
from tests.engine.jobs import start_job
from tests.engine.runs import run

KINDS = {
    "full": [],
    "lora": ["adapter=lora", "adapter.rank=4", "adapter.modules_to_save=[projector]"],
    "split masters": [
        "machine.dtype=bfloat16",
        "machine.offload_optimizer=true",
        "optim.master_dtype=split",
    ],
    "bfloat16": ["machine.dtype=bfloat16", "optim.max_grad_norm=0.5"],
    "stochastic": ["machine.dtype=bfloat16", "optim.state_dtype=bfloat16"],
}
PATHS = {  # for each kind the ZeRO stages of its runs on one rank, on several, and on one rank again
    "full": (1, 3, 0),
    "lora": (2, 1, 3),
    "split masters": (1, 1, 1),
    "bfloat16": (1, 2, 3),
    "stochastic": (3, 1, 2),
}


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


def close_to(straight, kind):
    """Of float32 to its last digits but two. bfloat16 rounds what differs in the last digit of a sum."""
    return pytest.approx(losses(straight), rel=1e-5 if kind in ("full", "lora") else 2e-2)


def go_on(words, out, zero_stage):
    """The next step of a run, in this process."""
    run([*words, f"run.output_dir={out}", f"machine.zero_stage={zero_stage}", "run.stop_after_steps=1"])


def test_in_every_zero_stage_it_goes_on_with_the_state_of_any_other(start, tmp_path, capsys):
    """Stage 0 takes the norm of each parameter first, so that a gradient is clipped by a last digit more or less."""
    words = [*start, "run.num_steps=5"]
    straight = run([*words, f"run.output_dir={tmp_path / 'straight'}"])
    for zero_stage in (0, 3, 1, 2, 0):
        go_on(words, tmp_path / "moved", zero_stage)
    assert losses(tmp_path / "moved") == close_to(straight, "full")
    assert "saved with machine.dp_size=1 machine.zero_stage=3: its optimizer state" in capsys.readouterr().out


@pytest.mark.two_processes
@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.long)])
def test_on_more_ranks_and_on_fewer_it_is_the_same_training(start, warm_python, tmp_path, num_ranks):
    runs = []
    for kind, stages in PATHS.items():
        words = [*start, *KINDS[kind]]
        run([*words, f"machine.zero_stage={stages[0]}", f"run.output_dir={tmp_path / kind / 'straight'}"])
        go_on(words, tmp_path / kind / "moved", stages[0])
        runs.append(
            [
                *words,
                f"machine.zero_stage={stages[1]}",
                f"run.output_dir={tmp_path / kind / 'moved'}",
                "run.stop_after_steps=1",
            ]
        )
    file = Path(tmp_path / "runs.json")
    file.write_text(json.dumps(runs))
    process, _ = start_job(warm_python, "tests.engine.runs_worker", [str(file)], num_ranks=num_ranks)
    assert process.wait(timeout=400) == 0
    for kind, stages in PATHS.items():
        go_on([*start, *KINDS[kind]], tmp_path / kind / "moved", stages[2])
        assert losses(tmp_path / kind / "moved") == close_to(tmp_path / kind / "straight", kind), kind
