"""Records of published data sets as records that ``annotations.read_record`` reads: one pure function each.

Chosen by a prefix, ``vl3train shards caption:coyo.parquet``. LLaVA records and `messages` need none. How to add one
is in docs/importers.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

Record = Mapping[str, Any]

CAPTION_KEYS = ("caption", "text", "recaption", "re_caption", "caption_llava", "top_caption", "captions")
"""Keys of a caption, in a record and in the .json of a shard's sample; the first that has a value counts."""
IMAGE_KEYS = ("image", "image_path", "file_name", "path", "jpg", "png", "webp", "img")


def from_caption(record: Record) -> dict[str, Any]:
    """A picture and what it shows: COYO, LAION, CC3M rows whose pictures are downloaded.

    >>> from_caption({"image_path": "a.jpg", "text": "A cat."})["conversations"][1]["value"]
    'A cat.'
    """
    caption = _first(record, CAPTION_KEYS, "a caption")
    return _talk({"image": _first(record, IMAGE_KEYS, "a picture")}, [("<image>", caption)])


def from_question(record: Record) -> dict[str, Any]:
    """A picture, a question and its answer or answers, of which the first is taken: ChartQA, DocVQA, DVQA.

    >>> from_question({"image": "a.png", "query": "How many?", "label": ["3"]})["conversations"][1]["value"]
    '3'
    """
    answer = _first(record, ("answer", "answers", "label", "labels"), "an answer")
    question = _first(record, ("question", "query"), "a question")
    return _talk({"image": _first(record, IMAGE_KEYS, "a picture")}, [(f"<image>\n{question}", answer)])


def from_cauldron(record: Record) -> dict[str, Any]:
    """Pictures and several turns about them: Docmatix, The Cauldron.

    >>> turns = [{"user": "What?", "assistant": "A cat."}, {"user": "Where?", "assistant": "Here."}]
    >>> [turn["value"] for turn in from_cauldron({"images": ["a.png", "b.png"], "texts": turns})["conversations"]]
    ['<image><image>\\nWhat?', 'A cat.', 'Where?', 'Here.']
    """
    images = _first(record, ("images",), "pictures", whole=True)
    turns = [(turn["user"], turn["assistant"]) for turn in _first(record, ("texts",), "texts", whole=True)]
    tags = "<image>" * len(images)
    return _talk({"image": images}, [(f"{tags}\n{turns[0][0]}", turns[0][1]), *turns[1:]])


def from_synthdog(record: Record) -> dict[str, Any]:
    """A page and the text on it: SynthDoG.

    >>> page = {"image": "a.png", "ground_truth": '{"gt_parse": {"text_sequence": "Hello"}}'}
    >>> from_synthdog(page)["conversations"][1]["value"]
    'Hello'
    """
    truth = json.loads(_first(record, ("ground_truth",), "ground_truth"))["gt_parse"]["text_sequence"]
    return _talk({"image": _first(record, IMAGE_KEYS, "a picture")}, [("<image>", truth)])


def from_finevideo(record: Record) -> dict[str, Any]:
    """A clip with its description and questions: FineVideo.

    >>> facts = {"content_metadata": {"description": "A walk.", "qAndA": [{"question": "Who?", "answer": "Ann."}]}}
    >>> [turn["value"] for turn in from_finevideo({"mp4": "a.mp4", "json": facts})["conversations"]]
    ['<video>\\nDescribe the video.', 'A walk.', 'Who?', 'Ann.']
    """
    facts = _first(record, ("json",), "json", whole=True)
    facts = json.loads(facts) if isinstance(facts, (str, bytes)) else facts
    content = facts["content_metadata"]
    turns = [("<video>\nDescribe the video.", content["description"])]
    turns += [(pair["question"], pair["answer"]) for pair in content.get("qAndA") or ()]
    clip = _first(record, ("mp4", "video"), "a clip")
    return _talk({"video": {"bytes": clip, "path": ""} if isinstance(clip, bytes) else clip}, turns)


