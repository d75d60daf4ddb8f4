"""Failed samples stop a run when they are many, not where one file is damaged."""

from __future__ import annotations

import pytest

from vl3train.engine.ranks import RunError
from vl3train.engine.run import FailedSampleLimit


def test_many_failed_samples_stop_a_run():
    limit = FailedSampleLimit(max_fraction=0.01)
    limit.count(1, seen=20, failed=10)
    with pytest.raises(
        RunError, match=r"step 2: 11 of 40 samples failed, more than data.max_failed_fraction=0.01"
    ):
        limit.count(2, seen=20, failed=1)


def test_a_damaged_file_that_sixteen_records_share_stops_none():
    limit = FailedSampleLimit(max_fraction=0.01, most_at_once=16)
    for step in range(10):
        limit.count(step + 1, seen=20, failed=16)
    with pytest.raises(RunError, match="step 11: 161 of 201 samples"):
        limit.count(11, seen=1, failed=1)
    seen = FailedSampleLimit(max_fraction=0.01, most_at_once=16, seen=100_000, failed=1000)
    with pytest.raises(RunError, match="1016 of 100016"):
        seen.count(1, seen=16, failed=16)
