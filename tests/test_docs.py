"""The commands of the pages in docs/ run, in their order, in a folder that holds what the pages speak of."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.data.conftest import drawn_picture, picture_bytes, still_and_moving
from tests.data.shards_fixture import write_clip
from vl3train.cli.main import main

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tiny_model_dir):
    """``media`` with two pictures and a clip, and ``model``."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "media").mkdir()
    for seed, name in enumerate(("cat.jpg", "dog.jpg")):
        (folder / "media" / name).write_bytes(picture_bytes(drawn_picture(96, 128, seed), "JPEG"))
    write_clip(folder / "media" / "clip.mp4", still_and_moving(20, 64, 96))
    (folder / "model").symlink_to(tiny_model_dir)
    return folder


@pytest.mark.parametrize(
    "page", ["prepare_data.md", "planner.md"]
)  # the second goes on with the first's files
def test_the_commands_of_a_page_run(page, workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("COLUMNS", "200")
    commands = 0
    for language, file, content in BLOCK.findall((DOCS / page).read_text(encoding="utf-8")):
        if file:
            Path(file).write_text(content, encoding="utf-8")
        elif language == "bash":
            for command in content.strip().splitlines():
                program, *words = shlex.split(command)
                assert program == "vl3train"
                assert main(words) == 0, f"{command}\n{capsys.readouterr().err}"
                commands += 1
    assert commands >= 3
    assert (workplace / "plan.png").is_file()
    assert (workplace / "step-0.html").is_file()


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", (DOCS / page).read_text(encoding="utf-8")):
        assert "://" in target or (DOCS / target).exists(), target
