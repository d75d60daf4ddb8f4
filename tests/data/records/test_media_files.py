"""Media are found under the keys that they have, as paths, bytes, data URLs, base64, or the pictures of a clip."""

from __future__ import annotations

import base64

import pytest

from tests.data.conftest import drawn_picture, picture_bytes
from vl3train.contracts.records import SampleError
from vl3train.data.records.annotations import read_record
from vl3train.data.records.conversation import Image, Text, Video
from vl3train.data.records.media_files import MediaFile, find_media

FORMS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tif": "TIFF"}
TALK = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]


def files(record, **more):
    return read_record({"conversations": TALK, **record, **more}, where="")[1]


@pytest.mark.parametrize("suffix", FORMS)
def test_bytes_in_text_are_the_file(suffix):
    data = picture_bytes(drawn_picture(20, 30), FORMS[suffix])
    plain = base64.b64encode(data).decode()
    lines = "\n".join(plain[start : start + 76] for start in range(0, len(plain), 76))
    url = f"data:image/{suffix};base64,{plain}"
    for given in (
        plain,
        lines,
        plain.rstrip("="),
        base64.urlsafe_b64encode(data).decode(),
        url,
        {"url": url},
        data,
    ):
        (file,) = files({"image": given})
        assert (file.data, file.suffix) == (data, suffix)
    part = {"type": "image_url", "image_url": {"url": url}}
    turns = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "A cat."}]
    ((file,), found) = (read_record({"messages": turns}, where="")[1], f"0.{suffix}")
    assert file.data == data
    assert read_record({"messages": turns}, where="")[0].turns[0].content == (Image(found),)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("data:image/png;base64,####", "in base64 is damaged"),
        ("data:image/png;base64,", "in base64 is empty"),
        ("data:image/png,abc", "without base64"),
        ("data:video/mp4;base64,AAAA", "is of type video/mp4"),
        ("/9j/4AAQSkZJRgABAQ" + "A" * 60 + "!!", "in base64 is damaged"),
        ("s3://bucket/a.jpg", "is an address; download it"),
        ([["a.jpg"], ["b.jpg"]], "is a list in a list"),
        (["a.jpg", ""], "image 2 of 2 is empty"),
    ],
)
def test_media_that_are_none_say_why(image, reason):
    with pytest.raises(SampleError, match=reason):
        files({"image": image})


@pytest.mark.parametrize(
    "nothing", ["", " ", [], [""], [None], None, {"bytes": None, "path": None}, float("nan"), "[]"]
)
def test_many_values_mean_no_medium(nothing):
    assert files({"image": nothing, "videos": nothing}) == ()


@pytest.mark.parametrize(
    "keys",
    [
        {"image_path": "a.jpg"},
        {"image_paths": ["a.jpg"]},
        {"img": "a.jpg"},
        {"image_file": "a.jpg"},
        {"Image": "a.jpg"},
        {"images": '["a.jpg"]'},
        {"image": "", "image_path": "a.jpg"},
        {"image_path": "a.jpg", "image_id": 7, "image_width": 3, "video_id": "x", "image_description": "y"},
    ],
)
def test_a_picture_under_another_name_is_shown_without_a_tag(keys):
    conversation, found = read_record({"conversations": TALK, **keys}, where="")
    assert found == (MediaFile("a.jpg", "image"),)
    assert conversation.turns[0].content == (Image("0.jpg"), Text("What?"))


def test_a_clip_under_another_name_and_numbered_pictures():
    assert files({"video_path": "a.mp4"}) == (MediaFile("a.mp4", "video"),)
    numbered = {"image_2": "b.jpg", "image_10": "c.jpg", "image_1": "a.jpg", "image_3": None}
    assert [file.path for file in files(numbered)] == ["a.jpg", "b.jpg", "c.jpg"]
    with pytest.raises(SampleError, match="image_path and img, with other files"):
        files({"image_path": "a.jpg", "img": "b.jpg"})


def test_file_addresses_are_paths():
    assert [file.path for file in files({"image": ["file:///d/a%20b.jpg", "file://localhost/c.jpg"]})] == [
        *("/d/a b.jpg", "/c.jpg")
    ]


FRAMES = ["f/1.jpg", "f/2.jpg", "f/3.png"]


