"""One run in progress, and the limit on samples that fail in it. engine/start/ builds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vl3train.config.plain import as_plain
from vl3train.config.schema import TrainConfig
from vl3train.contracts.records import Cursor
from vl3train.data.pipeline import OpenData
from vl3train.data.recipe import Recipe
from vl3train.engine.bad_steps.record import BadSteps
from vl3train.engine.best import Best
from vl3train.engine.checkpoints.saver import Saver
from vl3train.engine.held_out.evaluations_file import EVALUATIONS, evaluations_before
from vl3train.engine.mirror.uploads import Uploads
from vl3train.engine.monitor.console import Console
from vl3train.engine.monitor.meter import Meter
from vl3train.engine.monitor.metrics_file import metrics_digest
from vl3train.engine.ranks import Rank, RunError
from vl3train.engine.start.lock import FolderLock
from vl3train.engine.tracking.tracker import Tracker
from vl3train.engine.zero.engine import Zero
from vl3train.model.packed_forward import PackedModel


@dataclass(kw_only=True)
class FailedSampleLimit:
    """Counts samples that failed, and stops the run when they are too many."""

    max_fraction: float
    most_at_once: int = 1  # samples that one damaged file may cost: the records of a shared prefix
    seen: int = 0
    failed: int = 0

    def count(self, step: int, seen: int, failed: int) -> None:
        """Add the samples of ``step``, 1 for the first; all ranks count the same numbers.

        Raises RunError when more than ``max_fraction`` of the samples failed: of a thousand times ``most_at_once``,
        while fewer were seen.
        """
        self.seen += seen
        self.failed += failed
        if self.failed > self.max_fraction * max(self.seen, 1000 * self.most_at_once):
            raise RunError(
                f"step {step}: {self.failed} of {self.seen} samples failed, more than "
                f"data.max_failed_fraction={self.max_fraction} allows. ledger.rank*.jsonl in the output folder lists "
                "their keys and the reasons. Repair them, or raise the limit if you can train without them."
            )

    def state(self) -> dict[str, int]:
        """The counts, as resume.json keeps them."""
        return {"seen": self.seen, "failed": self.failed}

    def load(self, resume: Mapping[str, Any]) -> None:
        """Take the counts of a resume.json. A missing key is an error."""
        if "bad_samples" in resume:  # its name before 2026-12
            self.seen, self.failed = resume["bad_samples"]["seen"], resume["bad_samples"]["bad"]
        else:
            self.seen, self.failed = resume["failed_samples"]["seen"], resume["failed_samples"]["failed"]


@dataclass(kw_only=True)
class Run:
    """One run in progress. ``cursor`` names the next step; everything else stays as it was built."""

    cfg: TrainConfig
    rank: Rank
    folder: Path
    lock: FolderLock
    data: OpenData
    held_out: OpenData | None
    recipe: Recipe  # as it was at the start: the file may be edited meanwhile
    engine: Zero
    packed: PackedModel
    num_steps: int
    cursor: Cursor
    identity: dict[str, Any]
    base_manifest: str | None
    saver: Saver
    uploads: Uploads | None
    console: Console
    tracker: Tracker
    failed_samples: FailedSampleLimit
    bad_steps: BadSteps
    meter: Meter
    best: Best
    is_evaluated: bool
    """Whether the evaluation that is due after the steps that were done at the start has been made."""
    source_names: list[str] = field(default_factory=list)
    unwritten_evaluations: list[dict[str, Any]] = field(default_factory=list)
    """Which the disk has not taken yet; on the first rank."""

    @property
    def is_finished(self) -> bool:
        """Whether every step is done, or the run has ended early."""
        return self.cursor.step == self.num_steps or self.best.is_over

    def resume_state(self) -> dict[str, Any]:
        """Everything a resume needs beside the engine's own state. For the first rank, which writes it."""
        return {
            "cursor": dataclasses.asdict(self.cursor),
            "identity": self.identity,
            "base": self.base_manifest,
            "failed_samples": self.failed_samples.state(),
            "bad_steps": self.bad_steps.state(),
            "metrics": metrics_digest(self.folder),
            "evaluations": evaluations_before(self.folder / EVALUATIONS, self.cursor.step),
            "config": as_plain(self.cfg),
        }
