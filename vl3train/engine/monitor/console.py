"""What a person sees of a run, and metrics.jsonl beside it."""

from __future__ import annotations

import atexit
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from vl3train.contracts.line_log import LineLog
from vl3train.contracts.progress.record import progress
from vl3train.contracts.strict_json import json_text
from vl3train.engine.monitor.metrics_file import METRICS, truncate_metrics

SECONDS_BETWEEN_LINES = 5.0
"""Without a terminal at most one line is printed in this time, and always the first and the last step."""


class Console:
    """A live progress bar on a terminal, plain lines elsewhere, and one line of metrics.jsonl for each step.

    Only rank 0's is ``enabled``; the others print and write nothing.
    """

    def __init__(
        self, output_dir: str | Path, *, stage_name: str, enabled: bool, out: TextIO | None = None
    ) -> None:
        """Get ready to print; the bar begins with ``start``.

        Args:
            output_dir: Folder of metrics.jsonl; made with the first figures.
            stage_name: First word of the bar and of each line.
            enabled: Whether this process prints and writes.
            out: Where to print; None is standard output.
        """
        self._enabled = enabled
        self._name = stage_name
        self._rich = RichConsole(file=out if out is not None else sys.stdout, highlight=False)
        self._path = Path(output_dir) / METRICS
        self._log = LineLog(self._path, self.message)
        self._total_steps = 0
        self._pace = Pace()
        self._last_line_time = -float("inf")
        self._bar: Progress | None = None

    def start(self, *, first_step: int, total_steps: int) -> None:
        """Begin the bar. ``first_step`` is the next step; it is not 0 in a resumed run."""
        self._total_steps = total_steps
        self._pace = Pace()
        self._last_line_time = -float("inf")
        if self._enabled and self._rich.is_terminal:
            self._bar = BarAndFigures(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=40),
                MofNCompleteColumn(),
                console=self._rich,
            )
            self._task = self._bar.add_task(
                self._name, total=total_steps, completed=first_step, figures="first step ..."
            )
            self._bar.start()
            atexit.register(self.close)  # a crash must not leave the terminal without its cursor

    def progress(self, source: str, done: int, total: int) -> None:
        """Show the progress of the index pass over a source."""
        self.count(f"index of {source}", done, total, "samples")

    def count(self, what: str, done: int, total: int, unit: str) -> None:
        """Show the progress of work before the first step; at most one line every 5 s, and the last one."""
        progress.touch()
        now = time.monotonic()
        if self._enabled and (now - self._last_line_time >= SECONDS_BETWEEN_LINES or done == total):
            self._last_line_time = now
            self._print(f"{what}  {done}/{total} {unit}")

    def metrics(self, figures: Mapping[str, Any]) -> None:
        """Show the figures of one step, and append them to metrics.jsonl. Its ``step`` is 1 for the first.

        When this returns, the operating system has the line: a killed process loses none. Where the disk does not take
        it, the run goes on (contracts/line_log.py).
        """
        if not self._enabled:
            return
        self._log.append([json_text(figures)])
        done = int(figures["step"])
        seconds_left = self._pace.seconds_left(done, self._total_steps)
        text = figures_text(figures, seconds_left)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, figures=text)
            return
        now = time.monotonic()
        if now - self._last_line_time >= SECONDS_BETWEEN_LINES or done == self._total_steps:
            self._last_line_time = now
            self._print(f"{self._name}  step {done}/{self._total_steps}  {text}")

    def table(self, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Print rows with the same keys; the first column is text, the others are figures."""
        if not self._enabled or not rows:
            return
        table = Table(title=title, title_justify="left", title_style="bold")
        for i, column in enumerate(rows[0]):
            table.add_column(column, justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*(str(value) for value in row.values()))
        self._rich.print(table)

    def go_back(self, step: int) -> None:
        """Go on where ``step`` steps are done: later lines of metrics.jsonl move to metrics.replaced.jsonl."""
        if self._enabled:
            self._log.append([])  # what still waits for the disk belongs before that
            truncate_metrics(self._path, step)
            self._log.was_cut()
            self._pace = Pace()

    def message(self, text: str) -> None:
        """Print one message, above the bar where there is one."""
        if self._enabled:
            self._print(text)

    def close(self) -> None:
        """End the bar as it is, and write the figures that still wait. May be called twice."""
        self._log.close()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            atexit.unregister(self.close)

    def _print(self, text: str) -> None:
        self._rich.print(text, markup=False, soft_wrap=True)
        self._rich.file.flush()


class BarAndFigures(Progress):
    """A bar with its figures on a second line, so that a narrow terminal cuts off none of them."""

    def get_renderables(self) -> Iterator[RenderableType]:
        """What is drawn, from top to bottom."""
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text(task.fields["figures"])


class Pace:
    """The time that is left, from the wall-clock of the steps so far, except the first, which warms up."""

    def __init__(self) -> None:
        self._counted_from: tuple[int, float] | None = None

    def seconds_left(self, done: int, total: int, now: float | None = None) -> float | None:
        """Seconds until ``total`` steps are done, or None while only one figure is known.

        >>> pace = Pace()
        >>> pace.seconds_left(1, 11, now=60.0) is None
        True
        >>> pace.seconds_left(3, 11, now=64.0)
        16.0
        """
        now = time.monotonic() if now is None else now
        if self._counted_from is None:
            self._counted_from = (done, now)
        since_step, since_time = self._counted_from
        if done == since_step:
            return None
        return (now - since_time) / (done - since_step) * (total - done)


def figures_text(figures: Mapping[str, Any], seconds_left: float | None = None) -> str:
    """One line of figures, without those that are absent or None.

    >>> figures_text({"step": 3, "loss": 1.25, "tokens_per_second": 15300.0, "fill": 0.942}, 75)
    'loss 1.2500  15.3k tok/s  fill 94%  left 1:15'
    """
    rates = figures.get("learning_rates") or {}
    shown = [
        ("loss", "loss {:.4f}", figures.get("loss")),
        ("grad_norm", "grad {:.2f}", figures.get("grad_norm")),
        ("lr", "lr {:.1e}", max(rates.values(), default=None)),
        ("tokens", "{} tok/s", short_count(figures.get("tokens_per_second"))),
        ("patches", "{} patch/s", short_count(figures.get("patches_per_second"))),
        ("work", "{:.0f} TFLOP/s", figures["useful_tflops"] if figures.get("mfu_matmul") else None),
        ("mfu", "MFU {:.0%}", figures.get("mfu_datasheet")),
        ("recomputed", "recomputed {:.0%}", figures.get("recompute_fraction")),
        ("fill", "fill {:.0%}", figures.get("fill")),
        ("wait", "data wait {:.0%}", figures.get("data_wait_fraction")),
        ("seconds", "{:.2f} s/step", figures.get("step_seconds")),
        ("saved", "saving {:.1f} s", figures.get("save_seconds") or None),
        ("compiled", "compiled {:.1f} s", figures.get("compile_seconds") or None),
        ("left", "left {}", None if seconds_left is None else clock(seconds_left)),
        ("memory", "{:.1f} GiB", figures.get("memory_gib")),
        ("failed", "failed {}", figures.get("failed_samples") or None),
    ]
    if figures.get("skipped"):
        shown.insert(2, ("skipped", "SKIPPED", True))
    return "  ".join(form.format(value) for _, form, value in shown if value is not None)


def short_count(value: float | None) -> str | None:
    """A count in three digits.

    >>> [short_count(value) for value in (7.4, 950, 15300, 2_480_000)]
    ['7', '950', '15.3k', '2.5M']
    """
    if value is None:
        return None
    if value < 1000:
        return f"{value:.0f}"
    return f"{value / 1e3:.1f}k" if value < 999_950 else f"{value / 1e6:.1f}M"


def clock(seconds: float) -> str:
    """Time as a clock shows it.

    >>> clock(75), clock(3675)
    ('1:15', '1:01:15')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
