"""The conversation of a sample in other people's shards: LLaVA, `messages` or question-and-answer JSON, or a caption.

Taken are ``KEY.json`` as `vl3train shards` writes it; a record as `data.records.annotations` reads it, its files being
the sample's own media in their order; one of CAPTION_KEYS in the JSON; and ``KEY.txt``. A caption is what the
assistant says of the pictures, without a question, as in LLaVA's pretraining.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from vl3train.contracts.records import SampleError
from vl3train.contracts.tokens import IMAGE_TAG, VIDEO_TAG
from vl3train.data.records.annotations import holds_media, read_record
from vl3train.data.records.conversation import Conversation, read_conversation, rename_parts, visual_items
from vl3train.data.records.forms import DIALOGUE_KEYS, PAIRS, holds_dialogue
from vl3train.data.records.importers import CAPTION_KEYS
from vl3train.data.records.media_files import is_media_key
from vl3train.data.shards.tar_headers import CAPTION_PART, CLIP_SUFFIXES, IMAGE_SUFFIXES


def open_conversation(data: bytes, parts: Mapping[str, bytes]) -> Conversation:
    """The conversation of a sample, whoever wrote it.

    Args:
        data: its ``.json`` member; empty where there is none.
        parts: its other members: media, and ``txt``.

    Raises:
        SampleError: no known form; or, of a record, other media than it shows.
    """
    caption = parts.get(CAPTION_PART, b"")
    media = [name for name in parts if name != CAPTION_PART]
    if not data:
        return _captioned(_decoded(caption), media)
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SampleError(f"the .json member is no JSON: {error}") from error
    if not isinstance(record, dict):
        raise SampleError(f"the .json member holds no object but a {type(record).__name__}")
    if "turns" in record:
        return read_conversation(record)
    if holds_dialogue(record):
        return _dialogue(record, media)
    if "pages" in record and not caption:
        raise SampleError(
            f"a document: its .json holds the words of {_length(record['pages'])} pages, and no conversation; "
            "write a picture of each page with its text as KEY.txt"
        )
    found = next((record[key] for key in CAPTION_KEYS if isinstance(record.get(key), str)), None)
    if found is None and not caption:
        raise SampleError(
            f"no conversation: the .json has {sorted(record)}, none of {[*DIALOGUE_KEYS, *CAPTION_KEYS]}, "
            f"no question with its answer ({', '.join('/'.join(pair) for pair in PAIRS)}), and there is no .txt"
        )
    return _captioned(_decoded(caption) if caption else str(found), media)


def _length(pages: Any) -> int:
    return len(pages) if isinstance(pages, list) else 1


def _captioned(caption: str, media: Collection[str]) -> Conversation:
    if not caption.strip():
        raise SampleError("the caption is empty")
    if not media:
        raise SampleError("a caption without a picture or clip")
    turns = [{"from": "human", "value": ""}, {"from": "gpt", "value": caption.strip()}]
    return _dialogue({"conversations": turns}, media)


def _dialogue(record: Mapping[str, Any], media: Iterable[str]) -> Conversation:
    """A record whose files are the sample's media, kind by kind in the order of their names."""
    waiting: dict[str, list[str]] = {"image": [], "video": []}
    for name in sorted(media, key=_in_order):
        waiting[_kind(name)].append(name)
    there = {kind: len(names) for kind, names in waiting.items()}
    own = {key: value for key, value in record.items() if not is_media_key(key)}
    said: list[Any] = next((record[key] for key in DIALOGUE_KEYS if isinstance(record.get(key), list)), [])
    inside = any(map(holds_media, said))
    conversation, files = read_record(own if inside else {**own, **waiting}, where="json")
    wanted = {kind: sum(file.kind == kind for file in files) for kind in waiting}
    if wanted != there:
        raise SampleError(f"the conversation shows {_counted(wanted)}, the sample has {_counted(there)}")
    names = {
        content.part: waiting[files[int(content.part.partition(".")[0])].kind].pop(0)
        for content in visual_items(conversation)
    }
    return rename_parts(conversation, names)


def _in_order(name: str) -> tuple[int, str]:
    """By the number in the name, the unnumbered first: jpg, 1.jpg, 2.jpg, 10.jpg."""
    number = re.search(r"\d+(?=\.)", name)
    return (int(number[0]) if number else -1, name)


def _kind(name: str) -> str:
    suffix = name.rpartition(".")[2]
    if suffix in IMAGE_SUFFIXES or suffix in CLIP_SUFFIXES:
        return "image" if suffix in IMAGE_SUFFIXES else "video"
    raise SampleError(f"member .{name}: its suffix tells neither a picture nor a clip")


def _counted(counts: Mapping[str, int]) -> str:
    tags = {"image": IMAGE_TAG, "video": VIDEO_TAG}
    return " and ".join(f"{count} {tags[kind]}" for kind, count in counts.items())


def _decoded(text: bytes) -> str:
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SampleError(f"the .txt member is no UTF-8: {error}") from error
