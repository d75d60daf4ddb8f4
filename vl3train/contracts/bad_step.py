"""What is kept of a step that was skipped: ``bad_steps/step_00000123.json`` in the output folder."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vl3train.contracts.files import write_whole
from vl3train.contracts.strict_json import json_text, without_texts

FOLDER = "bad_steps"


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleLoss:
    """The loss of one sample in a step that was skipped."""

    key: str
    source: str
    rank: int
    micro_batch: int
    supervised_tokens: int
    loss: float | None  # mean over its supervised tokens; None where it has none

    @property
    def is_finite(self) -> bool:
        """Whether its loss is a number; so is that of a sample without supervised tokens."""
        return self.loss is None or math.isfinite(self.loss)

    def __str__(self) -> str:
        """Its loss in words."""
        return "no supervised token" if self.loss is None else f"loss {self.loss:.4g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BadStep:
    """A step that was skipped, with the samples of all ranks: first those whose loss is not finite, then by loss."""

    step: int  # 1 is the first
    epoch: int
    reason: str
    loss: float
    grad_norm: float
    part_grad_norms: dict[str, float]
    most_loss: float | None  # the limits; None where there were none yet
    most_grad_norm: float | None
    source_losses: dict[str, float]
    samples: tuple[SampleLoss, ...]

    @property
    def not_finite(self) -> list[SampleLoss]:
        """The samples whose loss is not finite."""
        return [sample for sample in self.samples if not sample.is_finite]


def dump_path(output_dir: Path, step: int) -> Path:
    """Where a run keeps a skipped step.

    >>> dump_path(Path("runs/a"), 123).as_posix()
    'runs/a/bad_steps/step_00000123.json'
    """
    return output_dir / FOLDER / f"step_{step:08d}.json"


def write_bad_step(path: Path, bad: BadStep) -> None:
    """Write the file, whole.

    Raises OSError where the disk does not take it.
    """
    path.parent.mkdir(exist_ok=True)
    write_whole(path, json_text(dataclasses.asdict(bad), indent=1) + "\n")


def read_bad_step(path: Path) -> BadStep:
    """The step of a file that ``write_bad_step`` wrote.

    Raises ValueError for a file that cannot be read or holds something else.
    """
    try:
        found = numbered_from_1(without_texts(json.loads(path.read_text(encoding="utf-8"))))
        samples = tuple(SampleLoss(**sample) for sample in found.pop("samples"))
        return BadStep(**found, samples=samples)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not the file of a skipped step: {error}") from error


SINCE = "part_grad_norms"
"""A key that every line of figures, and every file of a skipped step, has since steps are numbered from 1."""


def numbered_from_1(entry: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl, or what is kept of a skipped step: after its step N, N are done, as people count.

    Builds before 2026-12 counted from 0, and wrote no norms of parts.

    >>> numbered_from_1({"step": 0, "loss": 2.5})
    {'step': 1, 'loss': 2.5, 'part_grad_norms': {}}
    >>> numbered_from_1({"step": 7, "part_grad_norms": {"projector": 0.5}})["step"]
    7
    """
    return entry if SINCE in entry else {**entry, "step": entry["step"] + 1, SINCE: {}}
