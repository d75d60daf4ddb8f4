"""Every planted fault is told with its reason; the samples around it are used; used and refused make all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.faults_fixture import AFTER, BEFORE, fault_outcomes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, tokenizer_dir):
    return fault_outcomes(tmp_path_factory.mktemp("faults"), tokenizer_dir, decode_seconds=4.0)


def test_used_and_refused_make_all(outcomes):
    for one in outcomes:
        assert one.used == one.planted.used, one.planted.name
        assert one.used | one.rejected_samples == one.planted.samples, one.planted.name
        assert not one.used & one.rejected_samples, one.planted.name
        if AFTER in one.planted.samples:
            assert {BEFORE, AFTER} <= one.used, one.planted.name


def test_each_is_told_with_its_reason(outcomes):
    wrong = [
        (one.planted.name, one.said, one.refused) for one in outcomes if one.planted.said not in one.said
    ]
    assert not wrong
    assert all(one.accounted for one in outcomes)
    assert len(outcomes) >= 22


def test_nothing_of_a_shard_was_run(outcomes):
    assert not Path("pwned").exists()
