"""Many questions in progress at a time, each with limits of its own, over one Generator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from vl3train.contracts.records import Batch
from vl3train.data.render.chat_tokens import ChatTokenizer
from vl3train.inference.text import GrowingText
from vl3train.model.generation.generate import Answer, Generator
from vl3train.model.generation.sampling import GREEDY, Sampling
from vl3train.model.packed_forward import PackedModel


@dataclass(slots=True, kw_only=True)
class Asked:
    """One question in progress, and how its answer is told."""

    key: str
    batch: Batch  # on the host
    max_new_tokens: int
    stops: tuple[str, ...] = ()
    tell: Callable[[str], None] = lambda piece: None  # gets the answer's text, piece by piece
    is_wanted: Callable[[], bool] = lambda: True  # False: nobody waits for the answer any more
    text: str = field(default="", init=False)

    @property
    def num_prompt_tokens(self) -> int:
        """Visual tokens are counted after pruning."""
        return int(self.batch.supervised_positions[0]) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A whole answer."""

    asked: Asked
    text: str
    num_tokens: int  # without the end token
    is_cut: bool  # it has max_new_tokens, and would go on


class Answering:
    """Answers questions with the weights of ``packed``, as many at a time as there are slots."""

    def __init__(
        self,
        packed: PackedModel,
        tokenizer: ChatTokenizer,
        end_ids: Iterable[int],
        *,
        max_new_tokens: int,
        num_slots: int | None = None,
        cache_bytes: int | None = None,
        sampling: Sampling = GREEDY,
    ) -> None:
        """``max_new_tokens`` is the most of any question; the other arguments are those of ``Generator``."""
        self._tokenizer = tokenizer
        self._asked: dict[str, tuple[Asked, GrowingText]] = {}
        self._new_generator = partial(
            Generator,
            packed,
            frozenset(end_ids),
            max_new_tokens=max_new_tokens,
            num_slots=num_slots,
            cache_bytes=cache_bytes,
            sampling=sampling,
            goes_on=self._goes_on,
        )
        self._generator: Generator | None = None

    def answers(self, questions: Iterable[Asked | None]) -> Iterator[Answered]:
        """Each answer when it is whole. A None among the questions: there is none at the moment.

        Raises:
            ValueError: a prompt needs more keys and values than there is memory for.
        """
        self._asked.clear()
        # The slots of a call that did not come to its end hold its answers.
        generator, self._generator = self._generator or self._new_generator(), None
        for answer in generator.answers(self._batches(questions)):
            asked, growing = self._asked.pop(answer.key)
            piece = growing.piece(answer.ids, ended=True)
            asked.text += piece
            if piece:
                asked.tell(piece)
            is_cut = not answer.ended and not growing.stopped
            yield Answered(asked=asked, text=asked.text, num_tokens=len(answer.ids), is_cut=is_cut)
        self._generator = generator

    def _batches(self, questions: Iterable[Asked | None]) -> Iterator[Batch | None]:
        for asked in questions:
            if asked is not None:
                self._asked[asked.key] = asked, GrowingText(self._tokenizer, asked.stops)
            yield None if asked is None else asked.batch

    def _goes_on(self, answer: Answer) -> bool:
        asked, growing = self._asked[answer.key]
        if len(answer.ids) >= asked.max_new_tokens or not asked.is_wanted():
            return False  # what is left of the text is told when the answer is whole
        piece = growing.piece(answer.ids, ended=False)
        asked.text += piece
        if piece:
            asked.tell(piece)
        return not growing.stopped


def in_order(answers: Iterable[Answered], keys: Sequence[str]) -> Iterator[Answered]:
    """The answers in the order of ``keys``, each as soon as those before it are there."""
    waiting: dict[str, Answered] = {}
    found = iter(answers)
    for key in keys:
        while key not in waiting:
            one = next(found)
            waiting[one.asked.key] = one
        yield waiting.pop(key)
