"""Other people's shards: captions, LLaVA records, messages; media are counted against what the text shows."""

from __future__ import annotations

import contextlib
import io
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from tests.data.conftest import LIMITS
from tests.data.faults_fixture import clip, jpeg
from tests.data.render.test_samples import SETTINGS
from vl3train.contracts.records import SampleError
from vl3train.data.prepare.write_shards import write_members
from vl3train.data.records.conversation import Conversation, Image, Text, Turn, Video
from vl3train.data.records.importers import from_caption
from vl3train.data.records.shard_records import open_conversation
from vl3train.data.render.chat_tokens import ChatTokenizer
from vl3train.data.render.samples import measure_sample
from vl3train.data.shards.read import read_parts
from vl3train.data.shards.tar_headers import shard_samples

PNG, MP4 = b"png", b"mp4"
WORDS = st.sampled_from(
    ["type", "text", "part", "role", "content", "image", "from", "value", "turns", "until"]
)


@pytest.fixture(scope="module")
def made_media(tmp_path_factory):
    return {"0.jpg": jpeg(), "1.mp4": clip(tmp_path_factory.mktemp("clip"))}


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return ChatTokenizer.from_folder(tokenizer_dir)


def test_a_byte_order_mark_is_no_word():
    assert open_conversation(b"", {"jpg": b"", "txt": b"\xef\xbb\xbfA cat."}).turns[-1] == Turn(
        "assistant", (Text("A cat."),)
    )


@pytest.mark.parametrize("key", ["start", "end", "fps"])
def test_a_number_of_a_clip_that_is_no_float_is_told(key):
    turns = [{"role": "user", "content": [{"type": "video", "part": "0.mp4", key: 10**400}]}]
    with pytest.raises(SampleError, match=f"{key}=10+ is no"):
        open_conversation(json.dumps({"turns": turns}).encode(), {"0.mp4": MP4})


def test_half_a_character_is_refused_whoever_wrote_it():
    turns = [{"role": "assistant", "content": [{"type": "text", "text": "a \ud83d"}]}]
    for record in ({"caption": "a \ud83d"}, {"turns": turns}):
        with pytest.raises(SampleError, match="half a character"):
            open_conversation(json.dumps(record).encode(), {"jpg": b""})


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
    with pytest.raises(SampleError, match=reason.replace("|", r"\|")):
        open_conversation(data, parts)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 9)
    | st.floats()
    | st.sampled_from(["", "a", "<image>", "0.jpg"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)


def strange(valid):
    """``valid`` with some of its values replaced by any other."""
    if isinstance(valid, dict):
        whole = st.fixed_dictionaries({key: strange(value) for key, value in valid.items()})
    elif isinstance(valid, list):
        whole = st.tuples(*map(strange, valid)).map(list)
    else:
        whole = st.just(valid)
    return st.integers(0, 7).flatmap(lambda dice: whole if dice else JSON)


TURNS = [
    {"role": "user", "content": [{"type": "image", "part": "0.jpg"}, {"type": "text", "text": "Is it?"}]},
    {
        "role": "stream",
        "content": [{"type": "stream", "part": "1.mp4", "until": 1.0, "start": 0.5, "end": 2}],
    },
    {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
]
LLAVA = [{"from": "human", "value": "<image>\nIs it?"}, {"from": "gpt", "value": "Yes."}]
FORMS = [
    {"turns": TURNS},
    {"conversations": LLAVA, "image": "a.jpg"},
    {"messages": TURNS[::2]},
    {"caption": "A cat."},
]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(FORMS).flatmap(strange) | JSON)
def test_no_json_can_do_more_than_be_refused(tokenizer, made_media, record):
    data = json.dumps(record).encode()
    with contextlib.suppress(SampleError):
        measure_sample(data, made_media, SETTINGS, tokenizer, LIMITS)


def test_documents_are_refused_part_by_part_with_the_way_out(tmp_path, tokenizer):
    """As pdfa-eng-wds and idl-wds come; beside them a page that was rendered is a sample like others."""
    pages = json.dumps({"pages": [{"words": {"text": ["Dear"]}}, {"words": {"text": ["Sir"]}}]}).encode()
    samples = {
        "pdfa": {"json": pages, "pdf": b"%PDF-1.7"},
        "idl": {"json": pages, "tif": tiff(2), "ocr": b"..."},
        "scans": {"txt": b"Dear Sir", "tif": tiff(2)},
        "scan": {"txt": b"Dear Sir", "tif": tiff(1)},
        "rendered": {"txt": b"Dear Sir", "0.jpg": jpeg(), "pdf": b"%PDF-1.7"},
    }
    write_members(tmp_path / "0.tar", list(samples.items()))
    said = {}
    for sample in shard_samples(tmp_path / "0.tar"):
        data = read_parts(tmp_path / "0.tar", sample.parts)
        try:
            if sample.rejection:
                raise SampleError(sample.rejection)
            measure_sample(data.pop("json", b""), data, SETTINGS, tokenizer, LIMITS)
        except SampleError as error:
            said[sample.key] = str(error)
    assert list(said) == ["pdfa", "idl", "scans"]
    assert said["pdfa"].startswith("member .pdf: documents are not opened; render each page")
    assert said["idl"].startswith("a document: its .json holds the words of 2 pages")
    assert said["scans"] == "a TIFF of 2 pages: write each page as a picture of its own"


def tiff(pages):
    page, file = Pillow.new("RGB", (60, 80), "white"), io.BytesIO()
    page.save(file, "TIFF", save_all=True, append_images=[page] * (pages - 1))
    return file.getvalue()


def test_both_readers_of_captions_accept_every_key_that_either_has_known():
    known_to_records = ("caption", "text", "recaption", "captions")
    known_to_shards = ("caption", "text", "recaption", "re_caption", "caption_llava", "top_caption")
    for key in dict.fromkeys((*known_to_records, *known_to_shards)):
        record = from_caption({"image": "a.png", key: "A cat."})
        assert record["conversations"][1]["value"] == "A cat."
        assert open_conversation(json.dumps({key: "A cat."}).encode(), {"jpg": PNG}) == said(
            Image("jpg"), answer="A cat."
        )
    both = dict.fromkeys(known_to_shards[::-1], "late") | {"caption": "first"}
    assert open_conversation(json.dumps(both).encode(), {"jpg": PNG}) == said(Image("jpg"), answer="first")


@pytest.mark.parametrize(
    "record",
    [
        {"question": "Which?", "answer": "Yes."},
        {"instruction": "Which?", "input": "", "output": "Yes."},
        {"query": "<image>Which?", "response": "Yes.", "images": ["elsewhere.png"]},
        {"prompt": [{"role": "user", "content": "Which?"}], "completion": "Yes.", "caption": "no dialogue"},
    ],
)
def test_a_question_with_its_answer_as_in_files_of_records(record):
    found = open_conversation(json.dumps(record).encode(), {"jpg": PNG})
    assert found == said(Image("jpg"), Text("Which?"))


def test_preferences_in_a_shard_are_refused_as_in_files_of_records():
    record = {"prompt": "Which?", "chosen": "Yes.", "rejected": "No."}
    with pytest.raises(SampleError, match="preference data"):
        open_conversation(json.dumps(record).encode(), {"jpg": PNG})
