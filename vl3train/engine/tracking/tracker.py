"""What a tracker takes of a run, and which one a run has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vl3train.config.choices import Tracker as TrackerKind
from vl3train.config.plain import as_plain
from vl3train.config.schema import TrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownAnswer:
    """A held-out question with what the encoder sees, for a table that a person looks at."""

    source: str
    key: str  # of the sample
    picture: np.ndarray | None  # (h, w, 3) uint8, pictures and frames side by side; None of text alone
    question: str
    expected: str
    answer: str
    scores: Mapping[str, float]


class Tracker(Protocol):
    """Where a run's figures go, besides the console and metrics.jsonl. Step N is that after which N are done."""

    def log(self, figures: Mapping[str, Any], step: int) -> None:
        """Figures of one step. Nested ones are named ``source_losses/captions``; None is left out."""

    def answers(self, rows: Sequence[ShownAnswer], step: int) -> None:
        """Generated answers to held-out questions."""

    def data(self, files: Sequence[Path], fingerprints: Mapping[str, Any]) -> None:
        """What the run's data are: files that say it, and a fingerprint of each split and source."""

    def alert(self, title: str, text: str, *, is_bad: bool) -> None:
        """What a person should hear of: skipped steps, a run that goes back, stops or ends."""

    def finish(self, exit_code: int = 0) -> None:
        """The end; a code other than 0 marks a run that failed. May be called twice. Returns when all is written."""


class NoTracker:
    """Every call does nothing: of a run that is not tracked, and of all ranks but the first."""

    def log(self, figures: Mapping[str, Any], step: int) -> None:
        """Nothing."""

    def answers(self, rows: Sequence[ShownAnswer], step: int) -> None:
        """Nothing."""

    def data(self, files: Sequence[Path], fingerprints: Mapping[str, Any]) -> None:
        """Nothing."""

    def alert(self, title: str, text: str, *, is_bad: bool) -> None:
        """Nothing."""

    def finish(self, exit_code: int = 0) -> None:
        """Nothing."""


def start_tracker(cfg: TrainConfig, folder: Path, *, step: int, is_first: bool) -> Tracker:
    """The tracker of a run in ``folder`` that has done ``step`` steps. Imports its library only where it is used.

    Raises ValueError where ``tracking.mode=auto`` looks for W&B's key in a netrc file that cannot be read.
    """
    if cfg.tracking.kind is TrackerKind.none or not is_first:
        return NoTracker()
    if cfg.tracking.kind is TrackerKind.wandb:
        from vl3train.engine.tracking.wandb_tracker import WandbTracker

        return WandbTracker(cfg.tracking, folder, as_plain(cfg), step=step)
    from vl3train.engine.tracking.tensorboard_tracker import TensorboardTracker

    return TensorboardTracker(folder, as_plain(cfg), step=step)


def flat_figures(figures: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested figures with their names joined.

    >>> flat_figures({"loss": 2.0, "memory_gib": None, "source_losses": {"captions": 1.5}})
    {'loss': 2.0, 'source_losses/captions': 1.5}
    """
    flat: dict[str, Any] = {}
    for name, value in figures.items():
        if isinstance(value, Mapping):
            flat.update(flat_figures(value, f"{prefix}{name}/"))
        elif value is not None:
            flat[prefix + name] = value
    return flat
