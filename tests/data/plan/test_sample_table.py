"""What workers are sent of a long index is a path; mapped, it is the same index and the same plan."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.plan.test_plan import all_steps, step_config
from tests.data.shards.test_index import LIMITS, SETTINGS
from vl3train.contracts.records import Cursor
from vl3train.data.loader import OpenData, PackDataset
from vl3train.data.plan.order import OrderRules
from vl3train.data.plan.plan import Plan
from vl3train.data.sealed import file_digest, write_sealed_json
from vl3train.data.shards import index as index_module
from vl3train.data.shards.index import SCHEMA, USABLE, open_index
from vl3train.data.shards.manifest import MANIFEST, IndexPlace, rows_path


def place_of(shards):
    return IndexPlace(shards=shards, settings=SETTINGS, limits=LIMITS)


def write_index(shards, num_samples, *, num_shards=4):
    """An index as the index pass leaves it, of shards that have no content; every hundredth sample is refused."""
    folder, random = place_of(shards).folder, np.random.default_rng(0)
    folder.mkdir(parents=True)
    entries = []
    for number in range(num_shards):
        count = num_samples // num_shards
        bad = np.arange(count) % 100 == 99
        tokens = random.integers(10, 300, count)
        columns = {
            "key": [f"{number:03d}{sample:07d}" for sample in range(count)],
            "part_names": [["0.jpg", "json"]] * count,
            "part_offsets": [[512, 90_000]] * count,
            "part_sizes": [[80_000, 300]] * count,
            "part_crc32s": [[1, 2]] * count,
            "unread_parts": [[]] * count,
            "remarks": [[]] * count,
            "num_tokens": tokens,
            "num_supervised_tokens": tokens // 2,
            "num_visual_tokens": tokens // 2,
            "num_patches": tokens,
            "num_patch_pairs": tokens**2,
            "grids": [[1, 6, 8]] * count,
            "merge_sizes": [[1]] * count,
            "kept_tokens": [[48]] * count,
            "modality": ["image"] * count,
            "record": np.zeros(count, np.int64),
            "prefix_tokens": tokens // 2 + 5,
            "family": np.arange(count) // 3 + 1,
            "status": np.where(bad, "image cannot be read", USABLE),
        }
        shard = shards / f"{number:05d}.tar"
        shard.write_bytes(b"")
        rows = rows_path(folder, shard.name)
        pq.write_table(pa.table(columns, SCHEMA), rows)
        entry = {"name": shard.name, "bytes": 0, "samples": count, "rejected": int(bad.sum())}
        entry["file_sha256"] = file_digest(rows)
        digest = hashlib.sha256(tokens.tobytes()).hexdigest()
        entries.append({**entry, "unread_parts": {}, "remarks": {}, "rows_sha256": digest})
    manifest = {"settings": dataclasses.asdict(SETTINGS), "limits": dataclasses.asdict(LIMITS)}
    write_sealed_json(folder / MANIFEST, {**manifest, "shards": entries})


def opened(shards, folder):
    index = open_index([("some", 1.0, place_of(shards))], folder=folder)
    return index, Plan(index.sample_table(), 3, step_config(), order=OrderRules(block_shards=2), cache=folder)


def dataset_of(index, plan, tmp_path):
    data = OpenData(
        index=index,
        plan=plan,
        settings=SETTINGS,
        tokenizer_dir=tmp_path,
        limits=LIMITS,
        decode_seconds=1.0,
        retry_seconds=0.0,
    )
    return PackDataset(data=data, first=Cursor(), rank=0, dp_size=1, loss_chunk_tokens=512)


def test_a_dataset_of_200_000_samples_is_sent_in_less_than_a_megabyte(tmp_path):
    write_index(tmp_path, 200_000)
    index, plan = opened(tmp_path, tmp_path / "cache")
    assert index.num_samples == 198_000
    packs = plan.step_packs(Cursor())
    sent = pickle.dumps(dataset_of(index, plan, tmp_path))
    assert len(sent) < 100_000
    got = pickle.loads(sent).data
    assert got.plan.step_packs(Cursor()) == packs
    assert got.plan.fingerprint == plan.fingerprint
    assert got.index.rejected == index.rejected
    assert len(got.index.rejected) == 2000
    for row in (0, 77_777, 197_999):
        assert (got.index.key(row), got.index.lengths(row)) == (index.key(row), index.lengths(row))
    for values in got.plan._columns[:4]:  # the compiled code reads the file itself
        assert not values.flags.owndata
        assert not values.flags.writeable


def test_mapped_or_in_memory_it_is_the_same(tmp_path, monkeypatch):
    write_index(tmp_path, 400)
    in_memory, plan = opened(tmp_path, tmp_path / "cache")
    assert in_memory.file is None  # a short one is not worth a file
    monkeypatch.setattr(index_module, "MAPPED_FROM_SAMPLES", 1)
    written, _ = opened(tmp_path, tmp_path / "cache")
    monkeypatch.setattr(pq, "read_table", None)  # found there, no parquet is read
    mapped, mapped_plan = opened(tmp_path, tmp_path / "cache")
    assert mapped.file == written.file
    assert mapped.file.is_file()
    assert mapped.rows.equals(in_memory.rows)
    assert (mapped.rejected, mapped.sizes) == (in_memory.rejected, in_memory.sizes)
    assert mapped.fingerprint == in_memory.fingerprint
    assert all_steps(mapped_plan, 0) == all_steps(plan, 0)
    assert all_steps(pickle.loads(pickle.dumps(mapped_plan)), 1) == all_steps(plan, 1)
    assert all_steps(pickle.loads(pickle.dumps(plan)), 1) == all_steps(plan, 1)


def test_a_deleted_file_is_named(tmp_path, monkeypatch):
    write_index(tmp_path, 400)
    monkeypatch.setattr(index_module, "MAPPED_FROM_SAMPLES", 1)
    index, _ = opened(tmp_path, tmp_path / "cache")
    sent = pickle.dumps(index)
    index.file.unlink()
    with pytest.raises(RuntimeError, match=r"was deleted while a run used it. Start the run again"):
        pickle.loads(sent)


def test_a_damaged_file_is_told_and_written_again(tmp_path, monkeypatch):
    """A library that maps it would die of it, or plan with other numbers."""
    write_index(tmp_path, 400)
    monkeypatch.setattr(index_module, "MAPPED_FROM_SAMPLES", 1)
    index, plan = opened(tmp_path, tmp_path / "cache")
    expected, good = all_steps(plan, 0), index.file.read_bytes()
    middle = len(good) // 2
    for bad in (b"", good[:40], good[:-8], good + b"x", good[:middle] + b"\xff" * 9 + good[middle + 9 :]):
        index.file.write_bytes(bad)
        with pytest.warns(UserWarning, match=r"\.arrow is damaged and is made again"):
            again, plan = opened(tmp_path, tmp_path / "cache")
        assert (all_steps(plan, 0), again.file.read_bytes()) == (expected, good)
