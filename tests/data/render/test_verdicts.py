"""``shards --check`` and ``--decode``, ``index`` and ``--decode``, and training say the same of a damaged medium."""

from __future__ import annotations

import struct

import pytest

from tests.data.conftest import LIMITS, drawn_picture, picture_bytes
from tests.data.faults_fixture import clip, jpeg_of_400_megapixels
from tests.data.render.test_samples import SETTINGS
from vl3train.contracts.records import SampleError
from vl3train.data.records.conversation import Conversation, Image, Text, Turn, Video
from vl3train.data.render.chat_tokens import ChatTokenizer
from vl3train.data.render.samples import measure_sample, render_sample
from vl3train.data.render.visual_items import check_media

PICTURE = drawn_picture(60, 80, 3)
JPEG = picture_bytes(PICTURE, "JPEG", quality=90)
PNG = picture_bytes(PICTURE, "PNG")
NO_DIMENSIONS = b"II*\0" + struct.pack("<IH", 8, 1) + struct.pack("<HHII", 258, 3, 1, 8) + bytes(4)


def changed(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


GOOD = {kind: picture_bytes(PICTURE, kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")}
USED = {**GOOD, "JPEG without its end mark": JPEG[:-2]}
BAD = {
    **{f"{kind} cut off": data[:-200] for kind, data in GOOD.items()},
    "JPEG filled with zeros": JPEG[:900].ljust(len(JPEG), b"\0"),
    "JPEG of 400 megapixels": jpeg_of_400_megapixels(),
    "PNG with a changed byte": changed(PNG, len(PNG) // 2),
    "TIFF without dimensions": NO_DIMENSIONS,
    "empty": b"",
    "a page of HTML": b"<html>404</html>",
}
ONLY_DECODED = {"JPEG with a changed byte": JPEG[:1500] + b"\xff\x00" * 9 + JPEG[1518:]}


@pytest.fixture(scope="module")
def verdicts(tokenizer_dir):
    tokenizer = ChatTokenizer.from_folder(tokenizer_dir)

    def verdicts(medium):
        name, data, content = medium
        turns = (Turn("user", (content, Text("Is it?"))), Turn("assistant", (Text("Yes."),)))
        sample = (Conversation(turns).to_json(), {name: data}, SETTINGS, tokenizer, LIMITS)
        ways = {
            "shards --check": lambda: check_media(sample[0], sample[1], SETTINGS, LIMITS, decode=False),
            "shards --decode": lambda: check_media(sample[0], sample[1], SETTINGS, LIMITS, decode=True),
            "index": lambda: measure_sample(*sample),
            "index --decode": lambda: measure_sample(*sample, decode=True),
            "training": lambda: render_sample(*sample, key="k", planned=None),
        }
        used = {}
        for way, judge in ways.items():
            try:
                judge()
                used[way] = True
            except SampleError:
                used[way] = False
        return used

    return verdicts


def picture(data):
    return "0.img", data, Image("0.img")


@pytest.mark.parametrize("kind", USED)
def test_a_good_picture_is_used_by_all(verdicts, kind):
    assert set(verdicts(picture(USED[kind])).values()) == {True}


@pytest.mark.parametrize("kind", BAD)
def test_a_damaged_picture_is_refused_by_all(verdicts, kind):
    assert set(verdicts(picture(BAD[kind])).values()) == {False}


@pytest.mark.parametrize("kind", ONLY_DECODED)
def test_changed_compressed_data_is_found_by_all_that_decode(verdicts, kind):
    found = verdicts(picture(ONLY_DECODED[kind]))
    assert found.pop("index")
    assert found.pop("shards --check")
    assert set(found.values()) == {False}


@pytest.mark.parametrize("damage", ["none", "cut off", "empty"])
def test_of_a_clip_too(verdicts, tmp_path, damage):
    data = clip(tmp_path)
    data = {"none": data, "cut off": data[:-300], "empty": b""}[damage]
    assert set(verdicts(("0.mp4", data, Video("0.mp4"))).values()) == {damage == "none"}
