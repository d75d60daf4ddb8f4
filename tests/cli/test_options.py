"""The list of options: all of them, and those that a word means."""

from __future__ import annotations

import pytest

from vl3train.cli.main import main
from vl3train.cli.options import matching
from vl3train.config.input.options import OPTIONS


@pytest.mark.parametrize(
    ("word", "keys"),
    [
        ("optim.learning_rate", ["optim.learning_rate"]),
        ("stage.learning_rates.projector", ["stage.learning_rates"]),
        ("lr", ["optim.learning_rate"]),
        ("--batch-size=8", ["step.max_samples", "step.global_packs"]),
        ("learning_rate", ["optim.learning_rate", "adapter.learning_rate"]),
        ("machine.states_on_host", ["machine.offload_optimizer"]),
        ("tracking", [key for key in OPTIONS if key.startswith("tracking.")]),
        ("DiffFP", ["stage.prune_frames"]),
        ("lora_rnk", ["adapter.rank"]),
        ("xyzzy", []),
    ],
)
def test_a_word_means_these_options(word: str, keys: list[str]):
    assert [one.key for one in matching(word)] == keys


def test_every_option_is_listed_with_default_kind_and_meaning(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["options"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split("=")[0].strip() for line in lines if line.startswith("  ")]
    assert listed == list(OPTIONS)
    assert max(map(len, lines)) <= 200  # a section's sentence is not cut
    [line] = [line for line in lines if line.startswith("  step.fill=")]
    assert line.startswith("  step.fill=0.95 (a number): Share of the packs' tokens")


def test_a_word_without_option_is_told_and_fails(capsys):
    assert main(["options", "lr", "machin"]) == 0
    assert main(["options", "lr", "xyzzy"]) == 1
    shown = capsys.readouterr().out
    assert "xyzzy: no option has this word; the sections are stage, " in shown
    assert "optim.learning_rate\n  takes    a number, or null\n  default  null\n" in shown
