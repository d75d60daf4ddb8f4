"""Answers to all prompts of a stream of packs, many at a time: a slot whose answer has ended takes the next prompt."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vl3train.contracts.records import Batch
from vl3train.model.generation.decode import ROWS_STEP, Slots, slot_bytes
from vl3train.model.generation.prefill import Prefilled, Prompt, find_prompts, prefill
from vl3train.model.generation.sampling import GREEDY, Sampling, next_tokens
from vl3train.model.packed_forward import PackedModel

NUM_SLOTS = 256
"""Answers in progress at a time, where memory allows."""

CACHE_SHARE = 0.5
"""Share of a GPU's free memory that the cache takes; the rest is for prefill."""

CPU_CACHE_BYTES = 2**31


@dataclass(slots=True)
class Answer:
    """An answer in progress, or a whole one."""

    key: str  # of its sample
    source: int  # number of its source in the recipe
    prompt: Prompt
    ids: list[int] = field(default_factory=list)  # without the end token
    ended: bool = False  # False in a whole answer: it was cut


class Generator:
    """Generates with the weights that ``model`` has at the time of the call."""

    def __init__(
        self,
        model: PackedModel,
        end_ids: Iterable[int],
        *,
        max_new_tokens: int = 256,
        num_slots: int | None = None,
        cache_bytes: int | None = None,
        sampling: Sampling = GREEDY,
        goes_on: Callable[[Answer], bool] = lambda answer: True,
    ) -> None:
        """A generator for ``model``, which is in evaluation mode with its weights whole on its device.

        Args:
            model: its weights may change between calls.
            end_ids: tokens that end an answer.
            max_new_tokens: an answer is cut after so many, the end token included.
            num_slots: answers in progress at a time; None: ``NUM_SLOTS``. Fewer where ``cache_bytes`` hold fewer.
            cache_bytes: memory for keys and values; None: ``CACHE_SHARE`` of what is free on a GPU, 2 GiB on a CPU.
            sampling: greedy by default.
            goes_on: called after each token of an answer, which lies at the end of its ``ids``; False cuts it there.

        Raises:
            ValueError: ``max_new_tokens`` or ``num_slots`` is below 1.
        """
        for name, value in (("max_new_tokens", max_new_tokens), ("num_slots", num_slots)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.model, self.end_ids = model, frozenset(end_ids)
        self.max_new_tokens, self.sampling, self.goes_on = max_new_tokens, sampling, goes_on
        self.device = next(model.parameters()).device
        self.num_slots = num_slots if num_slots is not None else NUM_SLOTS
        self.cache_bytes = cache_bytes if cache_bytes is not None else free_cache_bytes(self.device)
        self._random = torch.Generator(self.device).manual_seed(sampling.seed)
        self._slots: Slots | None = None

    def answers(
        self,
        batches: Iterable[Batch | None],
        wanted: Callable[[Batch, Prompt], bool] = lambda batch, prompt: True,
    ) -> Iterator[Answer]:
        """An answer to each prompt of the packs that is ``wanted``, in the order in which they end.

        ``batches`` lie on the host; a None among them says that there is none at the moment, so that the answers in
        progress go on. Raises ValueError for a prompt whose keys and values need more than ``cache_bytes``.
        """
        packs = iter(batches)
        waiting: deque[_Waiting] = deque()
        busy: dict[int, Answer] = {}
        unread: deque[_Step] = deque()
        more = True
        while True:
            while more and not waiting and (self._slots is None or len(busy) < self._slots.num_slots):
                batch = next(packs, _END)
                if isinstance(batch, _End):
                    more = False
                elif batch is None:
                    break
                else:
                    yield from self._prefilled(batch, wanted, waiting)
            self._fill(waiting, busy)
            if busy:
                unread.append(self._step(busy))
            # A GPU computes the next step while this one's tokens are read. A CPU has no time to hide.
            while len(unread) > (1 if busy and self.device.type == "cuda" else 0):
                yield from self._read(unread.popleft(), busy)
            if not (busy or waiting or more or unread):
                return

    def _prefilled(
        self, batch: Batch, wanted: Callable[[Batch, Prompt], bool], waiting: deque[_Waiting]
    ) -> Iterator[Answer]:
        """Run a pack's prompts; yield answers that end with the first token, and let the others wait."""
        prompts = [prompt for prompt in find_prompts(batch) if wanted(batch, prompt)]
        if not prompts:
            return
        moved = batch.to(self.device)
        filled = prefill(self.model, moved, prompts)
        first = [prompt.first_label for prompt in prompts]
        with torch.no_grad():
            logits_AV = self.model.model.lm_head(filled.states[first])
            tokens_A = next_tokens(logits_AV, self.sampling, self._random)
        for prompt, token in zip(prompts, tokens_A.tolist(), strict=True):
            answer = Answer(batch.segment_keys[prompt.segment], batch.segment_sources[prompt.segment], prompt)
            if self._add(answer, token):
                yield answer
            else:
                waiting.append(_Waiting(answer, filled, token))

    def _fill(self, waiting: deque[_Waiting], busy: dict[int, Answer]) -> None:
        """Put those that wait into free slots, in order."""
        while waiting:
            rows = waiting[0].answer.prompt.length + self.max_new_tokens
            if self._slots is None or rows > self._slots.num_rows:
                if busy:
                    return  # the cache is made anew, longer, when these have ended
                longest = max(one.answer.prompt.length for one in waiting) + self.max_new_tokens
                self._slots = self._new_slots(longest)
            free = next((slot for slot in range(self._slots.num_slots) if slot not in busy), None)
            if free is None:
                return
            one = waiting.popleft()
            pieces = [one.filled.keys_values[:, :, rows] for rows in one.answer.prompt.rows]
            self._slots.put(free, pieces, one.token)
            busy[free] = one.answer

    def _new_slots(self, longest: int) -> Slots:
        rows_step = ROWS_STEP[self.device.type]
        rows = -(-longest // rows_step) * rows_step
        hf_model = self.model.model
        fitting = self.cache_bytes // slot_bytes(hf_model, rows)
        if fitting < 1:
            raise ValueError(
                f"an answer to a prompt of {longest - self.max_new_tokens} tokens needs "
                f"{slot_bytes(hf_model, rows) / 2**30:.1f} GiB of keys and values, and "
                f"{self.cache_bytes / 2**30:.1f} GiB are given to them"
            )
        self._slots = None  # the old cache is freed before the new one is made
        return Slots(hf_model, min(self.num_slots, fitting), rows, self.sampling, self._random)

    def _step(self, busy: dict[int, Answer]) -> _Step:
        assert self._slots is not None
        longest = max(answer.prompt.length + len(answer.ids) for answer in busy.values())
        # Of a step that is not read yet, the tokens are not in ``ids``.
        self._slots.step(min(longest + 1, self._slots.num_rows), num_busy=max(busy) + 1)
        tokens_B = self._slots.tokens_B
        if self.device.type != "cuda":
            return _Step(dict(busy), tokens_B.clone(), None)
        host = torch.empty_like(tokens_B, device="cpu", pin_memory=True)
        host.copy_(tokens_B, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return _Step(dict(busy), host, event)

    def _read(self, step: _Step, busy: dict[int, Answer]) -> Iterator[Answer]:
        assert self._slots is not None
        if step.event is not None:
            step.event.synchronize()
        tokens = step.tokens.tolist()
        for slot, answer in step.busy.items():
            if busy.get(slot) is answer and self._add(answer, tokens[slot]):
                del busy[slot]
                self._slots.free(slot)
                yield answer

    def _add(self, answer: Answer, token: int) -> bool:
        """Add a token to an answer; whether that ends it."""
        if token in self.end_ids:
            answer.ended = True
            return True
        answer.ids.append(token)
        return not self.goes_on(answer) or len(answer.ids) >= self.max_new_tokens


class _End:
    """No pack comes any more."""


_END = _End()


@dataclass(frozen=True, slots=True)
class _Waiting:
    answer: Answer
    filled: Prefilled
    token: int


@dataclass(frozen=True, slots=True)
class _Step:
    """A step's tokens, which may still be on their way to the host, and whose they are."""

    busy: dict[int, Answer]
    tokens: Tensor  # (B,)
    event: torch.cuda.Event | None


def free_cache_bytes(device: torch.device) -> int:
    """What a cache may take of a device's memory now."""
    if device.type != "cuda":
        return CPU_CACHE_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return int(free * CACHE_SHARE)
