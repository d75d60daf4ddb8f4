"""The index tells where each sample lies and how long it is; nothing is lost, nothing stale is used."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading

import pytest
import webdataset

from tests.data.conftest import LIMITS
from tests.data.render.test_samples import SETTINGS
from tests.data.shards.test_tar_headers import make_tar
from tests.data.shards_fixture import make_source
from vl3train.contracts.records import SampleError
from vl3train.data.prepare import build_index as build_index_module
from vl3train.data.prepare.build_index import build_indexes
from vl3train.data.render.chat_tokens import ChatTokenizer
from vl3train.data.render.samples import render_sample
from vl3train.data.shards.index import open_index
from vl3train.data.shards.manifest import IndexPlace, MissingIndexError
from vl3train.data.shards.read import read_parts


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("source"), images=5, clips=3, texts=6, seed=0)


@pytest.fixture
def shards(made, tmp_path):
    return shutil.copytree(made, tmp_path / "shards")


@pytest.fixture
def build(tokenizer_dir):
    def build(*shards, num_workers=0, index_dir=None, progress=None, said=None):
        calls = []
        changed = build_indexes(
            [(folder.name, place_of(folder, index_dir=index_dir)) for folder in shards],
            tokenizer_dir=tokenizer_dir,
            num_workers=num_workers,
            decode_seconds=30.0,
            progress=progress or (lambda source, done, total: calls.append((done, total))),
        )
        if said is not None:
            said += changed
        return calls

    return build


def place_of(shards, settings=SETTINGS, limits=LIMITS, index_dir=None):
    return IndexPlace(shards=shards, settings=settings, limits=limits, index_dir=index_dir)


def opened(shards, settings=SETTINGS, limits=LIMITS, index_dir=None):
    return open_index([("small", 1.0, place_of(shards, settings, limits, index_dir))])


def test_lengths_are_those_of_the_rendered_samples_and_bytes_those_of_webdataset(
    shards, build, tokenizer_dir
):
    assert build(shards)[-1] == (14, 14)
    index = opened(shards)
    tokenizer = ChatTokenizer.from_folder(tokenizer_dir)
    tars = sorted(map(str, shards.glob("*.tar")))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False))
    assert index.num_samples == len(samples) == 14
    kinds = set()
    for row, theirs in enumerate(samples):
        conversation, parts = index.read_sample(row)
        assert conversation == theirs["json"]
        assert parts == {k: v for k, v in theirs.items() if k[0].isdigit()}
        planned = index.lengths(row)
        sample = render_sample(
            conversation, parts, SETTINGS, tokenizer, LIMITS, key=index.key(row), planned=planned
        )
        assert len(sample.input_ids) == planned.num_tokens
        assert len(sample.patches) == planned.num_patches
        assert (sample.labels >= 0).sum() == planned.num_supervised_tokens
        assert index.sample_table().num_patch_pairs[row] == sum(t * (h * w) ** 2 for t, h, w in planned.grids)
        assert index.key(row) == f"small/{index.shard(row).stem}/{theirs['__key__']}"
        kinds.add(planned.modality)
    assert kinds == {"text", "image", "video"}


def test_several_processes_make_the_same_index(shards, build, tmp_path):
    build(shards)
    other = shutil.copytree(shards, tmp_path / "other", ignore=shutil.ignore_patterns("index-*"))
    build(other, num_workers=2)
    assert opened(other).fingerprint == opened(shards).fingerprint
    assert opened(other).rows.equals(opened(shards).rows)


def test_a_second_pass_measures_only_what_changed(shards, build):
    build(shards)
    assert build(shards) == []
    changed = sorted(shards.glob("*.tar"))[1]
    os.utime(changed, (1, 1))
    assert build(shards)[-1] == (6, 6)
    (place_of(shards).folder / "manifest.json").unlink()  # as a killed pass leaves it
    assert build(shards) == []
    assert opened(shards).num_samples == 14


def test_bad_samples_are_counted_with_their_reason(tmp_path, build):
    text = b'{"turns": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, '
    text += b'{"role": "assistant", "content": [{"type": "text", "text": "b"}]}]}'
    picture = text.replace(b'{"type": "text", "text": "a"}', b'{"type": "image", "part": "0.png"}')
    members = [
        ("good.json", text),
        ("torn.0.png", b"no picture"),
        ("torn.json", picture),
        ("words.json", b"not json"),
        ("alone.0.png", b"x"),
        ("code.json", text),
        ("code.pyd", b"x"),
        ("absent.json", picture),
    ]
    make_tar(tmp_path / "a.tar", members)
    build(tmp_path)
    index = opened(tmp_path)
    assert index.num_samples == 2
    reasons = {key.rpartition("/")[2]: reason for key, reason in index.rejected}
    assert set(reasons) == {"torn", "words", "alone", "absent"}
    assert "conversation is missing" in reasons["alone"]
    assert "cannot be read" in reasons["torn"]
    manifest = json.loads((place_of(tmp_path).folder / "manifest.json").read_text())
    assert (manifest["shards"][0]["samples"], manifest["shards"][0]["rejected"]) == (6, 4)
    assert manifest["shards"][0]["unread_parts"] == {"pyd": 1}


def test_what_is_whole_of_damaged_shards_is_used_and_the_damage_told(shards, build):
    first, second, *_ = sorted(shards.glob("*.tar"))
    first.write_bytes(first.read_bytes()[:-12000])
    second.write_bytes(b"<html>" * 200)
    build(shards)
    index = opened(shards)
    reasons = dict(index.rejected)
    assert "damaged header at byte 0" in reasons[f"small/{second.stem}/@0"]
    assert "nothing behind it" in reasons[f"small/{second.stem}/@0"]
    (cut,) = [reason for key, reason in reasons.items() if key.startswith(f"small/{first.stem}/@")]
    assert "cut off" in cut
    assert 2 <= index.num_samples < 14 - 6


def test_flipped_bits_are_found_when_the_sample_is_read(shards, build):
    build(shards)
    index = opened(shards)
    row = next(row for row in range(14) if index.lengths(row).modality == "image")
    offset = index.rows["part_offsets"][row].as_py()[0]
    data = bytearray(index.shard(row).read_bytes())
    data[offset + 40] ^= 4
    index.shard(row).write_bytes(data)
    with pytest.raises(SampleError, match="crc32"):
        index.read_sample(row)
    index.shard(row).write_bytes(data[: offset + 3])
    with pytest.raises(SampleError, match="ends before"):
        index.read_sample(row)


def test_an_index_for_other_settings_or_shards_is_not_used(shards, build):
    with pytest.raises(MissingIndexError, match="no index"):
        opened(shards)
    build(shards)
    other = dataclasses.replace(SETTINGS, fps=1.0)
    with pytest.raises(MissingIndexError, match=r"fps=2.0, now 1.0"):
        opened(shards, other)
    with pytest.raises(MissingIndexError, match="limits"):
        opened(shards, limits=dataclasses.replace(LIMITS, max_pixels=10))
    before = opened(shards).fingerprint
    make_tar(shards / "more.tar", [("a.json", b"1")])
    with pytest.raises(MissingIndexError, match=r"more\.tar"):
        opened(shards)
    build(shards)
    assert opened(shards).fingerprint != before


def test_a_source_without_held_out_samples_has_none(shards, build):
    build(shards)
    index = open_index([("none", 1.0, None), ("small", 1.0, place_of(shards))])
    assert index.sizes == (0, 14)
    assert {index.source(row) for row in range(14)} == {1}
    assert open_index([("none", 1.0, None)]).num_samples == 0


def test_a_damaged_file_of_an_index_is_named_and_only_its_shard_measured_again(shards, build):
    build(shards)
    expected, rows = opened(shards).fingerprint, opened(shards).rows
    folder = place_of(shards).folder
    first, second, _ = sorted(folder.glob("*.parquet"))
    entry = folder / f"{first.stem}.json"
    for path, again in ((first, 6), (second, 6), (entry, 6), (folder / "manifest.json", 0)):
        good = path.read_bytes()
        for bad in (b"", good[:-9], b"PAR1" + bytes(40), good.replace(b"a", b"b"), b"[[[" * 9999):
            path.write_bytes(bad)
            if path != entry:  # the run reads the manifest
                with pytest.raises(MissingIndexError, match=rf"{path.name} is damaged; run `vl3train index`"):
                    opened(shards)
        said: list[str] = []
        calls = build(
            shards, said=said
        )  # a decode server is started, which takes seconds: once for each file
        assert len(said) == bool(again)
        assert all(line.endswith(f"{path.name} is damaged; it is made again") for line in said)
        assert (calls[-1] if calls else (0, 0)) == (again, again)
        assert opened(shards).fingerprint == expected
    assert opened(shards).rows == rows
    for path in (first, second):
        path.unlink()
    with pytest.raises(MissingIndexError, match=rf"(?s){first.name} cannot be read.*{second.name} cannot be"):
        opened(shards)


def test_one_file_of_rows_is_the_same_whoever_wrote_it(shards, build):
    """A resume compares the fingerprint: rows measured again, and times of files, must not change it."""
    build(shards)
    before = opened(shards).fingerprint
    for tar in shards.glob("*.tar"):
        os.utime(tar, (7, 7))
    assert build(shards)
    assert opened(shards).fingerprint == before


def test_the_index_may_lie_elsewhere_and_equal_folder_names_do_not_meet(tmp_path, build):
    text = b'{"conversations": [{"from": "human", "value": "%d"}, {"from": "gpt", "value": "b"}]}'
    folders = [tmp_path / name / "shards" for name in "ab"]
    for number, folder in enumerate(folders):
        folder.mkdir(parents=True)
        make_tar(folder / "0.tar", [(f"{n}.json", text % n) for n in range(number + 1)])
    build(*folders, index_dir=tmp_path / "far")
    for number, folder in enumerate(folders):
        assert [path.name for path in folder.iterdir()] == ["0.tar"]
        assert opened(folder, index_dir=tmp_path / "far").num_samples == number + 1
    with pytest.raises(MissingIndexError, match="no index"):
        opened(folders[0])


def test_where_nothing_can_be_written_the_way_out_is_told_and_other_sources_are_indexed(tmp_path, build):
    good, other, far = (tmp_path / name for name in ("good", "other", "far"))
    for folder in (good, other):
        folder.mkdir()
        make_tar(folder / "0.tar", [("a.json", b"{")])
    place_of(other).folder.touch()  # as good as a mount that is read only: this test may run as root
    with pytest.raises(
        MissingIndexError, match=r"other: its index cannot be written.*data\.index_dir=FOLDER"
    ):
        build(other, good)
    assert dict(opened(good).rejected)
    build(other, index_dir=far)
    assert opened(other, index_dir=far).num_samples == 0


def test_a_dangling_link_and_a_folder_are_named_and_the_other_shards_used(tmp_path, build):
    text = b'{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}'
    make_tar(tmp_path / "good.tar", [("a.json", text), ("M\udcfcller.pyd", b"x")])
    (tmp_path / "folder.tar").mkdir()
    (tmp_path / "link.tar").symlink_to(tmp_path / "gone.tar")
    build(tmp_path)
    index = opened(tmp_path)
    assert index.num_samples == 1
    reasons = dict(index.rejected)
    assert set(reasons) == {"small/folder/@0", "small/link/@0", "small/good/@1024"}
    assert "is a folder" in reasons["small/folder/@0"]
    assert "gone.tar, which is not there" in reasons["small/link/@0"]
    assert build(tmp_path) == []
    make_tar(tmp_path / "gone.tar", [("b.json", text)])  # the link leads somewhere again
    assert build(tmp_path)
    assert opened(tmp_path).num_samples == 3


def test_a_pass_that_fails_stops_its_threads_while_the_error_is_kept(tmp_path, build, monkeypatch):
    """An error keeps the frames that it came through: threads would measure all samples before the process ends."""
    make_tar(tmp_path / "0.tar", [(f"{number}.json", b"{") for number in range(640)])
    read, one_at_a_time = [], threading.Event()

    def slow_read(shard, parts):
        read.append(parts)
        one_at_a_time.wait(0.01)
        return read_parts(shard, parts)

    monkeypatch.setattr(build_index_module, "read_parts", slow_read)

    def stop(source, done, total):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as kept:
        build(tmp_path, num_workers=2, progress=stop)
    for thread in threading.enumerate():
        if thread.name.startswith("index"):
            thread.join(5)
            assert not thread.is_alive()
    assert kept.tb is not None
    assert len(read) < 200


def test_small_sources_are_measured_side_by_side_and_told_in_order(tmp_path, build, monkeypatch):
    for name in "ab":
        (tmp_path / name).mkdir()
        make_tar(tmp_path / name / "0.tar", [("0.json", b"{")])
    both = threading.Barrier(2)

    def read_when_both_do(shard, parts):
        both.wait(30)
        return read_parts(shard, parts)

    monkeypatch.setattr(build_index_module, "read_parts", read_when_both_do)
    told = []
    build(tmp_path / "a", tmp_path / "b", num_workers=2, progress=lambda *now: told.append(now))
    assert told == [("a", 1, 1), ("b", 1, 1)]
    assert build(tmp_path / "a", tmp_path / "b") == []


def test_shards_that_two_sources_have_are_measured_once(shards, build):
    calls = build(shards, shards, num_workers=2)
    assert calls.count((14, 14)) == 1
