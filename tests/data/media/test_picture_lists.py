"""A list of pictures is packed as one zip that other tools read, with a time for each picture."""

from __future__ import annotations

import io
import json
import zipfile

import pytest

from tests.data.conftest import drawn_picture, picture_bytes
from vl3train.contracts.records import SampleError
from vl3train.data.media.picture_lists import is_picture_list, pack_pictures, read_picture_list

PICTURES = [
    ("jpg", picture_bytes(drawn_picture(20, 30, 0), "JPEG")),
    ("png", picture_bytes(drawn_picture(20, 30, 1), "PNG")),
    ("jpg", picture_bytes(drawn_picture(20, 30, 2), "JPEG")),
]


@pytest.mark.parametrize(
    ("given", "times", "end"),
    [
        ({}, (0, 1 / 3, 2 / 3), 1.0),
        ({"fps": 2}, (0, 0.5, 1.0), 1.5),
        ({"times": [0.5, 1, 4]}, (0.5, 1, 4), 7.0),
    ],
)
def test_pictures_come_back_with_their_times_and_bytes(given, times, end):
    data = pack_pictures(PICTURES, **given)
    assert is_picture_list(data)
    found = read_picture_list(data)
    assert found.pictures == tuple(content for _, content in PICTURES)
    assert found.times == pytest.approx(times)
    assert found.end == pytest.approx(end)
    assert data == pack_pictures(PICTURES, **given)


def test_any_zip_tool_reads_it():
    with zipfile.ZipFile(io.BytesIO(pack_pictures(PICTURES, fps=4))) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["clip.json", "00000.jpg", "00001.png", "00002.jpg"]
        assert archive.read("00001.png") == PICTURES[1][1]
        assert json.loads(archive.read("clip.json")) == {"times": [0.0, 0.25, 0.5], "end": 0.75}


@pytest.mark.parametrize(
    ("pictures", "given", "said"),
    [
        ([], {}, "clip of 0 pictures"),
        (PICTURES, {"fps": 1, "times": [0, 1, 2]}, "not both"),
        (PICTURES, {"fps": 0}, "fps=0 is no rate"),
        (PICTURES, {"fps": True}, "is no rate"),
        (PICTURES, {"fps": 10**400}, "is no rate"),
        (PICTURES, {"times": [*range(len(PICTURES) - 1), 10**400]}, "no number of seconds"),
        (PICTURES, {"times": [0, 1]}, "2 times for 3 pictures"),
        (PICTURES, {"times": [0, 2, 1]}, "after 2 comes 1"),
        (PICTURES, {"times": [0, "1", 2]}, "'1' among the times"),
        (PICTURES, {"times": [-1, 1, 2]}, "-1 among the times"),
        (PICTURES, {"times": "012"}, "one number of seconds"),
    ],
)
def test_what_cannot_be_packed_is_told(pictures, given, said):
    with pytest.raises(SampleError, match=said):
        pack_pictures(pictures, **given)


def _zipped(header: str | None, compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        if header is not None:
            archive.writestr("clip.json", header)
        archive.writestr("a.jpg", PICTURES[0][1])
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (_zipped(None), "first member is no clip.json"),
        (_zipped('{"times": [0], "end": 1}', zipfile.ZIP_DEFLATED), "compress"),
        (_zipped("{"), "damaged"),
        (_zipped("[]"), "damaged"),
        (_zipped('{"times": [0, 1], "end": 1}'), "2 times for 1 pictures"),
        (_zipped('{"times": [0], "end": NaN}'), "end=nan"),
        (pack_pictures(PICTURES)[:-30], "cannot be read"),
        (b"PK\x03\x04" + bytes(100), "cannot be read"),
    ],
)
def test_another_or_a_damaged_zip_is_refused(data, said):
    with pytest.raises(SampleError, match=said):
        read_picture_list(data)


def test_a_flipped_byte_in_a_picture_is_found():
    data = bytearray(pack_pictures(PICTURES))
    data[data.index(PICTURES[1][1]) + 100] ^= 1
    with pytest.raises(SampleError, match="CRC"):
        read_picture_list(bytes(data))
