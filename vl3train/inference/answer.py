"""Answers of a trained model: media and a question in, text out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vl3train.contracts.strict_json import json_text
from vl3train.inference.answering import Answered, Answering, Asked, in_order
from vl3train.inference.questions import media_problems, question_batch, render
from vl3train.inference.rendering import Rendering, trained_rendering
from vl3train.inference.requests import Request, as_line, as_question
from vl3train.model.attention.backends import choose_attention
from vl3train.model.generation.ends import end_ids
from vl3train.model.generation.generate import NUM_SLOTS, free_cache_bytes
from vl3train.model.generation.sampling import Sampling
from vl3train.model.packed_forward import PackedModel, head_dims


@dataclass(frozen=True, kw_only=True)
class Asker:
    """A model, how it is shown things, and how its answers are drawn."""

    packed: PackedModel
    rendering: Rendering
    max_new_tokens: int
    sampling: Sampling
    cache_bytes: int  # memory for keys and values
    _by_slots: dict[int, Answering] = field(default_factory=dict, init=False)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        device: str | None = None,
        fps: float | None = None,
        max_frames: int | None = None,
        max_visual_tokens: int | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        frame_sampling: str | None = None,
    ) -> Asker:
        """Load a run, a checkpoint or an export.

        Args:
            folder: what ``model.weights.hf_folder.locate_trained`` takes.
            device: None takes cuda where there is a GPU, else the CPU.
            fps: frames sampled from each second of a clip; None takes the value of the training.
            max_frames: most frames of a clip; None takes the value of the training.
            max_visual_tokens: of all pictures and frames of a question together; None takes the value of the training.
            max_new_tokens: most tokens of an answer.
            temperature: 0 is greedy.
            frame_sampling: "transformers" or "original"; None takes a run's own, and the first for an export, which
                does not say it.

        Raises:
            OSError, ValueError: ``folder`` holds no such model, or an option is wrong.
        """
        from transformers.utils import logging

        from vl3train.model.weights.hf_folder import load_trained, locate_trained

        sampling = Sampling(temperature=temperature)
        weights, _ = locate_trained(folder)
        given = {"fps": fps, "max_frames": max_frames, "frame_sampling": frame_sampling}
        given["max_visual_tokens"] = max_visual_tokens
        words = [f"data.{name}={value}" for name, value in given.items() if value is not None]
        rendering = trained_rendering(Path(folder).expanduser(), weights, words)
        logging.disable_progress_bar()
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        # A CPU computes bfloat16 slowly; the cast up is exact.
        model, _ = load_trained(folder, dtype=torch.float32 if place.type == "cpu" else None)
        model.to(place)
        attention = choose_attention("auto", place, head_dims(model), model.dtype)
        return cls(
            packed=PackedModel(model, attention.name).eval(),
            rendering=rendering,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            cache_bytes=free_cache_bytes(place),
        )

    def problems(self, request: Request) -> list[str]:
        """Pictures and clips of the request that cannot be used, with the reason."""
        return media_problems(as_question(request), self.rendering)

    def answers(
        self, requests: Sequence[Request], tell: Callable[[str], None] = lambda piece: None
    ) -> list[str]:
        """One answer to each request.

        Args:
            requests: they are answered together.
            tell: gets the text of all answers as it grows; of use for a single request.

        Raises:
            SampleError: a picture or clip cannot be read; ``problems`` finds them before.
            ValueError: a prompt is too long for the memory.
        """
        return [one.text for one in self.in_turn(requests, tell)]

    def in_turn(
        self, requests: Sequence[Request], tell: Callable[[str], None] = lambda piece: None
    ) -> Iterator[Answered]:
        """As ``answers``, each as soon as it and those before it are there."""
        keys = [str(number) for number in range(len(requests))]

        def asked() -> Iterator[Asked]:
            for key, request in zip(keys, requests, strict=True):
                sample = render(as_question(request), self.rendering, key=key)
                batch = question_batch(sample)
                yield Asked(key=key, batch=batch, max_new_tokens=self.max_new_tokens, tell=tell)

        return in_order(self.answering(len(requests)).answers(asked()), keys)

    def answering(self, num_questions: int) -> Answering:
        """What answers one question alone, or many together: on a GPU an empty slot costs as much as an answer."""
        num_slots = 1 if num_questions == 1 else NUM_SLOTS
        if num_slots not in self._by_slots:
            self._by_slots[num_slots] = self.new_answering(num_slots, self.sampling)
        return self._by_slots[num_slots]

    def new_answering(self, num_slots: int, sampling: Sampling) -> Answering:
        """``num_slots`` answers in progress at a time."""
        return Answering(
            self.packed,
            self.rendering.tokenizer,
            {self.rendering.tokenizer.im_end_id, *end_ids(self.packed.model)},
            max_new_tokens=self.max_new_tokens,
            num_slots=num_slots,
            cache_bytes=self.cache_bytes,
            sampling=sampling,
        )


def write_answers(asker: Asker, requests: Sequence[Request], file: Path) -> Iterator[int]:
    """Answer the requests, write the answers in their order, and yield how many are written so far.

    Each is written as soon as it and those before it are there: a line of JSON with the request and its ``answer``.
    Raises FileExistsError when ``file`` exists.
    """
    with file.open("x", encoding="utf-8") as out:
        for count, (request, answered) in enumerate(zip(requests, asker.in_turn(requests), strict=True), 1):
            line = {**as_line(request), "answer": answered.text}
            out.write(json_text(line, letters=True) + "\n")
            out.flush()
            yield count
