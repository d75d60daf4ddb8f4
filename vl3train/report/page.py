"""The report as one HTML file that needs no other file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from vl3train.report import figures
from vl3train.report.cards import question_card, sample_card
from vl3train.report.html import STYLE
from vl3train.report.lineage import PlacedRun
from vl3train.report.predictions import shown_questions
from vl3train.report.tables import (
    accuracy_table,
    columns_of,
    metrics_of,
    runs_table,
    score_table,
    sources_of,
)


def report_page(placed: Sequence[PlacedRun], samples: Sequence[Mapping[str, Any]]) -> str:
    """The report of some runs as HTML.

    Args:
        placed: the runs, each with a name of its own.
        samples: answers beside the right ones, as ``run_log.read_samples`` returns them.

    Raises:
        SampleError: a picture or clip of ``samples`` cannot be read.
        ValueError: a file of predictions is damaged.
    """
    parts = [
        "<h1>VideoLLaMA3 training report</h1>",
        legend(placed),
        *held_out_parts(placed),
        "<h2>Training</h2>",
        "<p>The loss of a step is the sum over the supervised tokens of its global batch, divided by their number.</p>",
        panels(training_panels(placed)),
        f'<div class="card">{runs_table([one.run for one in placed])}</div>',
        *answer_parts(placed),
    ]
    if samples:
        cards = "".join(sample_card(sample) for sample in samples)
        parts += ["<h2>Sample answers</h2>", f'<div class="samples">{cards}</div>']
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>VideoLLaMA3 training report</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def legend(placed: Sequence[PlacedRun]) -> str:
    """The colors of the runs, and where each started. Runs that started alike are drawn over each other."""
    entries = []
    for number, one in enumerate(placed):
        start = "" if one.parent is None else f" from {escape(one.parent.name)}, step {one.before}"
        entries.append(
            f'<span><span class="swatch" style="background:{figures.color_of(number)}"></span>'
            f'{escape(one.run.name)}<span class="from">{start}</span></span>'
        )
    return f'<div class="legend">{"".join(entries)}</div>'


def held_out_parts(placed: Sequence[PlacedRun]) -> list[str]:
    """Losses, accuracies and scores of held-out samples; nothing where there was no evaluation."""
    columns, sources, metrics = columns_of(placed), sources_of(placed), metrics_of(placed)
    if not columns:
        return []
    draw = figures.held_out_panel
    accuracies = [draw(f"{name}: accuracy, %", name, "accuracy", placed, factor=100) for name in sources]
    parts = [
        "<h2>Held-out accuracy, beside chance</h2>",
        "<p>An answer is right when all its tokens are the likeliest ones, given the right tokens before. Chance is the"
        " accuracy of always giving the most frequent answer: the dashed line. Green: above chance by more than two"
        " standard deviations of guessing.</p>",
        f'<div class="card">{accuracy_table(columns, sources)}</div>',
        panels(accuracies),
    ]
    if metrics:
        parts += [
            "<h2>Scores of generated answers</h2>",
            "<p>The mean and its 95 % confidence interval.</p>",
            f'<div class="card">{score_table(columns, metrics)}</div>',
            panels([draw(f"{name}: {metric}", name, metric, placed) for name, metric in metrics]),
        ]
    losses = [draw(f"{name}: loss", name, "loss", placed) for name in sources]
    return [*parts, "<h2>Held-out loss</h2>", panels(losses)]


def training_panels(placed: Sequence[PlacedRun]) -> list[str]:
    """Loss, speed, wait for data and failed samples, as far as the runs have logged them."""
    found = [figures.loss_panel(placed)]
    for title, key, factor in (
        ("tokens a second", "tokens_per_second", 1.0),
        ("time spent waiting for data, %", "data_wait_fraction", 100.0),
    ):
        if any(one.steps(key)[0] for one in placed):
            found.append(figures.step_panel(title, key, placed, factor=factor))
    if any(sum(one.steps("failed_samples")[1]) for one in placed):
        found.append(figures.failed_panel(placed))
    return found


def answer_parts(placed: Sequence[PlacedRun]) -> list[str]:
    """What the runs answered to held-out questions step by step; nothing where they generated no answers."""
    shown, num_right, num_wrong = shown_questions([one.run for one in placed])
    if not shown:
        return []
    parts = ["<h2>Answers step by step</h2>"]
    several = len({answer.run for one in shown for answer in one.answers}) > 1
    for is_right, count, what in ((False, num_wrong, "wrong"), (True, num_right, "right")):
        mine = [one for one in shown if one.last.is_right == is_right]
        cards = "".join(question_card(one, several_runs=several) for one in mine)
        if mine:
            head = f"{what} at the end: {count} of {num_right + num_wrong}, {len(mine)} shown"
            parts.append(
                f'<details open><summary>{head}</summary><div class="samples">{cards}</div></details>'
            )
    return parts


def panels(drawn: Sequence[str]) -> str:
    """Figures beside each other, or below each other on a phone."""
    cards = "".join(f'<div class="card">{one}</div>' for one in drawn)
    return f'<div class="panels">{cards}</div>'
