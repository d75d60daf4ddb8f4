"""The report as one HTML file that needs no other file."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from vl3train.config.data_options import DataConfig
from vl3train.data.media.clips import DecodeLimits, decode_clip
from vl3train.data.pictures.images import IMAGE_FORMATS, decode_image
from vl3train.report.html import STYLE, data_url, figure_tag, table_of, thumbnail

if TYPE_CHECKING:
    import numpy as np

    from vl3train.report.run_log import Milestone, RunLog

FRAMES_SHOWN = 4


def write_page(
    file: Path,
    runs: Sequence[RunLog],
    reached: Sequence[Milestone],
    figures: Mapping[str, Mapping[bool, bytes]],
    samples: Sequence[Mapping[str, Any]],
) -> None:
    """Write the report.

    Args:
        file: where to write it.
        runs: logs, in the order of training.
        reached: held-out figures at the start and after each run; may be empty.
        figures: PNG of each figure for a light (False) and a dark (True) page.
        samples: answers beside the right ones, as ``run_log.read_samples`` returns them.

    Raises:
        SampleError: a picture or clip of ``samples`` cannot be read.
    """
    names = ", ".join(run.name for run in runs)
    parts = ["<h1>VideoLLaMA3 training report</h1>", f"<p>{escape(names)}</p>"]
    if reached:
        parts += [
            "<h2>Held-out accuracy, beside chance</h2>",
            "<p>An answer is right when all its tokens are right. Chance is the accuracy of always giving the most"
            " frequent answer. Green: above chance by more than two standard deviations of guessing.</p>",
            f'<div class="card">{accuracy_table(reached)}</div>',
            f'<div class="card" style="margin-top:14px">{figure_tag(figures["accuracy"], "accuracy")}</div>',
        ]
    parts += [
        "<h2>Loss</h2>",
        "<p>Sum of the loss over the supervised tokens of the global batch, divided by their number.</p>",
        f'<div class="card">{figure_tag(figures["loss_curves"], "loss curves")}</div>',
        "<h2>Runs</h2>",
        f'<div class="card">{runs_table(runs)}</div>',
    ]
    if samples:
        cards = "".join(sample_card(sample) for sample in samples)
        parts += ["<h2>Sample answers</h2>", f'<div class="samples">{cards}</div>']
    file.write_text(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>VideoLLaMA3 training report</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n",
        encoding="utf-8",
    )


def accuracy_table(reached: Sequence[Milestone]) -> str:
    """A row for each source, a column for each milestone, then chance and the number of samples."""
    from vl3train.report.run_log import clearly_above_chance

    names = list(dict.fromkeys(name for milestone in reached for name in milestone.sources))
    rows = []
    for name in names:
        cells = [escape(name)]
        for milestone in reached:
            found = milestone.sources.get(name)
            cells.append("" if found is None else f"{found['accuracy']:.0%}")
        last = next(m.sources[name] for m in reversed(reached) if name in m.sources)
        cells += [f"{last['chance']:.0%}", f"{last['samples']:.0f}"]
        row = [f"<td>{cell}</td>" for cell in cells]
        for column, milestone in enumerate(reached, start=1):
            if name in milestone.sources and clearly_above_chance(milestone.sources[name]):
                row[column] = f'<td class="good">{cells[column]}</td>'
        rows.append(f"<tr>{''.join(row)}</tr>")
    heads = ["task", *(milestone.name for milestone in reached), "chance", "samples"]
    return table_of(heads, rows)


def runs_table(runs: Sequence[RunLog]) -> str:
    """Length, speed and losses of each run; a cell is empty when the run did not log the figure."""

    def mean(run: RunLog, key: str, form: str) -> str:
        values = [line[key] for line in run.steps if line.get(key) is not None]
        return form.format(sum(values) / len(values)) if values else ""

    rows = []
    for run in runs:
        seconds = sum(line.get("step_seconds", 0.0) for line in run.steps)
        cells = [
            escape(run.name),
            f"{run.steps[-1]['step']:,}",
            f"{run.steps[0]['loss']:.3f}",
            f"{run.steps[-1]['loss']:.3f}",
            f"{seconds / 60:.1f} min",
            mean(run, "tokens_per_second", "{:,.0f}"),
            mean(run, "patches_per_second", "{:,.0f}"),
            mean(run, "fill", "{:.0%}"),
            mean(run, "data_wait_fraction", "{:.0%}"),
            f"{sum(line.get('failed_samples', 0) for line in run.steps)}",
        ]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    heads = [
        "run",
        "steps",
        "first loss",
        "last loss",
        "time",
        "tokens/s",
        "patches/s",
        "fill",
        "data wait",
        "failed samples",
    ]
    return table_of(heads, rows)


def sample_card(sample: Mapping[str, Any]) -> str:
    """One answer, with the pictures of its question; for a clip, some of its frames in order."""
    pictures = [picture for path in sample["media"] for picture in pictures_of(Path(path))]
    images = "".join(f'<img alt="" src="{data_url(thumbnail(picture), "jpeg")}">' for picture in pictures)
    several = " several" if len(pictures) > 1 else ""
    right = str(sample["prediction"]).strip() == str(sample["answer"]).strip()
    mark, kind = ("✓", "right") if right else ("✗", "wrong")
    said = escape(str(sample["prediction"])) or "(nothing)"
    wanted = "" if right else f" &middot; expected: {escape(str(sample['answer']))}"
    return (
        f'<div class="card sample"><div class="source">{escape(str(sample["source"]))}</div>'
        + (f'<div class="media{several}">{images}</div>' if images else "")
        + f'<div class="question">{escape(str(sample["question"]))}</div>'
        f'<div class="prediction"><span class="{kind}">{mark} {said}</span>'
        f"{wanted}</div></div>"
    )


def pictures_of(path: Path) -> list[np.ndarray]:
    """The picture, or some frames of the clip in order; each (height, width, 3) uint8."""
    data = path.read_bytes()
    limits = DecodeLimits(
        max_pixels=DataConfig().decode_max_pixels, max_seconds=DataConfig().decode_max_seconds
    )
    if is_image(data):
        return [decode_image(data, limits)]
    clip = decode_clip(data, fps=1.0, min_frames=FRAMES_SHOWN, max_frames=FRAMES_SHOWN, limits=limits)
    return list(clip.frames)


def is_image(data: bytes) -> bool:
    """Whether the file header is that of a picture."""
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS):
            return True
    except (OSError, Image.DecompressionBombError):
        return False
