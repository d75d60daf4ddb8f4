"""Other people's shards: captions, LLaVA records, messages; media are counted against what the text shows."""

from __future__ import annotations

import json

import pytest

from vl3train.contracts.records import BadSample
from vl3train.data.conversation import Conversation, Image, Text, Turn, Video
from vl3train.data.foreign import open_conversation

PNG, MP4 = b"png", b"mp4"


def said(*contents, answer="Yes."):
    return Conversation((Turn("user", contents), Turn("assistant", (Text(answer),))))


def llava(question, **fields):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "Yes."}]
    return json.dumps({"conversations": turns, **fields}).encode()


@pytest.mark.parametrize(
    ("data", "parts", "expected"),
    [
        (b"", {"jpg": PNG, "txt": b" A cat.\n"}, said(Image("jpg"), answer="A cat.")),
        (b'{"caption": "A cat.", "url": 1}', {"jpg": PNG}, said(Image("jpg"), answer="A cat.")),
        (b'{"width": 4}', {"jpg": PNG, "txt": b"A cat."}, said(Image("jpg"), answer="A cat.")),
        (b'{"caption": "A dog runs."}', {"mp4": MP4}, said(Video("mp4"), answer="A dog runs.")),
        (llava("<image>\nIs it?"), {"png": PNG}, said(Image("png"), Text("Is it?"))),
        (llava("Is it?", image="coco/1.jpg"), {"jpg": PNG}, said(Image("jpg"), Text("Is it?"))),
        (
            llava("<image> and <image>?", image=["b.jpg", "a.jpg"]),
            {"10.jpg": PNG, "2.jpg": PNG},
            said(Image("2.jpg"), Text("and"), Image("10.jpg"), Text("?")),
        ),
        (
            llava("<video><image>Which?"),
            {"image_0.jpg": PNG, "0.mp4": MP4},
            said(Video("0.mp4"), Image("image_0.jpg"), Text("Which?")),
        ),
        (
            json.dumps(
                {
                    "messages": [
                        {
                            "role": "user",
                            "content": [
                                {"type": "image", "image": "x.png"},
                                {"type": "text", "text": "Is it?"},
                            ],
                        },
                        {"role": "assistant", "content": "Yes."},
                    ]
                }
            ).encode(),
            {"0.png": PNG},
            said(Image("0.png"), Text("Is it?")),
        ),
        (said(Image("0.png")).to_json(), {"0.png": PNG}, said(Image("0.png"))),
        (llava("Is it?"), {}, said(Text("Is it?"))),
    ],
)
def test_conversations_of_others(data, parts, expected):
    assert open_conversation(data, parts) == expected


@pytest.mark.parametrize(
    ("data", "parts", "reason"),
    [
        (b"", {"txt": b"A cat."}, "without a picture"),
        (b"", {"txt": b"  ", "jpg": PNG}, "caption is empty"),
        (b"", {"txt": b"\xff", "jpg": PNG}, "no UTF-8"),
        (b"[1]", {"jpg": PNG}, "no object but a list"),
        (b"[" * 100_000, {"jpg": PNG}, "no JSON"),
        (b'{"width": 4}', {"jpg": PNG}, "no conversation: the .json has"),
        (llava("<image><image>?"), {"jpg": PNG}, "2 <image> tags for 1"),
        (llava("<image>?"), {"0.jpg": PNG, "1.jpg": PNG}, "1 <image> tags for 2"),
        (llava("<image>?"), {"0.mp4": MP4}, "<image> tags for 0"),
        (llava("Is it?"), {"0.xyz": PNG}, "neither a picture nor a clip"),
        (b"", {"jpg": PNG, "txt": b"a <|im_end|>"}, "means structure"),
    ],
)
def test_what_does_not_fit_says_why(data, parts, reason):
    with pytest.raises(BadSample, match=reason.replace("|", r"\|")):
        open_conversation(data, parts)
