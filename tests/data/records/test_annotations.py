"""Every form of record that users have becomes one canonical conversation, or says what is wrong."""

from __future__ import annotations

import pytest

from vl3train.contracts.records import SampleError
from vl3train.data.records.annotations import read_record
from vl3train.data.records.conversation import (
    Conversation,
    Image,
    Stream,
    Text,
    Turn,
    Video,
    read_conversation,
)
from vl3train.data.records.media_files import MediaFile


def record(*values: str, **media) -> dict:
    """A LLaVA record: human and gpt in turns."""
    names = ("human", "gpt") * len(values)
    turns = [{"from": name, "value": value} for name, value in zip(names, values, strict=False)]
    return {"id": 7, "conversations": turns, **media}


def contents(rec: dict) -> list:
    conversation, _ = read_record(rec, where="a.json[3]")
    return [content for turn in conversation.turns for content in turn.content]


def test_one_image_as_text_or_list():
    for media in ("images/x.JPG", ["images/x.JPG"]):
        conversation, files = read_record(record("<image>\nWhat?", "A cat.", image=media), where="")
        assert files == (MediaFile("images/x.JPG", "image"),)
        assert conversation == Conversation(
            (Turn("user", (Image("0.jpg"), Text("What?"))), Turn("assistant", (Text("A cat."),)))
        )


def test_tags_take_the_files_in_order_over_all_turns():
    rec = record(
        "A <image> b <image>", "1", "<video><image> c", "2", image=["a.png", "b.jpg", "c.webp"], video="d.mp4"
    )
    conversation, files = read_record(rec, where="")
    assert [file.path for file in files] == ["a.png", "b.jpg", "d.mp4", "c.webp"]
    assert [turn.content for turn in conversation.turns if turn.role == "user"] == [
        (Text("A"), Image("0.png"), Text("b"), Image("1.jpg")),
        (Video("2.mp4"), Image("3.webp"), Text("c")),
    ]


@pytest.mark.parametrize("video", ["v.mp4", ["v.mp4"]])
def test_video_as_text_or_list_with_start_and_end(video):
    rec = record("<video>\nWhat?", "A dog.", video=video, start_time=1.5, end_time=4)
    assert contents(rec)[0] == Video("0.mp4", 1.5, 4.0)


def test_several_videos():
    rec = record("<video> and <video>", "Same.", video=["a.mp4", "b.mkv"])
    assert contents(rec)[:3] == [Video("0.mp4"), Text("and"), Video("1.mkv")]


def test_missing_tags_are_put_in_front_in_order():
    rec = record("Compare.", "ok", "More?", "no", image=["a.png", "b.png"], video="c.mp4")
    assert contents(rec) == [
        *(Image("0.png"), Image("1.png"), Video("2.mp4"), Text("Compare.")),
        *(Text("ok"), Text("More?"), Text("no")),
    ]
    with_system = record("Hi", "ok", image="a.png")
    with_system["conversations"].insert(0, {"from": "system", "value": "Be kind.\n"})
    turns = read_record(with_system, where="")[0].turns
    assert turns[0] == Turn("system", (Text("Be kind.\n"),))
    assert turns[1].content == (Image("0.png"), Text("Hi"))


def test_text_only_and_system_are_kept():
    turns = read_record(record(" Hi \n", " Hello. \n"), where="")[0].turns
    assert turns == (Turn("user", (Text("Hi"),)), Turn("assistant", (Text(" Hello. \n"),)))
    assert contents(record("a", "b", image=None, video=[])) == [Text("a"), Text("b")]


def test_answers_before_the_first_question_are_dropped():
    rec = record("Q", "A")
    rec["conversations"].insert(0, {"from": "gpt", "value": "Welcome!"})
    assert contents(rec) == [Text("Q"), Text("A")]


def test_openai_messages():
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": "file:///data/a.png"}},
                {"type": "image", "image": "b.jpg"},
                {"type": "text", "text": " Compare "},
                {"type": "video_url", "video_url": {"url": "c.mp4"}, "start_time": 2},
                {"type": "video", "url": "d.mp4"},
                {"type": "image", "path": "e.png"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "Same."}]},
    ]
    conversation, files = read_record({"messages": messages}, where="")
    assert [file.path for file in files] == ["/data/a.png", "b.jpg", "c.mp4", "d.mp4", "e.png"]
    assert conversation.turns[1].content == (
        *(Image("0.png"), Image("1.jpg"), Text(" Compare ")),
        *(Video("2.mp4", 2.0), Video("3.mp4"), Image("4.png")),
    )


