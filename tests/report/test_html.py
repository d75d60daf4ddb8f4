"""Texts of others are text on a page, wherever they stand: they open no element and no attribute."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from vl3train.contracts.records import Pack
from vl3train.preview.inspect_page import step_page
from vl3train.preview.step_samples import Place, ShownPack, ShownSample, ShownStep, TextPiece
from vl3train.report.figures import draw_accuracies, draw_losses
from vl3train.report.html import figure_tag, table_of
from vl3train.report.page import write_page
from vl3train.report.run_log import Milestone, RunLog

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
    run = RunLog(name=planted, steps=[{"step": step, "loss": 1.0} for step in range(3)])
    figures = {"samples": 40, "accuracy": 0.9, "chance": 0.5}
    reached = [Milestone(name=planted, sources={planted: figures})]
    drawn = {
        "loss_curves": {dark: draw_losses([run], dark=dark) for dark in (False, True)},
        "accuracy": {dark: draw_accuracies(reached, dark=dark) for dark in (False, True)},
    }
    answer = {
        "source": planted,
        "media": [],
        "question": planted,
        "prediction": planted,
        "answer": f"{planted}.",
    }
    write_page(tmp_path / "report.html", [run], reached, drawn, [answer])
    check((tmp_path / "report.html").read_text(), planted, 2 + 2 + 4)


@pytest.mark.parametrize("planted", PLANTED)
def test_the_parts_of_a_page(planted):
    check(table_of([planted], []), planted, 1)
    found = Reader(figure_tag({False: b"", True: b""}, planted))
    assert "id" not in found.attributes
