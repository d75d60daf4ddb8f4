"""The options of the section ``finetune``: what `vl3train finetune` makes a run's data from."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True, slots=True)
class FinetuneConfig:
    """What `vl3train finetune` makes a run's data from. `vl3train train` reads the data that are made already."""

    records: list[str] = field(default_factory=list)
    """Files of records, in every form that `vl3train shards` reads."""

    media_roots: list[str] = field(default_factory=list)
    """Folders that paths in records start from, and that no medium may lie outside of. Unset: the folder you are in,
    and the folders of the records' files."""

    held_out: str = "5%"
    """Samples that are evaluated and never trained on: a share (5%), a number, or a file of records. 0: none. They are
    chosen by medium: no picture or clip is on both sides."""

    skip_rejected: bool = False
    """Train although records or samples are rejected: on the others."""

    predictions: int = 100
    """Most held-out samples that the trained model answers questions about, for predictions.jsonl and the report. 0:
    none."""
