"""Cards of the report: a question with its pictures, and what was answered."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from vl3train.config.data_options import DataConfig
from vl3train.contracts.records import SampleError
from vl3train.data.media.clips import DecodeLimits, decode_clip
from vl3train.data.pictures.images import IMAGE_FORMATS, decode_image
from vl3train.report.html import data_url, thumbnail
from vl3train.report.predictions import AnswerAt, ShownQuestion

if TYPE_CHECKING:
    import numpy as np

FRAMES_SHOWN = 4


def sample_card(sample: Mapping[str, Any]) -> str:
    """One answer, with the pictures of its question. Raises SampleError for a picture or clip that cannot be read."""
    pictures = [picture for path in sample["media"] for picture in pictures_of(Path(path).read_bytes())]
    right = str(sample["prediction"]).strip() == str(sample["answer"]).strip()
    mark, kind = ("✓", "right") if right else ("✗", "wrong")
    said = escape(str(sample["prediction"])) or "(nothing)"
    wanted = "" if right else f" &middot; expected: {escape(str(sample['answer']))}"
    return (
        f'<div class="card sample"><div class="source">{escape(str(sample["source"]))}</div>{media_tag(pictures)}'
        f'<div class="question">{escape(str(sample["question"]))}</div>'
        f'<div class="prediction"><span class="{kind}">{mark} {said}</span>'
        f"{wanted}</div></div>"
    )


def question_card(shown: ShownQuestion, *, several_runs: bool) -> str:
    """A held-out question, and the answers to it step by step."""
    one, pictures = shown.last.prediction, []
    for data in shown.media:
        try:
            pictures += pictures_of(data)
        except SampleError:
            continue  # frames in a form of their own, or damaged: the answers are there all the same
    answers = "".join(f"<li>{_answer(answer, several_runs)}</li>" for answer in shown.answers)
    return (
        f'<div class="card sample"><div class="source">{escape(one.key)}</div>{media_tag(pictures)}'
        f'<div class="question">{escape(one.question)}</div>'
        f'<div>expected: <span class="part">{escape(one.reference)}</span></div>'
        f'<ul class="steps">{answers}</ul></div>'
    )


def _answer(answer: AnswerAt, several_runs: bool) -> str:
    mark, kind = ("✓", "right") if answer.is_right else ("✗", "wrong")
    if 0 < answer.score < 1:
        mark, kind = f"{answer.score:.2f}", "part"
    where = f"{escape(answer.run)}, step {answer.step}" if several_runs else f"step {answer.step}"
    said = escape(answer.prediction.prediction) or "(nothing)"
    return f'<span class="at">{where}</span> <span class="{kind}">{mark} {said}</span>'


def media_tag(pictures: Sequence[np.ndarray]) -> str:
    """Small pictures in a row or two; nothing where there are none."""
    images = "".join(f'<img alt="" src="{data_url(thumbnail(picture), "jpeg")}">' for picture in pictures)
    several = " several" if len(pictures) > 1 else ""
    return f'<div class="media{several}">{images}</div>' if images else ""


def pictures_of(data: bytes) -> list[np.ndarray]:
    """The picture, or some frames of the clip in order; each (height, width, 3) uint8.

    Raises:
        SampleError: it cannot be read.
    """
    limits = DecodeLimits(
        max_pixels=DataConfig().decode_max_pixels, max_seconds=DataConfig().decode_max_seconds
    )
    if is_image(data):
        return [decode_image(data, limits)]
    clip = decode_clip(data, fps=1.0, min_frames=FRAMES_SHOWN, max_frames=FRAMES_SHOWN, limits=limits)
    return list(clip.frames)


def is_image(data: bytes) -> bool:
    """Whether the file header is that of a picture."""
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS):
            return True
    except (OSError, Image.DecompressionBombError):
        return False
