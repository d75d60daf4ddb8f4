"""Stored frames stand for the clips they were taken of: same samples, same times and grids, nearly the same pixels."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest

from tests.data.conftest import LIMITS, still_and_moving
from tests.data.render.test_samples import SETTINGS, assistant, user
from tests.data.shards_fixture import make_recipe, train_config
from vl3train.contracts.records import SampleError
from vl3train.data.pipeline import open_data, store_frames
from vl3train.data.records.conversation import Conversation, Image, Stream, Turn, Video, read_conversation
from vl3train.data.render.chat_tokens import ChatTokenizer
from vl3train.data.render.samples import render_sample
from vl3train.data.render.visual_items import store_sample
from vl3train.data.shards.tar_headers import shard_samples


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return ChatTokenizer.from_folder(tokenizer_dir)


@pytest.fixture
def parts(encode_clip):
    return {"0.mp4": encode_clip(still_and_moving(30, 96, 130), rate=10, options={"crf": "10"})}


def render(members, tokenizer, settings=SETTINGS):
    members = dict(members)
    return render_sample(members.pop("json"), members, settings, tokenizer, LIMITS, key="k", planned=None)


@pytest.mark.parametrize(
    "turns",
    [
        (user(Video("0.mp4"), "Describe."), assistant("It moves.")),
        (user(Video("0.mp4", 0.5, 2.0), "Describe."), assistant("It moves.")),
        (
            *(Turn("stream", (Stream("0.mp4", 1.2, 0.3),)), assistant("A")),
            *(Turn("stream", (Stream("0.mp4", 2.4, 0.3),)), assistant("B")),
        ),
    ],
)
def test_stored_frames_render_like_the_clip(parts, tokenizer, turns):
    conversation = Conversation(turns).to_json()
    stored = store_sample(conversation, parts, SETTINGS, LIMITS)
    assert list(stored) == ["json", "0.frames"]
    clip, frames = render({"json": conversation, **parts}, tokenizer), render(stored, tokenizer)
    np.testing.assert_array_equal(clip.grids, frames.grids)
    difference = np.abs(clip.patches.astype(int) - frames.patches)
    assert difference.mean() < 1.5
    unpruned = dataclasses.replace(SETTINGS, prune_frames=False)
    np.testing.assert_array_equal(
        render({"json": conversation, **parts}, tokenizer, unpruned).input_ids,
        render(stored, tokenizer, unpruned).input_ids,
    )
    again = store_sample(stored["json"], {"0.frames": stored["0.frames"]}, SETTINGS, LIMITS)
    assert again == stored


def test_frames_taken_otherwise_are_refused_and_damage_found(parts, tokenizer):
    conversation = Conversation((user(Video("0.mp4"), "Describe."), assistant("It moves."))).to_json()
    stored = store_sample(conversation, parts, SETTINGS, LIMITS)
    data = stored["0.frames"]
    with pytest.raises(SampleError, match=r"stored with fps=2\.0, now 1\.0"):
        render(stored, tokenizer, dataclasses.replace(SETTINGS, fps=1.0))
    for bad in (data[:-1], data[:40], data[:21], data.replace(b'"times": [0.0', b'"times": [null')):
        with pytest.raises(SampleError, match="stored clip"):
            render({**stored, "0.frames": bad}, tokenizer)
    torn = bytearray(data)
    torn[-200:-100] = bytes(100)
    with pytest.raises(SampleError, match="stored frame"):
        render({**stored, "0.frames": bytes(torn)}, tokenizer)


def test_a_recipe_is_stored_and_trains(tmp_path, tokenizer_dir, tokenizer):
    cfg = train_config(tmp_path, make_recipe(tmp_path))
    seen = []
    options = {"tokenizer_dir": tokenizer_dir, "progress": lambda *call: seen.append(call)}
    path = store_frames(cfg, tmp_path / "stored", **options)
    assert ("clips", 8, 8) in seen
    cfg.data.recipe = str(path)
    for held_out in (False, True):
        data = open_data(cfg, tokenizer_dir=tokenizer_dir, held_out=held_out, build=True)
        assert (data.index.sizes, data.index.rejected) == ((0, 7, 0) if held_out else (9, 8, 20), ())
        kinds = {data.index.lengths(row).modality for row in range(data.index.num_samples)}
        assert kinds == {"image", "video", "text"}
    shards = (tmp_path / "stored/clips/train").glob("*.tar")
    names = {part.name for shard in shards for sample in shard_samples(shard) for part in sample.parts}
    assert names == {"json", "0.frames"}
    seen.clear()
    store_frames(train_config(tmp_path, tmp_path / "recipe.yaml"), tmp_path / "stored", **options)
    assert seen == []  # nothing to do
    source = sorted((tmp_path / "clips/shards").glob("*.tar"))[0]
    os.utime(source)
    store_frames(train_config(tmp_path, tmp_path / "recipe.yaml"), tmp_path / "stored", **options)
    assert seen[-1] == ("clips", 6, 6)


def test_images_keep_their_bytes(parts, encode_clip):
    from tests.data.faults_fixture import jpeg

    media = {"0.jpg": jpeg(), "1.mp4": parts["0.mp4"]}
    turns = (user(Image("0.jpg"), Video("1.mp4"), "Which?"), assistant("The clip."))
    stored = store_sample(Conversation(turns).to_json(), media, SETTINGS, LIMITS)
    assert stored["0.jpg"] == media["0.jpg"]
    named = [one.part for one in read_conversation(stored["json"]).turns[0].content[:2]]
    assert named == ["0.jpg", "1.frames"]
