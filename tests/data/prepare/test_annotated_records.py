"""Media lie where the person said, and nowhere else; a folder or list of pictures is one clip."""

from __future__ import annotations

import json
import os

import pytest

from tests.data.conftest import drawn_picture, picture_bytes
from tests.data.faults_fixture import jpeg
from vl3train.data.media.picture_lists import read_picture_list
from vl3train.data.prepare.annotated_records import AnnotatedRecords, medium_bytes
from vl3train.data.prepare.media_roots import shown
from vl3train.data.prepare.write_shards import check_annotations, part_name, write_shards
from vl3train.data.records.conversation import Video

TALK = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]


def found(tmp_path, *records, roots=("media",)):
    """What becomes of each record."""
    lines = [json.dumps({"conversations": TALK, **record}) for record in records]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    given = AnnotatedRecords((str(tmp_path / "a.jsonl"),), tuple(tmp_path / root for root in roots))
    return [content for _, content in given.read()]


@pytest.fixture
def places(tmp_path):
    """Two roots and a secret beside them."""
    for name in ("media/in/a.jpg", "more/b.jpg", "more/in/a.jpg", "secret.jpg", "mediaX/c.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(jpeg())
    (tmp_path / "media" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (tmp_path / "media" / "folder").symlink_to(tmp_path / "more")
    (tmp_path / "media" / "inside.jpg").symlink_to("in/a.jpg")
    return tmp_path


OUTSIDE = (
    "../secret.jpg",
    "in/../../secret.jpg",
    "link.jpg",
    "folder/b.jpg",
    "../mediaX/c.jpg",
    "{}/secret.jpg",
)


@pytest.mark.parametrize("name", [*OUTSIDE, "file://{}/secret.jpg"])
def test_what_lies_outside_is_refused_unless_its_root_is_named(places, name):
    record = {"image": name.format(places)}
    (reason,) = found(places, record)
    assert "outside the media root" in reason
    assert "--media-root FOLDER once more" in reason
    (whole,) = found(places, record, roots=("media", "."))
    assert not isinstance(whole, str)
    (clip,) = found(places, {"video": [record["image"]] * 2})
    assert "outside the media root" in clip


def test_outside_media_are_not_written_either(places):
    (places / "a.jsonl").write_text(json.dumps({"conversations": TALK, "image": "../secret.jpg"}) + "\n")
    given = AnnotatedRecords((str(places / "a.jsonl"),), (places / "media",))
    assert len(check_annotations(given, progress=lambda *_: None).rejected) == 1
    with pytest.raises(ValueError, match="outside the media root"):
        write_shards(
            given,
            places / "out",
            max_samples=9,
            max_bytes=10**9,
            skip_rejected=True,
            progress=lambda *_: None,
        )


@pytest.mark.parametrize("name", ["in/a.jpg", "./in/../in/a.jpg", "inside.jpg", "{}/media/in/a.jpg"])
def test_what_lies_inside_is_used(places, name):
    ((_, (medium,)),) = found(places, {"image": name.format(places)})
    assert os.path.samefile(medium.location, places / "media/in/a.jpg")


def test_roots_are_looked_up_in_order_and_two_files_of_a_name_are_an_error(places):
    (_, (medium,)), twice, gone = found(
        places, {"image": "b.jpg"}, {"image": "in/a.jpg"}, {"image": "x.jpg"}, roots=("media", "more")
    )
    assert medium.location == places / "more/b.jpg"
    assert "in several media roots" in twice
    assert gone.count("x.jpg") == 2  # both places are named


def test_a_folder_and_a_list_of_pictures_are_packed_as_one_clip(tmp_path):
    drawn = {number: picture_bytes(drawn_picture(20, 30, number), "JPEG") for number in (1, 2, 10)}
    (tmp_path / "media" / "walk").mkdir(parents=True)
    for number, data in drawn.items():
        (tmp_path / "media" / "walk" / f"frame_{number}.jpg").write_bytes(data)
    (tmp_path / "media" / "walk" / "notes.txt").write_text("no picture")
    names = [f"walk/frame_{number}.jpg" for number in drawn]
    both = found(tmp_path, {"video": "walk", "fps": 2}, {"video": names, "fps": 2})
    for conversation, (medium,) in both:
        assert conversation.turns[0].content[0].fps is None  # it is the rate of the pictures
        assert part_name(0, medium) == "0.zip"
        clip = read_picture_list(medium_bytes(medium))
        assert clip.pictures == tuple(drawn.values())
        assert clip.times == (0.0, 0.5, 1.0)
    (tmp_path / "media" / "empty").mkdir()
    wrong = found(tmp_path, {"video": names, "times": [0, 1]}, {"video": "empty"}, {"image": "walk"})
    assert "2 times for 3 pictures" in wrong[0]
    assert "a folder without pictures" in wrong[1]
    assert "no file but a folder" in wrong[2]


def test_the_rate_of_a_clip_stays_in_the_shard(tmp_path):
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "a.mp4").write_bytes(b"clip")
    ((conversation, _),) = found(tmp_path, {"video": "a.mp4", "fps": 4})
    assert conversation.turns[0].content[0] == Video("0.mp4", fps=4.0)
    assert b'"fps": 4.0' in conversation.to_json(["0.mp4"])


def test_a_path_in_an_error_keeps_its_file_name_however_long_the_folder_is():
    assert shown("a/" * 100 + "x.jpg") == "a/" * 100 + "x.jpg"
    assert shown("a/" * 4000 + "x.jpg").endswith("a/x.jpg")
    assert len(shown("data:image/png;base64," + "A" * 100_000)) < 500
