"""Records of the same media, from shards to batches: one prefix, decoded once, and a branch for the rest of each."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.data.conftest import LIMITS, drawn_picture, picture_bytes, still_and_moving
from tests.data.render.test_samples import SETTINGS
from tests.data.shards_fixture import train_config, turns, write_clip
from tests.data.test_pipeline import contents
from vl3train.contracts.records import Cursor, SampleError
from vl3train.contracts.tokens import IGNORE_INDEX, PATCH_VALUES
from vl3train.data.extremes import blank_batch
from vl3train.data.pipeline import evaluation_batches, open_data, store_frames, train_steps
from vl3train.data.prepare.annotated_records import AnnotatedRecords
from vl3train.data.prepare.write_shards import write_shards
from vl3train.data.records.conversation import Conversation, Image, Text, Turn
from vl3train.data.render.chat_tokens import ChatTokenizer
from vl3train.data.render.families import FamilyRecord, render_family
from vl3train.data.render.samples import measure_sample
from vl3train.data.shards.tar_headers import shard_samples

RECORDS = 4
"""Of each picture, and of the clip."""


def make_records(folder: Path) -> list[dict]:
    media = folder / "media"
    media.mkdir(parents=True)
    found = []
    for i in range(3):
        (media / f"{i}.png").write_bytes(picture_bytes(drawn_picture(80 + 20 * i, 100, i)))
        found += [
            {
                "image": f"{i}.png",
                "conversations": turns(f"<image>\nQuestion {j}, how many?", f"{i} of {j} " * (j + 1)),
            }
            for j in range(RECORDS)
        ]
    write_clip(media / "clip.mp4", still_and_moving(12, 64, 96))
    found += [
        {
            "video": "clip.mp4",
            "conversations": turns("<video>\n" + "What moves? " * (j + 1), f"A square, {j}."),
        }
        for j in range(RECORDS)
    ]
    both = {"image": ["0.png", "1.png"]}
    found += [
        {**both, "conversations": turns("<image><image>\nWhich?" + "?" * j, f"No. {j}")} for j in range(2)
    ]
    found.append({"image": "0.png", "conversations": turns("First words.\n<image>", "Another text before.")})
    found += [{"conversations": turns(f"{j} and {j}?", f"{2 * j}")} for j in range(3)]
    return [found[i] for i in np.random.default_rng(0).permutation(len(found))]


NUM_RECORDS, NUM_ALONE = 3 * RECORDS + RECORDS + 2 + 1 + 3, 4


def make_root(root, tokenizer_dir, *, share_media):
    (root / "records.jsonl").write_text("".join(json.dumps(one) + "\n" for one in make_records(root)))
    records = AnnotatedRecords((str(root / "records.jsonl"),), (root / "media",))
    limits = {"max_samples": 5, "max_bytes": 10**9, "skip_rejected": False, "share_media": share_media}
    report = write_shards(records, root / "shards", progress=lambda *_: None, **limits)
    assert report.num_written == NUM_RECORDS
    source = {"name": "mixed", "shards": "shards"}
    (root / "recipe.yaml").write_text(
        json.dumps({"name": "r", "about": "Records of a few media.", "sources": [source]})
    )
    open_data(config(root), tokenizer_dir=tokenizer_dir, held_out=False, build=True)
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory, tokenizer_dir):
    """Shards with a member for each record, and a recipe."""
    return make_root(tmp_path_factory.mktemp("families"), tokenizer_dir, share_media=False)


@pytest.fixture(scope="module")
def shared_root(tmp_path_factory, tokenizer_dir):
    """Shards with a member for each family."""
    return make_root(tmp_path_factory.mktemp("shared"), tokenizer_dir, share_media=True)


def config(root, share=True, **step):
    cfg = train_config(root, root / "recipe.yaml", **step)
    cfg.stage.prune_frames = True
    cfg.data.share_prefix, cfg.data.num_workers = share, 0
    return cfg


def opened(root, tokenizer_dir, share=True, **step):
    cfg = config(root, share, **step)
    return open_data(cfg, tokenizer_dir=tokenizer_dir, held_out=False, build=False), cfg


def epoch(data, cfg, tmp_path, first=Cursor(), rank=0, dp_size=1):  # noqa: B008 - frozen
    last = data.plan.steps_in_epoch(0)
    where = {"first": first, "last_step": last, "rank": rank, "dp_size": dp_size}
    return [
        batch
        for step in train_steps(data, cfg, **where, ledger_path=tmp_path / f"ledger-{rank}.jsonl")
        for batch in step.batches
    ]


def pieces(batches):
    """Of each sample its ids, labels and positions, with those of the prefix before them."""
    found = {}
    for batch in batches:
        starts = batch.cu_seqlens.tolist()
        labels = np.full(len(batch.input_ids), IGNORE_INDEX)
        labels[batch.supervised_positions.numpy()] = batch.supervised_labels.numpy()
        prefix, left = range(0), 0
        for i, count in enumerate(batch.num_branches):
            rows = range(starts[i], starts[i + 1])
            if count:
                prefix, left = rows, count
                continue
            whole = [*(prefix if left else ()), *rows]
            left = max(0, left - 1)
            if batch.segment_sources[i] >= 0:
                ids, places = batch.input_ids[whole].tolist(), batch.position_ids[whole].tolist()
                found[batch.segment_keys[i]] = (ids, labels[whole].tolist(), places)
    return found


def test_each_record_is_what_it_is_alone(root, tokenizer_dir, tmp_path):
    """Same ids, labels and positions; each once; and fewer patches and tokens."""
    shared, alone = (epoch(*opened(root, tokenizer_dir, share), tmp_path) for share in (True, False))
    assert pieces(shared) == pieces(alone)
    assert Counter(key for batch in shared for key in batch.sample_keys) == Counter(pieces(alone).keys())
    assert len(pieces(shared)) == NUM_RECORDS
    assert sum(map(sum, (batch.num_branches for batch in shared))) == NUM_RECORDS - NUM_ALONE
    patches = [sum(len(batch.pixel_values) for batch in batches) for batches in (shared, alone)]
    assert patches[0] < patches[1] / 2
    for batch in shared:
        assert len(batch.input_ids) == max(batch.num_planned_tokens, 1)


def test_held_out_records_share_prefixes_only_where_that_is_asked_for(root, tokenizer_dir):
    data, cfg = opened(root, tokenizer_dir)
    found = {
        share: list(evaluation_batches(data, cfg, rank=0, dp_size=1, share_prefix=share))
        for share in (False, True)
    }
    assert pieces(found[True]) == pieces(found[False])
    patches = {share: sum(len(batch.pixel_values) for batch in batches) for share, batches in found.items()}
    assert patches[True] < patches[False] / 2
    assert not any(sum(batch.num_branches) for batch in found[False])


def test_shards_hold_the_media_of_a_family_once(root, shared_root, tokenizer_dir, tmp_path):
    """With the same samples in them, shared or not."""
    members = [
        one for shard in sorted((shared_root / "shards").glob("*.tar")) for one in shard_samples(shard)
    ]
    assert len(members) == 3 + 1 + 1 + NUM_ALONE
    data, cfg = opened(shared_root, tokenizer_dir)
    assert data.index.num_samples == NUM_RECORDS
    assert any(key.endswith("#3") for key in map(data.index.key, range(NUM_RECORDS)))
    apart = sorted(pieces(epoch(*opened(root, tokenizer_dir, share=False), tmp_path)).values())
    assert sorted(pieces(epoch(data, cfg, tmp_path)).values()) == apart
    assert sorted(pieces(epoch(*opened(shared_root, tokenizer_dir, share=False), tmp_path)).values()) == apart
    assert len(epoch(data, cfg, tmp_path)) <= len(epoch(*opened(root, tokenizer_dir, share=False), tmp_path))


def test_clips_of_a_family_are_stored_once(shared_root, tokenizer_dir, tmp_path):
    cfg = config(shared_root)
    recipe = store_frames(cfg, tmp_path / "stored", tokenizer_dir=tokenizer_dir, progress=lambda *_: None)
    stored = train_config(tmp_path, recipe)
    stored.stage.prune_frames, stored.data.share_prefix, stored.data.num_workers = True, True, 0
    stored.data.root = cfg.data.root
    data = open_data(stored, tokenizer_dir=tokenizer_dir, held_out=False, build=True)
    found = pieces(epoch(data, cfg, tmp_path))
    assert found.keys() == pieces(epoch(*opened(shared_root, tokenizer_dir), tmp_path)).keys()
    shards = sorted((tmp_path / "stored").rglob("*.tar"))
    parts = [part.name for shard in shards for one in shard_samples(shard) for part in one.parts]
    assert sum(name.endswith(".frames") for name in parts) == 1
    assert data.plan.units is not None
    assert RECORDS in data.plan.units.num_records


def test_ranks_and_resumed_runs_see_the_same_packs(root, tokenizer_dir, tmp_path):
    data, cfg = opened(root, tokenizer_dir)
    straight = [contents(dataclasses.replace(one, num_loss_chunks=1)) for one in epoch(data, cfg, tmp_path)]
    ranks = [epoch(data, cfg, tmp_path, rank=rank, dp_size=2) for rank in range(2)]
    both = [contents(dataclasses.replace(one, num_loss_chunks=1)) for batches in ranks for one in batches]
    assert sorted(both) == sorted(straight)
    rest = epoch(data, cfg, tmp_path, first=data.plan.cursor_at(1))
    resumed = [contents(dataclasses.replace(one, num_loss_chunks=1)) for one in rest]
    assert resumed == straight[-len(resumed) :] != []


def test_media_are_read_and_decoded_once(root, tokenizer_dir, tmp_path, monkeypatch):
    data, cfg = opened(root, tokenizer_dir, max_tokens=2048, max_patches=8192, global_packs=1)
    with_media = []
    original = type(data.index).read_sample
    monkeypatch.setattr(
        type(data.index),
        "read_sample",
        lambda self, row, **more: with_media.append(row) or original(self, row, **more),
    )
    assert len(pieces(epoch(data, cfg, tmp_path))) == NUM_RECORDS
    assert len(with_media) == 3 + 1 + 1 + NUM_ALONE


def test_a_failure_names_all_records(root, tokenizer_dir, tmp_path):
    """And counts once among failures in a row."""
    broken = tmp_path / "broken"
    shutil.copytree(root, broken)
    data, cfg = opened(broken, tokenizer_dir)
    cfg.data.max_consecutive_failed = 2
    rows = {}
    for row in range(data.index.num_samples):
        rows.setdefault(data.index.lengths(row).family, []).append(row)
    members = next(group for family, group in sorted(rows.items()) if family and len(group) == RECORDS)
    damaged = set()
    for row in members:
        shard = data.index.shard(row)
        (part,) = (
            one
            for sample in shard_samples(shard)
            if sample.key == data.index.rows["key"][row].as_py()
            for one in sample.parts
            if one.name != "json"
        )
        with shard.open("r+b") as file:
            file.seek(part.offset + part.size // 2)
            file.write(b"damaged!")
        damaged.add(data.index.key(row))
    batches = epoch(data, cfg, tmp_path)
    told = [json.loads(line) for line in (tmp_path / "ledger-0.jsonl").read_text().splitlines()]
    assert {line["key"] for line in told} == damaged
    assert all("crc32" in line["reason"] for line in told)
    assert sum(batch.num_failed_samples for batch in batches) == len(damaged)
    assert len(pieces(batches)) == NUM_RECORDS


def test_blank_batches_have_the_lengths_of_real_ones(root, tokenizer_dir, tmp_path):
    data, cfg = opened(root, tokenizer_dir)
    packs = [
        pack
        for step in range(data.plan.steps_in_epoch(0))
        for pack in data.plan.step_packs(data.plan.cursor_at(step))
    ]
    blank = [blank_batch(data, pack, 64) for pack in packs if pack.samples]
    real = [batch for batch in epoch(data, cfg, tmp_path) if batch.sample_keys]

    def sizes(batches):
        return sorted(
            (
                batch.segment_lengths,
                batch.num_branches,
                sum(batch.frame_lengths),
                len(batch.supervised_positions),
            )
            for batch in batches
        )

    assert sizes(blank) == sizes(real)


def test_a_record_that_begins_otherwise_is_refused(tokenizer_dir):
    """A family that is none is never trained on: its tokens are compared when they are rendered."""
    tokenizer, parts = (
        ChatTokenizer.from_folder(tokenizer_dir),
        {"0.png": picture_bytes(drawn_picture(60, 80, 1))},
    )

    def record(before: str) -> FamilyRecord:
        said = (Turn("user", (Text(before), Image("0.png"))), Turn("assistant", (Text("Yes."),)))
        data = Conversation(said).to_json()
        return FamilyRecord(data, parts, measure_sample(data, parts, SETTINGS, tokenizer, LIMITS))

    def render(*records: FamilyRecord) -> None:
        space = np.empty((records[0].planned.num_patches, PATCH_VALUES), np.uint8)
        render_family(records[0], records[1:], SETTINGS, tokenizer, LIMITS, space=space)

    one, other = record("1"), record("2")
    assert one.planned.prefix_tokens == other.planned.prefix_tokens > 0
    assert one.planned.family == record("1").planned.family != other.planned.family
    render(one, record("1"))
    with pytest.raises(SampleError, match="begin with different tokens"):
        render(one, other)
