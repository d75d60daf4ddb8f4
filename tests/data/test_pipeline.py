"""The same packs for every world, worker count and resume; every sample once; failed ones keep their place."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections import Counter

import pytest
import torch

from tests.data.shards_fixture import make_recipe, train_config
from vl3train.contracts.records import Cursor, TooManyFailed
from vl3train.data.pipeline import evaluation_batches, open_data, train_steps
from vl3train.data.shards.manifest import MissingIndexError


@pytest.fixture(scope="module")
def root(tmp_path_factory, tokenizer_dir):
    """A recipe with its index built."""
    root = tmp_path_factory.mktemp("data")
    cfg = train_config(root, make_recipe(root))
    for held_out in (False, True):
        open_data(cfg, tokenizer_dir=tokenizer_dir, held_out=held_out, build=True)
    return root


def opened(root, tokenizer_dir, held_out=False, num_workers=0, **step):
    cfg = train_config(root, root / "recipe.yaml", **step)
    cfg.data.num_workers = num_workers
    return open_data(cfg, tokenizer_dir=tokenizer_dir, held_out=held_out, build=False), cfg


def contents(batch):
    """A digest of everything that the model reads of a batch."""
    digest = hashlib.sha256()
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        digest.update(
            value.contiguous().numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode()
        )
    return digest.hexdigest()


def run_steps(data, cfg, first, last, dp_size, tmp_path):
    """All ranks' steps: for each step the batches' digests, sorted."""
    ranks = [
        list(
            train_steps(
                data,
                cfg,
                first=first,
                last_step=last,
                rank=rank,
                dp_size=dp_size,
                ledger_path=tmp_path / f"{rank}.jsonl",
            )
        )
        for rank in range(dp_size)
    ]
    for steps in zip(*ranks, strict=True):
        assert len({(step.cursor, step.num_supervised_tokens, step.fill) for step in steps}) == 1
        assert {len(step.batches) for step in steps} == {4 // dp_size}
        for micro_batch in zip(*(step.batches for step in steps), strict=True):
            assert len({batch.num_loss_chunks for batch in micro_batch}) == 1
    return [
        sorted(
            contents(dataclasses.replace(batch, num_loss_chunks=1)) for one in steps for batch in one.batches
        )
        for steps in zip(*ranks, strict=True)
    ]


def test_worlds_workers_and_resumes_see_the_same_packs(root, tokenizer_dir, tmp_path):
    data, cfg = opened(root, tokenizer_dir)
    last = data.plan.steps_in_epoch(0) + 2  # into the second epoch
    straight = run_steps(data, cfg, Cursor(), last, 1, tmp_path)
    assert len(straight) == last > 5
    for dp_size, num_workers, first in ((1, 2, 0), (2, 0, 0), (4, 0, 3), (2, 1, last - 3), (1, 0, last)):
        again, cfg = opened(root, tokenizer_dir, num_workers=num_workers)
        cursor = again.plan.cursor_at(first)
        assert run_steps(again, cfg, cursor, last, dp_size, tmp_path) == straight[first:]


def test_an_epoch_holds_every_sample_once_and_counts_what_it_holds(root, tokenizer_dir, tmp_path):
    data, cfg = opened(root, tokenizer_dir)
    steps = list(
        train_steps(
            data,
            cfg,
            first=Cursor(),
            last_step=data.plan.steps_in_epoch(0),
            rank=0,
            dp_size=1,
            ledger_path=tmp_path / "l",
        )
    )
    keys = Counter(key for step in steps for batch in step.batches for key in batch.segment_keys)
    keys.pop("filler", None)
    assert not data.plan.oversized_samples
    assert keys == {data.index.key(row): 1 for row in range(data.index.num_samples)}
    assert len(keys) == 9 + 8 + 20
    for step in steps:
        real = [batch for batch in step.batches if batch.num_planned_tokens]
        assert step.num_tokens == sum(len(batch.input_ids) for batch in real)
        assert step.num_patches == sum(
            len(batch.pixel_values) for batch in real if len(batch.placeholder_positions)
        )
        assert step.num_supervised_tokens == sum(len(batch.supervised_labels) for batch in step.batches)
        assert step.num_samples == sum(len(batch.segment_keys) for batch in real)
        assert 0 < step.fill <= 1
        for batch in step.batches:
            assert len(batch.input_ids) <= cfg.step.max_tokens
            assert len(batch.pixel_values) <= cfg.step.max_patches
            assert len(batch.supervised_labels) <= batch.num_loss_chunks * cfg.machine.loss_chunk_tokens
    assert {source for step in steps for batch in step.batches for source in batch.segment_sources} >= {
        0,
        1,
        2,
    }


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_held_out_samples_come_once_in_as_many_batches_on_each_rank(root, tokenizer_dir, dp_size):
    data, cfg = opened(root, tokenizer_dir, held_out=True)
    assert data.source_names == ("pictures", "clips", "words")
    ranks = [list(evaluation_batches(data, cfg, rank, dp_size)) for rank in range(dp_size)]
    assert len({len(batches) for batches in ranks}) == 1
    keys = Counter(key for batches in ranks for batch in batches for key in batch.segment_keys)
    keys.pop("filler", None)
    assert keys == {data.index.key(row): 1 for row in range(7)}
    for micro_batch in zip(*ranks, strict=True):
        assert len({batch.num_loss_chunks for batch in micro_batch}) == 1


def test_a_sample_that_rots_keeps_its_place_and_is_written_down(root, tokenizer_dir, tmp_path):
    copy = shutil.copytree(root, tmp_path / "data")
    data, cfg = opened(copy, tokenizer_dir)
    last = data.plan.steps_in_epoch(0)

    def run(name):
        ledger = tmp_path / name
        steps = train_steps(data, cfg, first=Cursor(), last_step=last, rank=0, dp_size=1, ledger_path=ledger)
        return [batch for step in steps for batch in step.batches], ledger

    before, clean = run("clean")
    assert not clean.exists()
    row = 3  # a picture
    offset = data.index.rows["part_offsets"][row].as_py()[0] + 99
    content = bytearray(data.index.shard(row).read_bytes())
    content[offset] ^= 1
    data.index.shard(row).write_bytes(content)
    after, ledger = run("ledger")
    (entry,) = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert entry["key"] == data.index.key(row)
    assert entry["shard"] == str(data.index.shard(row))
    assert "crc32" in entry["reason"]
    differing = [(a, b) for a, b in zip(before, after, strict=True) if contents(a) != contents(b)]
    ((a, b),) = differing
    assert (b.num_failed_samples, a.num_failed_samples) == (1, 0)
    assert (a.segment_lengths, a.frame_lengths, a.segment_keys) == (
        b.segment_lengths,
        b.frame_lengths,
        b.segment_keys,
    )
    lost = data.index.lengths(row).num_supervised_tokens
    assert len(a.supervised_labels) - len(b.supervised_labels) == lost > 0


def test_a_run_stops_when_its_shards_are_gone(root, tokenizer_dir, tmp_path):
    copy = shutil.copytree(root, tmp_path / "data")
    data, cfg = opened(copy, tokenizer_dir)
    data = dataclasses.replace(data, retry_seconds=0.2)
    shutil.rmtree(copy / "words")  # 20 of 37 samples
    options = {"first": Cursor(), "last_step": 9, "rank": 0, "dp_size": 1, "ledger_path": tmp_path / "l"}
    cfg.data.max_consecutive_failed = 30
    assert list(train_steps(data, cfg, **options))
    cfg.data.max_consecutive_failed = 2
    with pytest.raises(TooManyFailed, match=r"2 samples failed one after .*max_consecutive_failed=2.*resume"):
        list(train_steps(data, cfg, **options))
    last = json.loads((tmp_path / "l").read_text().splitlines()[-1])
    assert "cannot be read" in last["reason"]


def test_samples_larger_than_a_pack_are_reported(root, tokenizer_dir):
    data, _ = opened(root, tokenizer_dir, max_tokens=60)
    table = data.plan.table
    assert data.plan.oversized_samples == tuple(row for row in range(37) if table.num_tokens[row] > 60)
    with pytest.raises(ValueError, match="no sample to train on"):
        opened(root, tokenizer_dir, max_tokens=2)


def test_what_is_missing_is_refused(root, tokenizer_dir):
    cfg = train_config(root, root / "recipe.yaml")
    cfg.data.fps = 1.0
    with pytest.raises(MissingIndexError, match=r"(?s)pictures.*clips.*words"):
        open_data(cfg, tokenizer_dir=tokenizer_dir, held_out=False, build=False)
    cfg.data.root = str(root / "elsewhere")
    with pytest.raises(ValueError, match=r"no \.tar shards"):
        open_data(cfg, tokenizer_dir=tokenizer_dir, held_out=False, build=True)
