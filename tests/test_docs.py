"""The commands of the pages in docs/ run in their order. Every link, path and option that a page names exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.data.conftest import drawn_picture, picture_bytes, still_and_moving
from tests.data.shards_fixture import write_clip
from vl3train.cli.main import main
from vl3train.config.input.options import OPTIONS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (
        *DOCS.glob("*.md"),
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
        *ROOT.glob("*/README.md"),
    )
)
"""Not benchmarks/log.md: history keeps the names of its day."""
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FOLDERS = sorted(
    path.name
    for path in (*ROOT.iterdir(), *(ROOT / "vl3train").iterdir())
    if path.is_dir() and path.name[0] not in "._"
)
PATH = re.compile(rf"`((?:{'|'.join(map(re.escape, FOLDERS))})/[\w./*-]*)`")
OPTION = re.compile(
    rf"(?<![\w.])((?:{'|'.join(sorted({key.partition('.')[0] for key in OPTIONS}))})"
    r"\.(?!(?:py|md|yaml|ipynb|jsonl|lock)\b)[a-z]\w+)"  # no file's name
)


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
    "page", ["prepare_data.md", "planner.md", "families.md"]
)  # the second uses the first's files
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
    if page == "families.md":
        said = " ".join(capsys.readouterr().out.split())
        assert "families 2 with 5 samples" in said
    else:
        assert (workplace / "step-1.html").is_file()
    assert (workplace / "plan.png").is_file()


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page):
    file = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)\)", file.read_text(encoding="utf-8")):
        assert "://" in target or (file.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_paths_that_a_page_names_exist(page):
    """From the root, from the package, or from the page's own folder; ``*`` stands for any name."""
    assert missing_paths(ROOT / page) == []


def missing_paths(file):
    starts = (ROOT, ROOT / "vl3train", file.parent)
    return [
        path
        for path in PATH.findall(file.read_text(encoding="utf-8"))
        if not any(any(start.glob(path)) for start in starts)
    ]


@pytest.mark.parametrize("page", PAGES)
def test_options_that_a_page_names_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert [option for option in OPTION.findall(text) if option not in OPTIONS] == []
