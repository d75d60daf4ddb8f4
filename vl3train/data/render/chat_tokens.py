"""From a conversation to ids, labels and placeholders.

Equal to what ``VideoLlama3Processor`` makes of the same conversation with ``contracts.tokens.CHAT_TEMPLATE``.
Structure is put in as ids; a user's words are never read as structure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer

from vl3train.contracts.geometry import time_text
from vl3train.contracts.records import SampleError
from vl3train.contracts.tokens import (
    IGNORE_INDEX,
    IM_END,
    IM_START,
    IMAGE_PAD,
    STREAM_END,
    STREAM_START,
    UPSTREAM_ADDED_TOKENS,
    VIDEO_PAD,
)
from vl3train.data.records.conversation import (
    Conversation,
    Image,
    Stream,
    Text,
    Turn,
    is_learned,
    visual_items,
)
from vl3train.data.render.stream_tokens import SpeakOrWait

TOKENIZER_FILE = "tokenizer.json"

SHORT, MOST_SHORT = 24, 10_000
"""Headers, line ends and times of frames repeat: ids of at most MOST_SHORT texts of up to SHORT characters are kept."""


class ChatTokenizer:
    """A Qwen2 or Qwen2.5 tokenizer with the tokens that VideoLLaMA3 needs, without transformers."""

    def __init__(self, tokenizer: Tokenizer, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self._tokenizer = tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # "<|im_end|>" in words is words
        self._short: dict[str, tuple[int, ...]] = {}
        self.special_ids = {
            token: self._id(token)
            for token in (IM_START, IM_END, IMAGE_PAD, VIDEO_PAD, STREAM_START, STREAM_END)
        }
        self.im_end_id = self.special_ids[IM_END]
        self.image_pad_id = self.special_ids[IMAGE_PAD]
        self.video_pad_id = self.special_ids[VIDEO_PAD]

    @classmethod
    def from_folder(cls, folder: str | Path) -> ChatTokenizer:
        """The tokenizer of a checkpoint folder.

        The placeholders, which Qwen2 lacks, and the original code's tokens are added where missing, in the
        order that ``model.weights.processor.build_processor`` adds them, so that ids agree. Whether the model's
        embedding has a row for each is checked where the model is opened.

        Raises:
            ValueError: no tokenizer.json, or a damaged one, or no ChatML tokens in it.
        """
        path = Path(folder) / TOKENIZER_FILE
        if not path.is_file():
            raise ValueError(
                f"{folder} holds no {TOKENIZER_FILE}; save it there with AutoTokenizer.save_pretrained"
            )
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the class of all errors of tokenizers
            raise ValueError(f"{path} cannot be read: {error}") from error
        if lacking := [token for token in (IM_START, IM_END) if tokenizer.token_to_id(token) is None]:
            raise ValueError(f"{path} has no {', '.join(lacking)}; take a Qwen2 or Qwen2.5 tokenizer")
        for token in (IMAGE_PAD, VIDEO_PAD, *UPSTREAM_ADDED_TOKENS):
            if tokenizer.token_to_id(token) is None:
                tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        return cls(tokenizer, hashlib.sha256(path.read_bytes()).hexdigest())

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; the names of special tokens in it are plain text too."""
        ids = self._short.get(text)
        if ids is None:
            ids = tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)
            if len(text) <= SHORT and len(self._short) < MOST_SHORT:
                self._short[text] = ids
        return list(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens included."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def words(self, ids: Sequence[int]) -> str:
        """Text of ids without special tokens and outer space: an answer."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def _id(self, token: str) -> int:
        number = self._tokenizer.token_to_id(token)
        if number is None:
            raise ValueError(f"the tokenizer has no {token}; open it with ChatTokenizer.from_folder")
        return int(number)


@dataclass(frozen=True, slots=True)
class ItemTokens:
    """What the text needs to know of a visual item."""

    kept: tuple[int, ...]  # visual tokens kept of each frame; of an image one number
    times: tuple[float, ...] = ()  # of each frame, in seconds since the file's first; empty for an image


@dataclass(frozen=True, slots=True)
class RenderedText:
    """T ids, N placeholders."""

    input_ids: np.ndarray  # (T,) int64
    labels: np.ndarray  # (T,) int64, shifted: the next id, or IGNORE_INDEX
    placeholder_positions: np.ndarray  # (N,) int64, item after item, in the order of the kept tokens

    @property
    def prefix_tokens(self) -> int:
        """Tokens up to the last visual one, if nothing is learned of them: what records of the same media may share."""
        if not len(self.placeholder_positions):
            return 0
        end = int(self.placeholder_positions.max()) + 1
        return 0 if (self.labels[:end] != IGNORE_INDEX).any() else end


def render_conversation(
    conversation: Conversation,
    items: Sequence[ItemTokens],
    tokenizer: ChatTokenizer,
    stream_supervision: str = "training",
) -> RenderedText:
    """Render a conversation; ``items`` are those of ``conversation.visual_items`` in its order.

    Supervised are the words of the assistant and the ``<|im_end|>`` after them. Where the words begin with whitespace
    that the tokenizer joins with the newline of the header, the joined token is not. Of an answer without words, and
    of one that the record takes out of the loss, nothing is. Of streamed frames ``stream_tokens.py`` says what is.

    Args:
        stream_supervision: ``data.stream_supervision``.

    Raises:
        SampleError: an image or clip in an assistant turn, or something else than frames in a stream turn.
    """
    by_part = dict(zip((item.part for item in visual_items(conversation)), items, strict=True))
    writer = _Writer(tokenizer, by_part, stream_supervision)
    for turn in conversation.turns:
        if turn.role == "stream":
            writer.write_stream(turn)
        else:
            writer.write_turn(turn)
    return writer.finished()


class _Writer:
    """Ids as they grow. Text waits until a special token ends it: the tokenizer must see it in one piece."""

    def __init__(
        self, tokenizer: ChatTokenizer, items: dict[str, ItemTokens], stream_supervision: str
    ) -> None:
        self.tokenizer = tokenizer
        self.items = items
        self.ids: list[np.ndarray] = []  # in pieces: placeholders are many and all the same
        self.supervised: list[np.ndarray] = []
        self.length = 0
        self.waiting = ""
        self.positions: dict[str, list[np.ndarray]] = {part: [] for part in items}
        self.shown = dict.fromkeys(items, 0)  # frames of a streamed clip
        self.frames_ends = stream_supervision == "training"
        self.speaks = SpeakOrWait() if stream_supervision == "released" else None
        self.after_frame = False

    def add_ids(self, ids: Sequence[int] | np.ndarray, supervised: bool = False) -> None:
        self.ids.append(np.asarray(ids, np.int64))
        self.supervised.append(np.full(len(ids), supervised))
        self.length += len(ids)

    def flush(self) -> None:
        self.add_ids(self.tokenizer.encode(self.waiting))
        self.waiting = ""

    def add_special(self, token: str, supervised: bool = False) -> None:
        self.flush()
        self.add_ids([self.tokenizer.special_ids[token]], supervised)

    def add_placeholders(self, part: str, token: str, count: int) -> None:
        self.flush()
        self.positions[part].append(np.arange(self.length, self.length + count))
        self.add_ids(np.full(count, self.tokenizer.special_ids[token]))

    def write_turn(self, turn: Turn) -> None:
        self.start_message(IM_START, turn.role != "assistant" or is_learned(turn))
        header = f"{turn.role}\n"
        self.waiting = header
        for content in turn.content:
            if isinstance(content, Text):
                self.waiting += content.text
            else:
                if turn.role == "assistant":
                    raise SampleError(
                        f"an assistant turn holds {content.type} {content.part}; it may hold words only"
                    )
                item = self.items[content.part]
                if isinstance(content, Image):
                    self.add_placeholders(content.part, IMAGE_PAD, item.kept[0])
                for number, (seconds, kept) in enumerate(zip(item.times, item.kept, strict=False)):
                    self.waiting += ("," if number else "") + time_text(seconds)
                    self.add_placeholders(content.part, VIDEO_PAD, kept)
                self.waiting += "\n"
        if is_learned(turn):
            self._flush_answer(header)
        self.add_special(IM_END, supervised=is_learned(turn))
        self.waiting = "\n"
        self.after_frame = False

    def start_message(self, token: str, may_be_learned: bool = True) -> None:
        """The first token of a message. After a streamed frame it says whether the model speaks or waits."""
        self.add_special(token)
        if self.speaks and self.after_frame and may_be_learned:
            self.speaks.add(self.length - 1, token)

    def _flush_answer(self, header: str) -> None:
        """Supervise the waiting text but for its header."""
        header_ids, ids = self.tokenizer.encode(header), self.tokenizer.encode(self.waiting)
        pairs = zip(header_ids, ids, strict=False)
        same = next((i for i, (ours, whole) in enumerate(pairs) if ours != whole), len(header_ids))
        masked = same if same == len(header_ids) else same + 1
        self.add_ids(ids[:masked])
        self.add_ids(ids[masked:], supervised=True)
        self.waiting = ""

    def write_stream(self, turn: Turn) -> None:
        """One message for each frame that is due, its time counted from the record's start (train.py:327)."""
        for content in turn.content:
            if not isinstance(content, Stream):
                raise SampleError(f"a stream turn holds {content.type}; it may hold frames only")
            item = self.items[content.part]
            while (number := self.shown[content.part]) < len(item.times):
                if item.times[number] > content.until:
                    break
                self.start_message(STREAM_START)
                self.waiting = f"stream\n{time_text(item.times[number] - (content.start or 0.0))} "
                self.add_placeholders(content.part, VIDEO_PAD, item.kept[number])
                self.add_ids(self.tokenizer.encode("\n"), supervised=self.frames_ends)
                self.add_special(STREAM_END, supervised=self.frames_ends)
                self.waiting = "\n"
                self.after_frame = True
                self.shown[content.part] = number + 1

    def finished(self) -> RenderedText:
        self.flush()
        ids, supervised = np.concatenate(self.ids), np.concatenate(self.supervised)
        if self.speaks:
            supervised[self.speaks.balanced(ids)] = True
        labels = np.full(len(ids), IGNORE_INDEX, np.int64)
        labels[:-1] = np.where(supervised[1:], ids[1:], IGNORE_INDEX)
        positions = [piece for part in self.items for piece in self.positions[part]]
        return RenderedText(ids, labels, np.concatenate([np.zeros(0, np.int64), *positions]))
