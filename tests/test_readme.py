"""README says what is true: its files exist, its commands parse, its check command answers."""

from __future__ import annotations

import importlib
import re
import shlex
from argparse import ArgumentParser
from pathlib import Path

import pytest

from vl3train.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)


def commands():
    """Every command line of README's bash blocks, continued lines joined, comments gone."""
    lines = "\n".join(BLOCKS).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_it_is_at_most_200_lines_and_leads_with_the_two_commands():
    assert len(README.splitlines()) <= 200
    assert "bash scripts/quickstart.sh" in BLOCKS[0]
    assert "bash scripts/test.sh" in BLOCKS[0]


@pytest.mark.parametrize("link", re.findall(r"\]\(((?!http)[^)]+)\)", README))
def test_every_file_it_links_to_exists(link):
    assert (ROOT / link).exists(), link


@pytest.mark.parametrize("path", re.findall(r"`((?:data|model|engine|cli)/test_\w+\.py)`", README))
def test_every_test_it_cites_exists(path):
    assert (ROOT / "tests" / path).exists(), path


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_it_shows_can_be_given(words):
    if words[0] == "bash":
        assert (ROOT / words[1]).is_file(), words[1]
    elif words[0] == "vl3train":
        module = importlib.import_module(COMMANDS[words[1]].module)
        parser = ArgumentParser()
        module.add_arguments(parser)
        parser.parse_args(words[2:])
    elif words[0] == "torchrun":
        assert words[words.index("-m") + 1] == "vl3train.train"
    else:
        assert words[:2] == ["pip", "install"]


def test_its_check_command_tells_what_is_missing_on_a_machine_without_the_data(capsys):
    words = next(words for words in commands() if words[:2] == ["vl3train", "check"])
    assert main(words[1:]) == 1
    shown = capsys.readouterr().out
    assert "data.recipe=mine.yaml" in shown
    assert "stage.init_from=VideoLLaMA3-2B-hf" in shown
