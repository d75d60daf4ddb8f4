"""The report must say what the logs say, and need no other file."""

from __future__ import annotations

import base64
import doctest
import io
import json
import re
from html.parser import HTMLParser

import av
import numpy as np
import pytest
from PIL import Image

import vl3train.cli.report as report_module
import vl3train.report.figures as figures_module
from vl3train.cli.main import main
from vl3train.report.lineage import PlacedRun
from vl3train.report.run_log import RunLog, read_lines

TASKS = {"count": 0.30, "colour <b>": 0.25, "clip_order": 0.50}


def make_run(folder, stage, num_steps=60, *, start=False, init_from=None):
    folder.mkdir()
    (folder / "config.yaml").write_text(json.dumps({"stage": {"init_from": init_from and str(init_from)}}))
    draw = np.random.default_rng(stage)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(num_steps):
            loss = 4 / stage * np.exp(-step / 30) + 0.1 * draw.random()
            line = {"step": step, "loss": loss, "tokens_per_second": 1500.0, "patches_per_second": 5200.0}
            line |= {
                "fill": 0.93,
                "data_wait_fraction": 0.02,
                "step_seconds": 1.5,
                "failed_samples": step % 2,
            }
            file.write(json.dumps(line) + "\n")

    def figures(stage):
        return {
            name: {
                "samples": 40,
                "loss": 1.0,
                "accuracy": min(1.0, chance + 0.17 * stage),
                "chance": chance,
                "supervised_tokens": 80,
            }
            for name, chance in TASKS.items()
        }

    lines = [{"stage": stage, "step": 0, "when": "start", "sources": figures(0)}] if start else []
    lines += [
        {"stage": stage, "step": 30, "when": "step", "sources": figures(stage - 0.5)},
        {"stage": stage, "step": num_steps, "when": "end", "sources": figures(stage)},
    ]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_answers(folder, samples):
    """(source, media, question, right, said) as `generate --batch` and a user would write them."""
    kinds = {".jpg": "image", ".mp4": "video"}
    answers, expected = [], []
    for source, media, question, right, said in samples:
        paths = {kinds[path.suffix]: [str(path)] for path in media}
        answers.append(json.dumps({"prompt": question, **paths, "answer": said}))
        expected.append(json.dumps({"source": source, "key": "k", "answer": right}))
    (folder / "answers.jsonl").write_text("\n".join(answers) + "\n")
    (folder / "expected.jsonl").write_text("\n".join(expected) + "\n")


