"""Every planted fault is told with its reason; the samples around it are used; used and refused make all."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from tests.data.faults_fixture import AFTER, BEFORE, plant_faults
from tests.data.shards_fixture import train_config
from vl3train.contracts.records import Cursor
from vl3train.data.pipeline import open_data, train_steps

DECODE_SECONDS = 4.0


@pytest.fixture(scope="module")
def outcome(tmp_path_factory, tokenizer_dir):
    """All faults in one recipe, indexed and trained on for one epoch: used and refused keys of each."""
    root = tmp_path_factory.mktemp("faults")
    faults = plant_faults(root)
    recipe = root / "recipe.yaml"
    recipe.write_text("name: faults\nabout: tests\nsources:\n")
    for number, fault in enumerate(faults):
        folder = root / f"s{number}"
        folder.mkdir()
        (folder / "a.tar").write_bytes(fault.shard)
        with recipe.open("a") as file:
            file.write(f"  - {{name: s{number}, shards: s{number}}}\n")
    cfg = train_config(root, recipe)
    cfg.data.num_workers = 2
    cfg.data.decode_seconds = DECODE_SECONDS
    data = open_data(cfg, tokenizer_dir=tokenizer_dir, held_out=False, build=True)
    for number, fault in enumerate(faults):
        if fault.rot is not None:
            shard = bytearray(fault.shard)
            fault.rot(shard)
            (root / f"s{number}" / "a.tar").write_bytes(shard)
    ledger = root / "ledger.jsonl"
    steps = list(
        train_steps(
            data,
            cfg,
            first=Cursor(),
            last_step=data.plan.steps_in_epoch(0),
            rank=0,
            dp_size=1,
            ledger_path=ledger,
        )
    )
    entries = [json.loads(line) for line in ledger.read_text().splitlines()]
    rotten = {entry["key"]: entry["reason"] for entry in entries}
    seen = Counter(key for step in steps for batch in step.batches for key in batch.segment_keys)
    seen.pop("filler", None)
    assert set(seen.values()) == {1}
    assert set(seen) == {data.index.key(row) for row in range(data.index.num_samples)}
    assert sum(batch.num_skipped_samples for step in steps for batch in step.batches) == len(entries)
    return faults, dict(data.index.refused), rotten, set(seen) - set(rotten), data


def of(number, keys):
    return {key.removeprefix(f"s{number}/a/") for key in keys if key.startswith(f"s{number}/")}


def test_used_and_refused_make_all(outcome):
    faults, refused, rotten, used, _ = outcome
    for number, fault in enumerate(faults):
        out = of(number, refused) | of(number, rotten)
        samples = {key for key in out if not key.startswith("@")}
        assert of(number, used) == fault.used, fault.name
        assert samples | of(number, used) == fault.samples, fault.name
        assert not samples & of(number, used), fault.name
        if AFTER in fault.samples:
            assert {BEFORE, AFTER} <= of(number, used), fault.name


def test_each_is_told_with_its_reason(outcome):
    faults, refused, rotten, _, data = outcome
    for number, fault in enumerate(faults):
        if fault.name == "a .pyd member":
            assert (f"s{number}", "pyd", 1) in data.index.unread_parts
            continue
        told = rotten if fault.when == "run" else refused
        reasons = [reason for key, reason in told.items() if key.startswith(f"s{number}/")]
        assert any(fault.said in reason for reason in reasons), (fault.name, reasons)


def test_nothing_of_a_shard_was_run(outcome, tmp_path):
    import pathlib

    assert not pathlib.Path("pwned").exists()