def test_messages_with_tags_and_file_lists():
    messages = [{"role": "user", "content": "<image> What?"}, {"role": "assistant", "content": "A cat."}]
    assert contents({"messages": messages, "images": ["a.jpg"]})[0] == Image("0.jpg")


def test_streaming_records():
    rec = {
        "stream": True,
        "video": ["x.mp4"],
        "start_time": 10,
        "end_time": 20,
        "conversation": [
            {"role": "user", "content": "Tell me when.", "time": 10.0},
            {"role": "assistant", "content": "Now.", "time": 13.5},
        ],
    }
    conversation, files = read_record(rec, where="")
    assert files == (MediaFile("x.mp4", "video"),)
    assert conversation.turns == (
        Turn("stream", (Stream("0.mp4", 10.0, 10.0, 20.0),)),
        Turn("user", (Text("Tell me when."),)),
        Turn("stream", (Stream("0.mp4", 13.5, 10.0, 20.0),)),
        Turn("assistant", (Text("Now."),)),
    )


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (record("<image> a <image>", "b", image="x.jpg"), "2 <image> tags for 1 image files"),
        (record("<image> a", "b", image=["x.jpg", "y.jpg"]), "1 <image> tags for 2 image files"),
        (record("<video> a", "b"), "1 <video> tags for 0 video files"),
        (record("a"), "no assistant turn"),
        ({"conversations": []}, "no conversation"),
        ({"text": "a"}, "no conversation"),
        ({"conversations": [{"from": "robot", "value": "a"}]}, "unknown role 'robot'"),
        ({"conversations": [{"from": "human", "value": None}]}, "turn without text"),
        ({"conversations": ["a"]}, "no object"),
        (record("Say <|im_end|> now", "b"), r"text holds <\|im_end\|>"),
        (record("a", "<|image_pad|>"), r"text holds <\|image_pad\|>"),
        (record("a", "b", image="https://x.org/a.jpg"), "is an address; download it"),
        (record("a", "b", image=[3]), "is no file path"),
        (record("a", "b", video="x.mp4", start_time=-1), "start_time=-1 is no time"),
        (
            record("<image>", "b", image="x.png", images=["y.png"]),
            "it has image and images, with other files",
        ),
        (record("a", "b", video="x.mp4", end_time="soon"), "end_time='soon' is no time"),
        (
            record("a", "b", video="x.mp4", start_time=5, end_time=2),
            "end_time=2.0 comes before start_time=5.0",
        ),
        (record("a", "b \ud83d"), r"'b \\ud83d' holds half a character"),
        (record("a", "b", image="\ud83d.jpg"), "holds half a character"),
        (record("a", "b", image="x.txt"), "'x.txt' is a .txt file"),
        (record("a", "b", image="x.JSON"), "'x.JSON' is a .json file"),
        ({"messages": [{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}]}, "content part"),
        ({"messages": [{"role": "system", "content": "a"}], "image": "x.jpg"}, "no user turn"),
        ({"stream": True, "video": ["a.mp4", "b.mp4"], "conversation": [{}]}, "one video"),
        ({"stream": True, "video": "a.mp4", "conversation": [{"role": "user", "content": "a"}]}, "a time"),
    ],
)
def test_bad_records_say_where_and_why(bad, reason):
    with pytest.raises(SampleError, match=reason) as caught:
        read_record(bad, where="a.json[3]")
    assert str(caught.value).startswith("a.json[3]: ")


def test_canonical_form_round_trip_and_renaming():
    conversation, _ = read_record(
        record("<image> é <video>", "ok", image="a.png", video="b.mp4", start_time=1), where=""
    )
    assert read_conversation(conversation.to_json()) == conversation
    renamed = read_conversation(conversation.to_json(["0.webp", "1.mkv"]))
    assert renamed.turns[0].content == (Image("0.webp"), Text("é"), Video("1.mkv", 1.0))
    for broken in (b"{", b"[]", b'{"turns": [{"role": "user", "content": [{"type": "x"}]}]}', b"\xff"):
        with pytest.raises(SampleError):
            read_conversation(broken)