def answer_words(folder):
    return ["--answers", folder / "answers.jsonl", "--expected", folder / "expected.jsonl"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    runs = []
    for stage in (1, 2, 3, 4):
        runs.append(make_run(folder / f"run{stage}", stage, start=stage == 1, init_from=runs and runs[-1]))
    Image.new("RGB", (400, 300), (220, 30, 30)).save(folder / "red.jpg")
    with av.open(str(folder / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for i in range(24):
            picture = np.full((64, 96, 3), 10 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    samples = [
        ("colour", [folder / "red.jpg"], "What colour?", "red", "red"),
        ("clip_order", [folder / "clip.mp4"], "What comes first?", "dark", "bright & <i>light</i>"),
        ("text", [], "What is the capital of France?", "Paris", "Paris"),
    ]
    write_answers(folder, samples)
    words = ["report", *runs, "--out", folder / "out", *answer_words(folder)]
    assert main([str(word) for word in words]) == 0
    return folder / "out"


class Reader(HTMLParser):
    """Collects table cells and everything that a page would fetch."""

    def __init__(self):
        super().__init__()
        self.rows, self.fetched, self.cell, self.tags = [], [], None, []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "srcset", "href")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("*" if ("class", "good") in attrs else "")
            self.cell = True

    def handle_endtag(self, tag):
        self.cell = self.cell if tag not in ("td", "th") else None

    def handle_data(self, data):
        if self.cell:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def page(report):
    reader = Reader()
    reader.feed((report / "report.html").read_text())
    return reader


def test_examples():
    assert doctest.testmod(report_module).failed == 0
    assert doctest.testmod(figures_module).failed == 0


def test_the_table_holds_the_accuracies_of_every_milestone(page):
    table = {row[0]: row[1:] for row in page.rows if row}
    assert table["task"] == [
        *("before", "run1", "run2", "run3", "run4"),
        *("chance", "samples"),
    ]
    assert table["count"] == ["30%", "*47%", "*64%", "*81%", "*98%", "30%", "40"]
    assert table["colour <b>"][0] == "25%"
    assert table["clip_order"][4] == "*100%"
    assert table["run2"][:1] == ["60"]
    assert table["run2"][3] == "1.5 min"
    assert table["run2"][-1] == "30"


def test_the_page_is_whole_in_itself(page):
    assert len(page.fetched) == 1 + 4  # a picture, and four frames of the clip
    for url in page.fetched:
        content = re.fullmatch(r"data:image/jpeg;base64,(.*)", url)[1]
        with Image.open(io.BytesIO(base64.b64decode(content))) as image:
            image.load()
            assert image.format == "JPEG"
    assert {"script", "link", "iframe", "i", "b"}.isdisjoint(page.tags)


def test_predictions_are_marked(report):
    text = (report / "report.html").read_text()
    assert '<span class="right">✓ red</span>' in text
    assert (
        '<span class="wrong">✗ bright &amp; &lt;i&gt;light&lt;/i&gt;</span> &middot; expected: dark' in text
    )


def test_the_figures_are_drawn_where_the_values_are(report):
    text = (report / "report.html").read_text()
    assert text.count("<svg") == 2 * 3 + 4  # accuracy and loss of three tasks, and four of the training
    one = PlacedRun(RunLog(name="a", steps=[], evaluations=evaluations({10: 0.25, 30: 0.75})), 0, None)
    two = PlacedRun(RunLog(name="b", steps=[], evaluations=evaluations({30: 0.5})), 20, one.run)
    drawn = figures_module.held_out_panel("count: anls", "count", "anls", [one, two])
    lines = re.findall(r'<polyline class="marked" stroke="(#\w+)" points="([^"]*)"', drawn)
    assert [color for color, _ in lines] == list(figures_module.COLORS[:2])
    (first, last), (other,) = (
        [tuple(map(float, point.split(","))) for point in points.split()] for _, points in lines
    )
    left, right = figures_module.LEFT, figures_module.WIDTH - figures_module.RIGHT
    assert (first[0], other[0], last[0]) == (left, right, left + (right - left) / 2)
    assert last[1] < other[1] < first[1]
    assert first[1] - other[1] == pytest.approx(other[1] - last[1])
    assert drawn.count("<polygon") == 2
    assert len(figures_module.thinned(range(10_000), range(10_000))) == figures_module.MOST_POINTS


def evaluations(values):
    return [
        {
            "step": step,
            "when": "step",
            "sources": {"count": {"anls": value, "anls_low": value - 0.1, "anls_high": value + 0.1}},
        }
        for step, value in values.items()
    ]


def test_a_report_can_be_made_again_and_is_the_same(report):
    before = {file.name: file.read_bytes() for file in report.iterdir()}
    runs = [str(report.parent / f"run{stage}") for stage in (1, 2, 3, 4)]
    words = ["report", *runs, "--out", str(report), *map(str, answer_words(report.parent))]
    assert main(words) == 0
    assert {file.name: file.read_bytes() for file in report.iterdir()} == before


def test_a_run_that_was_not_evaluated_has_losses_only(tmp_path):
    folder = make_run(tmp_path / "run", 1)
    (folder / "evaluations.jsonl").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 60, "lo')  # still being written
    assert main(["report", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["report.html"]
    text = (tmp_path / "out" / "report.html").read_text()
    assert "Held-out" not in text
    assert "Training" in text


def test_everything_that_is_missing_is_told_at_once(tmp_path, capsys):
    folder = make_run(tmp_path / "run", 1)
    (folder / "evaluations.jsonl").write_text('{"stage": 1}\n{torn\n')
    (tmp_path / "answers.jsonl").write_text('{"prompt": "p", "image": ["gone.jpg"]}\n')
    (tmp_path / "expected.jsonl").write_text('{"source": "a"}\n')
    words = [
        "report",
        folder,
        tmp_path / "gone",
        "--out",
        tmp_path / "out",
        *answer_words(tmp_path),
    ]
    assert main([str(word) for word in words]) == 1
    told = capsys.readouterr().err
    assert "line 1 lacks step, when, sources" in told
    assert "line 2 is not JSON" in told
    assert f"{tmp_path / 'gone'} holds no figures" in told
    assert "expected.jsonl, line 1 lacks key, answer" in told
    assert "answers.jsonl, line 1 lacks answer" in told
    assert not (tmp_path / "out").exists()


def test_a_log_that_is_no_text_is_told_and_other_ends_of_lines_are_letters(tmp_path):
    file, problems = tmp_path / "log.jsonl", []
    file.write_text('{"answer": "a\u2028b\x85c"}\n\n5\nnull\n' + "[" * 100_000 + '\n{"cut', encoding="utf-8")
    assert read_lines(file, ("answer",), problems) == [{"answer": "a\u2028b\x85c"}]
    assert [text.partition(", ")[2].partition(":")[0] for text in problems] == [
        "line 3 is no JSON object",
        "line 4 is no JSON object",
        "line 5 is not JSON",
    ]
    file.write_bytes(b"\xff\xfe\n")
    assert read_lines(file, (), problems) == []
    assert "is no text in UTF-8" in problems[-1]
