"""A question as a sample without its answer, rendered as training renders samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from vl3train.contracts.records import Batch, Pack, RenderedSample, SampleError
from vl3train.data.collate import collate
from vl3train.data.records.conversation import Conversation, Text, Turn, visual_items
from vl3train.data.render.samples import render_sample
from vl3train.data.render.visual_items import by_packets_else_exact, check_media, lay_out
from vl3train.inference.rendering import Rendering

NO_ANSWER = Turn("assistant", (Text("?"),))
"""Stands where the answer will be. It is rendered, and nothing of it is read: the prompt ends before it."""


@dataclass(frozen=True, slots=True)
class Question:
    """Turns up to the one that is answered, and the files that they show."""

    turns: tuple[Turn, ...]
    parts: Mapping[str, bytes]

    def sample(self) -> bytes:
        """It as a shard would hold it. Earlier answers are shown; the last one is what is asked for."""
        shown = [dataclasses.replace(turn, supervised=False) for turn in self.turns]
        return Conversation((*shown, NO_ANSWER)).to_json()


def render(question: Question, rendering: Rendering, *, key: str) -> RenderedSample:
    """Decode and tokenize in this process: for files of one's own.

    Raises:
        SampleError: a picture or clip cannot be used.
    """
    return render_sample(
        question.sample(),
        question.parts,
        rendering.settings,
        rendering.tokenizer,
        rendering.limits,
        key=key,
        planned=None,
    )


def question_batch(sample: RenderedSample) -> Batch:
    """A rendered question as a pack of its own."""
    pack = Pack(
        samples=(0,),
        num_tokens=len(sample.input_ids),
        num_patches=len(sample.patches),
        num_supervised_tokens=1,
        cost=0,
    )
    return collate([sample], pack, num_loss_chunks=1)


def media_problems(question: Question, rendering: Rendering) -> list[str]:
    """Pictures and clips that cannot be used, each with the reason. Each is decoded whole."""
    found: list[str] = []

    def look(turns: Sequence[Turn], decode: bool) -> None:
        conversation = Conversation((*turns, NO_ANSWER))
        settings, limits = rendering.settings, rendering.limits
        try:
            if decode:
                check_media(conversation.to_json(), question.parts, settings, limits, decode=True)
            else:
                by_packets_else_exact(partial(lay_out, conversation, question.parts, settings, limits))
        except SampleError as error:
            found.append(str(error))

    for item in visual_items(Conversation(question.turns)):
        look([Turn("user", (item,))], decode=True)
    if not found:
        look(question.turns, decode=False)  # their share of the token budget may be too small for them
    return found
