"""What the model sees of a request's pictures and clips: frames, their times, and the tokens that pruning drops."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from vl3train.contracts.records import RenderedSample
from vl3train.data.render.chat_tokens import ChatTokenizer
from vl3train.inference.questions import question_batch
from vl3train.preview.step_samples import frame_picture
from vl3train.report.html import data_url, thumbnail

STAMP = re.compile(r"Time (\d+\.\d)s:")
STAMP_TOKENS = 16
"""More than the tokens of a time stamp, with the comma before it."""


@dataclass(frozen=True, slots=True)
class ShownItem:
    """A picture or clip: ``kept`` are its merged tokens, row by row; ``times`` are empty for a picture."""

    patches: np.ndarray  # (t, h * w, 588) uint8
    kept: np.ndarray  # (t, h / merge * w / merge) bool
    grid: tuple[int, int]
    merge: int
    times: list[str]


def shown(sample: RenderedSample, tokenizer: ChatTokenizer) -> dict[str, Any]:
    """A rendered question as the chat page draws it."""
    return {
        "prompt_tokens": int(question_batch(sample).supervised_positions[0]) + 1,
        "items": [_plain(item) for item in shown_items(sample, tokenizer)],
    }


def shown_items(sample: RenderedSample, tokenizer: ChatTokenizer) -> Iterator[ShownItem]:
    """The pictures and clips in their order."""
    patch = token = place = 0
    for (t, h, w), merge in zip(sample.grids.tolist(), sample.merge_sizes.tolist(), strict=True):
        patches = sample.patches[patch : patch + t * h * w].reshape(t, h * w, -1)
        kept = sample.keep_mask[token : token + t * h * w // merge**2].reshape(t, -1)
        places = sample.placeholder_positions[place : place + int(kept.sum())]
        patch, token, place = patch + t * h * w, token + kept.size, place + len(places)
        times = []
        if sample.input_ids[places[0]] == tokenizer.video_pad_id:
            times = frame_times(sample.input_ids, places, kept.sum(1).tolist(), tokenizer)
        yield ShownItem(patches, kept, (h, w), merge, times)


def frame_times(ids: np.ndarray, places: np.ndarray, kept: list[int], tokenizer: ChatTokenizer) -> list[str]:
    """The time stamp before each frame of a clip, in seconds, as the prompt has it.

    Args:
        ids: of the prompt.
        places: of the clip's visual tokens in it.
        kept: number of them in each frame: pruning leaves one at least.
        tokenizer: of the model.
    """
    firsts = places[np.cumsum([0, *kept[:-1]])].tolist()
    before = [tokenizer.decode(ids[max(0, first - STAMP_TOKENS) : first].tolist()) for first in firsts]
    return [STAMP.findall(text)[-1] for text in before]


def _plain(item: ShownItem) -> dict[str, Any]:
    (h, w), merge = item.grid, item.merge
    whole = np.ones(item.kept.shape[1], bool)
    frames = [
        {
            "time": item.times[number] if item.times else None,
            "picture": data_url(
                thumbnail(frame_picture(item.patches[number], whole, item.grid, merge)), "jpeg"
            ),
            "dropped": np.flatnonzero(~kept).tolist(),
        }
        for number, kept in enumerate(item.kept)
    ]
    return {
        "kind": "video" if item.times else "image",
        "rows": h // merge,
        "columns": w // merge,
        "pixels": [14 * w, 14 * h],
        "tokens": int(item.kept.size),
        "kept": int(item.kept.sum()),
        "frames": frames,
    }
