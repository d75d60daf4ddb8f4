"""A run without shared prefixes says what they would save, where that is much."""

from __future__ import annotations

import re

import pytest

from tests.data.plan.test_families import table
from vl3train.config.schema import TrainConfig
from vl3train.engine.start.data import sharing_remarks


@pytest.mark.parametrize(
    ("counts", "shares", "said"),
    [([8] * 6, False, 1), ([1] * 6, False, 0), ([1] * 90 + [2], False, 0), ([8] * 6, True, 0)],
)
def test_what_shared_prefixes_would_save(counts, shares, said):
    cfg = TrainConfig()
    cfg.data.share_prefix = shares
    remarks = sharing_remarks(cfg, table(counts))
    assert len(remarks) == said
    for remark in remarks:
        assert re.search(r"67% of the samples .*data.share_prefix=true would take \d\d% fewer tokens", remark)