@pytest.mark.parametrize(
    ("record", "times", "fps"),
    [
        ({"video": FRAMES}, None, None),
        ({"video": [FRAMES]}, None, None),
        ({"videos": [FRAMES], "fps": 2}, None, 2.0),
        ({"frames": FRAMES, "sample_fps": "0.5"}, None, 0.5),
        ({"video": FRAMES, "timestamps": [0, 1.5, "4"]}, (0.0, 1.5, 4.0), None),
        ({"video": FRAMES, "times": [0, 1, 2], "fps": 9}, (0.0, 1.0, 2.0), None),
    ],
)
def test_a_list_of_pictures_is_one_clip(record, times, fps):
    conversation, (clip,) = read_record({"conversations": TALK, **record}, where="")
    assert [picture.path for picture in clip.pictures] == FRAMES
    assert (clip.times, clip.fps) == (times, fps)
    assert conversation.turns[0].content[0] == Video("0.zip")


def test_a_part_may_hold_the_pictures_of_a_clip():
    """As Qwen-VL's messages do."""
    part = {"type": "video", "video": ["file:///d/1.jpg", "file:///d/2.jpg"], "sample_fps": 2}
    turns = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "A cat."}]
    (clip,) = read_record({"messages": turns}, where="")[1]
    assert ([picture.path for picture in clip.pictures], clip.fps) == (["/d/1.jpg", "/d/2.jpg"], 2.0)


@pytest.mark.parametrize("clips", [["a.gif"], ["a.gif", "b.gif"], ["a.webp"], ["a.mp4", "b.jpg"]])
def test_moving_pictures_are_clips_of_their_own(clips):
    assert find_media({"video": clips}, "video")[0] == clips


def test_parts_without_a_file_take_the_next_one_of_the_record():
    """As datasets for TRL, unsloth and transformers' chat templates come, a table's empty keys included."""
    shown = {"type": "image", "text": None, "image": None}
    turns = [
        {"role": "user", "content": [shown, {"type": "text", "text": "and"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Two.", "image": None}]},
    ]
    conversation, found = read_record({"messages": turns, "images": ["a.jpg", "b.png"]}, where="")
    assert [file.path for file in found] == ["a.jpg", "b.png"]
    assert conversation.turns[0].content == (Image("0.jpg"), Text("and"), Image("1.png"))
    for images in (["a.jpg"], [], ["a.jpg"] * 3):
        with pytest.raises(SampleError, match=f"2 <image> tags for {len(images)} image files"):
            read_record({"messages": turns, "images": images}, where="")


def test_tags_in_the_text_of_a_part_and_pictures_that_nothing_stands_for():
    def read(text, **record):
        turns = [
            {"role": "user", "content": [{"type": "text", "text": text}]},
            {"role": "assistant", "content": "a"},
        ]
        return read_record({"messages": turns, **record}, where="")[0].turns[0].content

    assert read("<image>\nWhat?", images=["a.jpg"]) == (Image("0.jpg"), Text("What?"))
    assert read("What?", images=["a.jpg"]) == (Image("0.jpg"), Text("What?"))
    assert read("What does <video> do in HTML?") == (Text("What does <video> do in HTML?"),)
    both = [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "<image>\nWhat?"}]
    messages = [{"role": "user", "content": both}, {"role": "assistant", "content": "a"}]
    with pytest.raises(SampleError, match="take the tag out"):
        read_record({"messages": messages}, where="")
    messages[0]["content"] = both[:1]
    assert len(read_record({"messages": messages, "images": ["a.jpg"]}, where="")[1]) == 1
    with pytest.raises(SampleError, match="name each once"):
        read_record({"messages": messages, "images": ["b.jpg"]}, where="")


def test_an_answer_may_not_show_a_picture():
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": [{"type": "image", "image": "a.jpg"}]},
    ]
    with pytest.raises(SampleError, match="assistant turn holds a part of type image"):
        read_record({"messages": turns}, where="")


@pytest.mark.parametrize(
    ("clip", "expected"),
    [
        ({"fps": 2}, Video("0.mp4", fps=2.0)),
        ({"fps": "0.5", "start": "1.5", "end": "1:02.5"}, Video("0.mp4", 1.5, 62.5, 0.5)),
        ({"video_start": 1, "video_end": 2}, Video("0.mp4", 1.0, 2.0)),
    ],
)
def test_what_is_said_of_a_clip_is_kept(clip, expected):
    record = {"conversations": TALK, "video": "a.mp4", **clip}
    assert read_record(record, where="")[0].turns[0].content[0] == expected


HUGE = 10**400  # JSON allows it, and it is below infinity, but it is no float


@pytest.mark.parametrize(
    "wrong",
    [
        {"fps": 0},
        {"fps": "fast"},
        {"fps": True},
        {"fps": HUGE},
        {"start": "a"},
        {"start": HUGE},
        {"end": [1]},
    ],
)
def test_a_wrong_rate_or_time_is_rejected(wrong):
    with pytest.raises(SampleError, match="is no"):
        files({"video": "a.mp4"}, **wrong)
