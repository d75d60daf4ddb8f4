"""README says what is true: its files exist, its commands parse, its check command answers."""

from __future__ import annotations

import importlib
import re
import shlex
from argparse import ArgumentParser
from pathlib import Path

import pytest

from vl3train.cli.arguments import split_step
from vl3train.cli.main import COMMANDS, main
from vl3train.config.load import read_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)


def commands():
    """Every command line of README's bash blocks, continued lines joined, comments gone."""
    lines = "\n".join(BLOCKS).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_it_is_at_most_150_lines_and_leads_with_the_two_commands():
    assert len(README.splitlines()) <= 150
    assert "bash scripts/quickstart.sh" in BLOCKS[0]
    assert "bash scripts/test.sh" in BLOCKS[0]


@pytest.mark.parametrize("link", re.findall(r"\]\(((?!http)[^)]+)\)", README))
def test_every_file_it_links_to_exists(link):
    assert (ROOT / link).exists(), link


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEST_PATH = re.compile(r"\b(?:tests/)?((?:\w+/)*test_\w+\.py)\b")
"""A test as pages cite it, in a link or in backquotes, at any depth; tests/ may be left out."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_a_page_cites_exists(page):
    assert [
        path for path in TEST_PATH.findall(page.read_text()) if not (ROOT / "tests" / path).exists()
    ] == []


def test_a_cited_test_is_found_at_any_depth():
    text = "`data/plan/test_plan.py`, [elastic](tests/data/plan/test_elastic.py) and `test_docs.py`"
    assert TEST_PATH.findall(text) == ["data/plan/test_plan.py", "data/plan/test_elastic.py", "test_docs.py"]
    assert len(TEST_PATH.findall(README)) >= 5


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_it_shows_can_be_given(words):
    if words[0] == "bash":
        assert (ROOT / words[1]).is_file(), words[1]
    elif words[0] == "vl3train":
        parse(COMMANDS[words[1]].module, words[2:])
    elif words[0] == "torchrun":
        module, *arguments = words[words.index("-m") + 1 :]
        assert module == "vl3train.train"
        parse(module, arguments)
    else:
        assert words[:2] == ["pip", "install"]


def parse(module: str, arguments: list[str]) -> None:
    """Parse a command's words; every ``key=value`` among them must be one that the schema takes."""
    parser = ArgumentParser()
    importlib.import_module(module).add_arguments(parser)
    assert mistakes(getattr(parser.parse_args(arguments), "overrides", [])) == []


def mistakes(overrides: list[str]) -> list[str]:
    """Unknown options and choices, and values of the wrong kind. ``step=7`` names a step of ``vl3train inspect``.

    Files and folders that are not there are no mistakes: only the words are read.
    """
    words, _ = split_step(overrides)
    if not words:
        return []
    cfg, found = read_config(words)
    return [str(problem) for problem in found] if cfg is None or found else []


def test_a_mistyped_override_is_caught():
    assert mistakes(["stage=3", "model=2b", "data.recipe=mine.yaml", "stage.init_from=gone", "step=7"]) == []
    for wrong in (
        "data.recipee=mine.yaml",
        "modl=2b",
        "model=2c",
        "step.max_tokens=many",
        "stage_init_from=a",
    ):
        assert len(mistakes(["stage=3", wrong])) == 1, wrong


def test_its_check_command_tells_what_is_missing_on_a_machine_without_the_data(capsys):
    words = next(words for words in commands() if words[:2] == ["vl3train", "check"])
    assert main(words[1:]) == 1
    shown = capsys.readouterr().out
    assert "data.recipe=mine.yaml" in shown
    assert "stage.init_from=VideoLLaMA3-2B-hf" in shown
