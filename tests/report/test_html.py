"""Texts of others are text on a page, wherever they stand: they open no element and no attribute."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from vl3train.contracts.records import Pack
from vl3train.preview.inspect_page import step_page
from vl3train.preview.step_samples import Place, ShownPack, ShownSample, ShownStep, TextPiece
from vl3train.report.figures import Line, panel
from vl3train.report.html import table_of
from vl3train.report.lineage import PlacedRun
from vl3train.report.page import report_page
from vl3train.report.run_log import RunLog
from vl3train.scoring.predictions import Prediction, write_predictions

PLANTED = [
    '"><i id=planted>',
    "'><i id=planted>",
    "</pre></style><i id=planted>",
    "--><i id=planted>",
    "&lt;i&gt;$\\",
]


class Reader(HTMLParser):
    """Text, elements and attributes as a browser would find them."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text, self.names, self.attributes = "", set(), set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


def check(page: str, planted: str, times: int) -> None:
    found = Reader(page)
    assert "id" not in found.attributes
    assert not {name for name in found.attributes if name.startswith("on")}
    assert not found.names & {"script", "iframe", "object", "embed", "base", "form", "link"}
    assert found.text.count(planted) == times


@pytest.mark.parametrize("planted", PLANTED)
def test_the_page_of_a_step(planted):
    pack = Pack(samples=(0, 1), num_tokens=5, num_patches=4, num_supervised_tokens=2, cost=1)
    pieces = [TextPiece(planted, supervised=True), TextPiece(planted, supervised=False)]
    samples = [
        ShownSample(key=planted, about=planted, text=pieces, pictures=[], fault=None),
        ShownSample(key=planted, about=planted, text=[], pictures=[], fault=planted),
    ]
    shown = ShownPack(place=Place(0, 0, pack), token_fill=0.5, patch_fill=0.5, work=1.0, samples=samples)
    step = ShownStep(title=planted, facts=[planted], packs=[shown])
    check(step_page(step), planted, 2 + 1 + 4 + 2 + 1)  # the title stands twice


@pytest.mark.parametrize("planted", PLANTED)
def test_the_report(planted, tmp_path):
    """Names of runs, sources and metrics, questions and answers."""
    row = {"samples": 40, "accuracy": 0.9, "chance": 0.5, "loss": 1.0}
    row |= {planted: 0.5, f"{planted}_low": 0.4, f"{planted}_high": 0.6}
    evaluations = [{"stage": 1, "step": 3, "when": "end", "sources": {planted: row}}]
    steps = [{"step": step, "loss": 1.0} for step in (1, 2, 3)]
    run = RunLog(name=planted, steps=steps, folder=tmp_path, evaluations=evaluations)
    words = {"key": planted, "source": planted, "question": planted, "reference": planted}
    answer = Prediction(**words, answer_number=0, prediction=f"{planted}.", is_cut=False)
    (tmp_path / "predictions").mkdir()
    write_predictions(tmp_path / "predictions" / "step_000003.jsonl", [answer])
    sample = {**words, "media": [], "prediction": planted, "answer": f"{planted}."}
    # The run's name: legend, two heads, the table of runs. The source: a row of accuracy, a row of scores with the
    # metric, and so over three drawings. Of the step's answer: key, question, expected and answer. Of the sample:
    # source, question, both answers.
    check(report_page([PlacedRun(run, 0, None)], [sample]), planted, 1 + 2 + 1 + 1 + 2 + 4 + 4 + 4)


@pytest.mark.parametrize("planted", PLANTED)
def test_the_parts_of_a_page(planted):
    check(table_of([planted], []), planted, 1)
    check(panel(planted, [Line("#2f81f7", [1, 2], [0.5, 1.0])]), planted, 1)
