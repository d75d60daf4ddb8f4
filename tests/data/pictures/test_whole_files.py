"""Whole files of every kind look whole; whatever is cut, filled or joined is decoded, and then judged."""

from __future__ import annotations

import doctest
import random

import pytest
from PIL import Image

import vl3train.data.pictures.whole_files as whole_files
from tests.data.conftest import drawn_picture, picture_bytes
from vl3train.data.pictures.whole_files import looks_whole

PICTURE = drawn_picture(60, 80, 3)
WHOLE = {
    "jpeg": picture_bytes(PICTURE, "JPEG", quality=90),
    "progressive": picture_bytes(PICTURE, "JPEG", quality=90, progressive=True),
    "restarts": picture_bytes(PICTURE, "JPEG", quality=90, restart_marker_blocks=2),
    "with a thumbnail": picture_bytes(PICTURE, "JPEG", quality=90, comment=b"\xff\xd9" * 20),
    "png": picture_bytes(PICTURE, "PNG"),
    "gif": picture_bytes(PICTURE, "GIF"),
    "webp": picture_bytes(PICTURE, "WEBP", quality=90),
}


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(whole_files).failed == 0


@pytest.mark.parametrize("kind", WHOLE)
def test_a_whole_file_looks_whole_and_one_that_is_cut_does_not(kind):
    data = WHOLE[kind]
    assert looks_whole(data)
    assert not any(looks_whole(data[:length]) for length in range(len(data)))


@pytest.mark.parametrize("kind", WHOLE)
def test_one_whose_end_was_never_written_does_not_look_whole(kind):
    """A download that stopped, in a file that had its full length before."""
    data = WHOLE[kind]
    if kind != "webp":  # its compressed data has no structure
        assert not any(
            looks_whole(data[:kept].ljust(len(data), b"\0")) for kept in range(20, len(data) - 2, 9)
        )


def test_every_changed_byte_of_a_png_is_found():
    data = WHOLE["png"]
    rng = random.Random(0)
    for at in range(8, len(data)):
        assert not looks_whole(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])


def test_a_jpeg_with_lost_or_doubled_pieces_of_its_scan_does_not_look_whole():
    data = WHOLE["restarts"]
    first, second = data.index(b"\xff\xd0"), data.index(b"\xff\xd1")
    assert not looks_whole(data[:first] + data[second:])
    assert not looks_whole(data[:second] + data[first:])
    assert not looks_whole(WHOLE["jpeg"][:-2] + b"\xff\xd0" + WHOLE["jpeg"][-2:])  # no interval is said


@pytest.mark.parametrize("kind", ["TIFF", "BMP"])
def test_what_has_nothing_cheap_to_check_is_decoded(kind):
    assert not looks_whole(picture_bytes(PICTURE, kind))


def test_several_pictures_in_one_jpeg_and_bytes_behind_the_end_are_no_damage(tmp_path):
    path = tmp_path / "a.mpo"
    Image.fromarray(PICTURE).save(path, "MPO", save_all=True, append_images=[Image.fromarray(PICTURE)])
    assert looks_whole(path.read_bytes())
    for kind in ("jpeg", "png", "webp"):
        assert looks_whole(WHOLE[kind] + b"more")
