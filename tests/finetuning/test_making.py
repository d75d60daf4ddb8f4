"""How far a long step is comes at most every few seconds; a short one says nothing."""

from __future__ import annotations

from vl3train.finetuning import making


def test_progress_is_told_at_most_every_five_seconds(monkeypatch):
    now = 100.0
    monkeypatch.setattr(making.time, "monotonic", lambda: now)
    lines = []
    progress = making.Progress(lines.append)
    for count in range(100):
        now += 0.1
        progress.told(f"records: {count}")
    assert len(lines) in (1, 2), "ten seconds passed"
    assert lines[0].startswith("records: 4") or lines[0] == "records: 50"