def from_charades(record: Record) -> dict[str, Any]:
    """A clip of a folder by its id, with descriptions, questions and times, as far as there are any: Charades.

    Columns of Charades' csv are ``id``, ``descriptions`` (several, with ``;`` between them) and ``script``; of
    Charades-STA ``id``, ``start``, ``end`` and ``sentence``; besides ``question`` and ``answer`` are read.

    >>> row = {"id": "46GP8", "descriptions": "A person cooks.;Someone stirs.", "script": "A person cooks."}
    >>> [turn["value"] for turn in from_charades(row)["conversations"]]
    ['<video>\\nDescribe the video.', 'A person cooks.', 'Describe it in other words.', 'Someone stirs.']
    >>> row = {"id": "AO8RW", "start": 0.0, "end": 6.9, "sentence": "a person puts a book on a shelf."}
    >>> [turn["value"] for turn in from_charades(row)["conversations"]]
    ['<video>\\nWhen does this happen: a person puts a book on a shelf.', '0.0-6.9 s']
    """
    said = [text.strip() for text in str(record.get("descriptions") or "").split(";") if text.strip()]
    said = said or [str(record["script"]).strip()] if record.get("script") else said
    asked = ["Describe the video.", *["Describe it in other words."] * (len(said) - 1)]
    turns = list(zip(asked, said, strict=False))
    if record.get("question") is not None:
        turns.append((str(record["question"]), str(_first(record, ("answer", "answers"), "an answer"))))
    if record.get("start") is not None:
        sentence = _first(record, ("sentence", "query", "caption"), "a sentence for its times")
        turns.append(_moment(sentence, record["start"], record["end"]))
    return _about_clip(record, turns)


def from_moments(record: Record) -> dict[str, Any]:
    """A clip with sentences and the seconds from and to which each is true: ActivityNet Captions, YouCook2, ViTT.

    >>> row = {"video": "v_1.mp4", "timestamps": [[0.3, 5.0], [5, 9.25]], "sentences": ["He runs.", "He falls."]}
    >>> [turn["value"] for turn in from_moments(row)["conversations"]][1:]
    ['0.3-5.0 s', 'When does this happen: He falls.', '5.0-9.2 s']
    """
    times = _first(record, ("timestamps", "segments", "times"), "times", whole=True)
    sentences = _first(record, ("sentences", "captions"), "sentences", whole=True)
    both = [json.loads(value) if isinstance(value, str) else value for value in (times, sentences)]
    turns = [_moment(sentence, *span) for span, sentence in zip(*both, strict=True)]
    return _about_clip(record, turns)


def _moment(sentence: Any, start: Any, end: Any) -> tuple[str, str]:
    """A question for a time and its answer in plain text, as VideoLLaMA3's stage 4 has it: "1.0-2.0 s"."""
    return f"When does this happen: {str(sentence).strip()}", f"{float(start):.1f}-{float(end):.1f} s"


def _about_clip(record: Record, turns: list[tuple[str, str]]) -> dict[str, Any]:
    """Turns about a clip that is named by its file, or by an id in a folder of .mp4."""
    if not turns:
        raise KeyError("descriptions, a question or times: nothing is said of the clip")
    clip = str(_first(record, ("video", "video_id", "id", "vid"), "a clip"))
    first, *others = turns
    name = clip if "." in clip.rpartition("/")[2] else f"{clip}.mp4"
    return _talk({"video": name}, [(f"<video>\n{first[0]}", first[1]), *others])


IMPORTERS: dict[str, Callable[[Record], dict[str, Any]]] = {
    "caption": from_caption,
    "question": from_question,
    "cauldron": from_cauldron,
    "synthdog": from_synthdog,
    "finevideo": from_finevideo,
    "charades": from_charades,
    "moments": from_moments,
}


def _first(record: Record, keys: tuple[str, ...], what: str, *, whole: bool = False) -> Any:
    """The value of the first key that is there; of a list its first entry, unless ``whole``."""
    for key in keys:
        value = record.get(key)
        if value is not None and (not hasattr(value, "__len__") or len(value)):
            return value[0] if isinstance(value, (list, tuple)) and not whole else value
    raise KeyError(f"{what}: none of {', '.join(keys)}")


def _talk(media: Record, turns: list[tuple[str, str]]) -> dict[str, Any]:
    said = [
        {"from": role, "value": value}
        for turn in turns
        for role, value in zip(("human", "gpt"), turn, strict=True)
    ]
    return {**media, "conversations": said}
