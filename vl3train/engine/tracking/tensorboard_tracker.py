"""The only door to TensorBoard: event files in the folder ``tensorboard`` of a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from vl3train.contracts.strict_json import json_text
from vl3train.engine.tracking.tracker import ShownAnswer, flat_figures

FOLDER = "tensorboard"
SECONDS_IN_MEMORY = 10
"""A killed process loses so much; metrics.jsonl loses nothing."""


class TensorboardTracker:
    """The event file of one launch."""

    def __init__(self, output_dir: str | Path, cfg_plain: Mapping[str, Any], *, step: int) -> None:
        """Begin an event file beside those of earlier launches.

        Args:
            output_dir: Folder of the run.
            cfg_plain: The whole config as plain values (``config.plain.as_plain``).
            step: Steps that are done; 0 in a new run. TensorBoard hides what an earlier launch logged of later ones.
        """
        folder = Path(output_dir).resolve() / FOLDER
        self._step = step
        self._writer: Any | None = SummaryWriter(
            str(folder), purge_step=step + 1 if step else None, flush_secs=SECONDS_IN_MEMORY
        )
        self._write(
            lambda writer: writer.add_text(
                "config", as_code(json.dumps(cfg_plain, indent=1, default=str)), step
            )
        )
        print(f"TensorBoard: tensorboard --logdir {folder}", flush=True)

    def log(self, figures: Mapping[str, Any], step: int) -> None:
        """Scalars; nested ones are named ``source_losses/captions``. Text and None are left out."""
        self._step = step

        def write(writer: Any) -> None:
            for name, value in flat_figures(figures).items():
                if isinstance(value, (int, float)) and name not in ("step", "epoch"):
                    writer.add_scalar(name, value, step)

        self._write(write)

    def answers(self, rows: Sequence[ShownAnswer], step: int) -> None:
        """A picture for each row, and a table of the texts for each source."""

        def write(writer: Any) -> None:
            for source in dict.fromkeys(row.source for row in rows):
                mine = [row for row in rows if row.source == source]
                writer.add_text(f"held_out_answers/{source}", answer_table(mine), step)
                for number, row in enumerate(mine):
                    if row.picture is not None:
                        name = f"held_out/{source}/{number}"
                        writer.add_image(name, row.picture, step, dataformats="HWC")

        self._write(write)

    def data(self, files: Sequence[Path], fingerprints: Mapping[str, Any]) -> None:
        """The fingerprints as text; the files lie in the run's folder."""
        text = as_code(json_text(fingerprints, indent=1))
        self._write(lambda writer: writer.add_text("data", text, self._step))

    def alert(self, title: str, text: str, *, is_bad: bool) -> None:
        """A text."""
        mark = "**WARNING** " if is_bad else ""
        self._write(lambda writer: writer.add_text("alerts", f"{mark}{title}: {escape(text)}", self._step))

    def finish(self, exit_code: int = 0) -> None:
        """Close the event file."""
        self._write(lambda writer: writer.close())
        self._writer = None

    def _write(self, act: Callable[[Any], object]) -> None:
        """A disk that takes no more ends the event file, and not the run."""
        if self._writer is None:
            return
        try:
            act(self._writer)
        except OSError as error:
            print(f"TensorBoard gets no more figures of this run: {error}", flush=True)
            self._writer = None


def as_code(text: str) -> str:
    """Text as a block of code in Markdown, which TensorBoard shows."""
    return "".join(f"    {line}\n" for line in text.splitlines())


def answer_table(rows: Sequence[ShownAnswer]) -> str:
    """A table in Markdown.

    >>> row = ShownAnswer(source="a", key="k", picture=None, question="red|blue?", expected="red", answer="blue",
    ...                   scores={"exact_match": 0.0})
    >>> print(answer_table([row]))
    | | sample | question | expected | answer | exact_match |
    | --- | --- | --- | --- | --- | --- |
    | 0 | k | red&#124;blue? | red | blue | 0 |
    """
    metrics = list(dict.fromkeys(name for row in rows for name in row.scores))
    lines = [["", "sample", "question", "expected", "answer", *metrics]]
    lines.append(["---"] * len(lines[0]))
    for number, row in enumerate(rows):
        texts = [
            escape(one).replace("|", "&#124;").replace("\n", "<br>")
            for one in (row.key, row.question, row.expected, row.answer)
        ]
        scores = [f"{row.scores[name]:g}" if name in row.scores else "" for name in metrics]
        lines.append([str(number), *texts, *scores])
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)
