"""The report as one HTML file that needs no other."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from vl3train.config.data_options import DataConfig
from vl3train.data.images import IMAGE_FORMATS, decode_image
from vl3train.data.media import DecodeLimits, decode_clip

if TYPE_CHECKING:
    import numpy as np

    from vl3train.cli.report import Milestone, RunLog

THUMBNAIL_PIXELS = 320
FRAMES_SHOWN = 4

STYLE = """
:root { color-scheme: light dark; --page: #f6f8fa; --card: #ffffff; --ink: #24292f; --soft: #57606a;
  --line: #d8dee4; --good: #1a7f37; --bad: #cf222e; --good-back: #dafbe1; }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --card: #161b22; --ink: #c9d1d9;
  --soft: #8b949e; --line: #30363d; --good: #3fb950; --bad: #f85149; --good-back: #12361f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 4px; }
h2 { font-size: 18px; margin: 36px 0 10px; }
p { margin: 0 0 12px; color: var(--soft); max-width: 75ch; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px;
  overflow-x: auto; }
.card img.figure { width: 100%; display: block; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 12px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; font-size: 13px; }
tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child { text-align: left; }
td.good { background: var(--good-back); color: var(--good); font-weight: 600; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 14px; }
.sample { display: flex; flex-direction: column; gap: 8px; }
.sample .media { display: grid; gap: 4px; }
.sample .media.several { grid-template-columns: 1fr 1fr; }
.sample img { width: 100%; border-radius: 6px; display: block; }
.sample .source { color: var(--soft); font-size: 12px; }
.sample .question { font-weight: 600; white-space: pre-line; overflow-wrap: anywhere; }
.sample .prediction { margin-top: auto; overflow-wrap: anywhere; }
.right { color: var(--good); font-weight: 600; } .wrong { color: var(--bad); font-weight: 600; }
"""


def write_page(
    file: Path,
    runs: Sequence[RunLog],
    reached: Sequence[Milestone],
    figures: Mapping[str, Mapping[bool, bytes]],
    samples: Sequence[Mapping[str, Any]],
) -> None:
    """Write the report.

    Args:
        file: Where to.
        runs: Logs in the order of the training.
        reached: Held-out figures along it; may be empty.
        figures: PNG of each figure for a light (False) and a dark (True) page.
        samples: Predictions with ``SAMPLE_KEYS`` of cli/report.py.

    Raises:
        BadSample: A picture or clip of ``samples`` cannot be read.
    """
    names = ", ".join(run.name for run in runs)
    parts = ["<h1>VideoLLaMA3 training report</h1>", f"<p>{escape(names)}</p>"]
    if reached:
        parts += [
            "<h2>Held-out accuracy against chance</h2>",
            "<p>A sample counts when every token of its answer is right. Chance is what the most frequent"
            " answer alone reaches. Green: more than two standard deviations of guessing above chance.</p>",
            f'<div class="card">{accuracy_table(reached)}</div>',
            f'<div class="card" style="margin-top:14px">{figure_tag(figures["accuracy"], "accuracy")}</div>',
        ]
    parts += [
        "<h2>Loss</h2>",
        "<p>Sum over the supervised tokens of the global batch, divided by their number.</p>",
        f'<div class="card">{figure_tag(figures["loss_curves"], "loss curves")}</div>',
        "<h2>Runs</h2>",
        f'<div class="card">{runs_table(runs)}</div>',
    ]
    if samples:
        cards = "".join(sample_card(sample) for sample in samples)
        parts += ["<h2>Sample predictions</h2>", f'<div class="samples">{cards}</div>']
    file.write_text(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>VideoLLaMA3 training report</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n",
        encoding="utf-8",
    )


def accuracy_table(reached: Sequence[Milestone]) -> str:
    """Sources down, milestones across, chance last."""
    from vl3train.cli.report import clearly_above_chance

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
    """Length, speed and losses of each run; what a run did not log is left empty."""

    def mean(run: RunLog, key: str, form: str) -> str:
        values = [line[key] for line in run.steps if line.get(key) is not None]
        return form.format(sum(values) / len(values)) if values else ""

    rows = []
    for run in runs:
        seconds = sum(line.get("step_seconds", 0.0) for line in run.steps)
        cells = [
            escape(run.name),
            f"{run.steps[-1]['step'] + 1:,}",
            f"{run.steps[0]['loss']:.3f}",
            f"{run.steps[-1]['loss']:.3f}",
            f"{seconds / 60:.1f} min",
            mean(run, "tokens_per_second", "{:,.0f}"),
            mean(run, "patches_per_second", "{:,.0f}"),
            mean(run, "fill", "{:.0%}"),
            mean(run, "data_wait_fraction", "{:.0%}"),
            f"{sum(line.get('skipped_samples', 0) for line in run.steps)}",
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
        "skipped",
    ]
    return table_of(heads, rows)


def table_of(heads: Sequence[str], rows: Sequence[str]) -> str:
    """A table from its column names and its rows as HTML."""
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def figure_tag(of_theme: Mapping[bool, bytes], about: str) -> str:
    """A figure that follows the page's theme."""
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{data_url(of_theme[True], "png")}">'
        f'<img class="figure" alt="{about}" src="{data_url(of_theme[False], "png")}"></picture>'
    )


def sample_card(sample: Mapping[str, Any]) -> str:
    """One prediction beside its pictures; of a clip, some frames in their order."""
    pictures = [picture for path in sample["media"] for picture in pictures_of(Path(path))]
    images = "".join(f'<img alt="" src="{data_url(thumbnail(picture), "jpeg")}">' for picture in pictures)
    several = " several" if len(pictures) > 1 else ""
    right = str(sample["prediction"]).strip() == str(sample["answer"]).strip()
    mark, kind = ("✓", "right") if right else ("✗", "wrong")
    said = escape(str(sample["prediction"])) or "(nothing)"
    wanted = "" if right else f" &middot; right: {escape(str(sample['answer']))}"
    return (
        f'<div class="card sample"><div class="source">{escape(str(sample["source"]))}</div>'
        + (f'<div class="media{several}">{images}</div>' if images else "")
        + f'<div class="question">{escape(str(sample["question"]))}</div>'
        f'<div class="prediction"><span class="{kind}">{mark} {said}</span>'
        f"{wanted}</div></div>"
    )


def pictures_of(path: Path) -> list[np.ndarray]:
    """A picture, or frames of a clip in their order, each (height, width, 3) uint8."""
    data = path.read_bytes()
    limits = DecodeLimits(
        max_pixels=DataConfig().decode_max_pixels, max_seconds=DataConfig().decode_max_seconds
    )
    if is_image(data):
        return [decode_image(data, limits)]
    clip = decode_clip(data, fps=1.0, min_frames=FRAMES_SHOWN, max_frames=FRAMES_SHOWN, limits=limits)
    return list(clip.frames)


def is_image(data: bytes) -> bool:
    """Whether the header is that of a picture."""
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS):
            return True
    except (OSError, Image.DecompressionBombError):
        return False


def thumbnail(picture: np.ndarray) -> bytes:
    """A small JPEG of the picture."""
    image = Image.fromarray(picture)
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return file.getvalue()


def data_url(content: bytes, kind: str) -> str:
    """The picture as part of the page."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
