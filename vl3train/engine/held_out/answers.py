"""Held-out questions answered by generation, in a run and after it, over all ranks."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from glob import escape
from pathlib import Path
from typing import Any

from vl3train.contracts.progress.record import progress
from vl3train.contracts.records import Batch
from vl3train.contracts.strict_json import json_text, without_texts
from vl3train.contracts.tokens import IM_END, IM_START
from vl3train.data.render.chat_tokens import ChatTokenizer
from vl3train.data.shards.index import Index
from vl3train.model.generation.generate import Generator
from vl3train.model.generation.prefill import Prompt
from vl3train.scoring.predictions import Prediction

PADS = re.compile(r"(Time \d+\.\ds:)?(<\|(image|video)_pad\|>)+,?")
"""What stands for a picture, or for a frame with its time, in a prompt."""


def generate_predictions(
    generator: Generator,
    batches: Iterable[Batch],
    tokenizer: ChatTokenizer,
    source_names: Sequence[str],
    *,
    sources: Collection[str],
    samples: Collection[tuple[int, str]] = (),
    known: Collection[tuple[str, str, int]] = (),
    tell: Callable[[Prediction], None] = lambda one: None,
) -> list[Prediction]:
    """This rank's predictions, in the order in which answers end.

    Args:
        generator: of this rank, with whole weights.
        batches: packs of held-out samples, on the host.
        tokenizer: of the model.
        source_names: of the recipe, by number.
        sources: names of those whose questions are answered.
        samples: source number and key of others that are answered too; may grow with the packs.
        known: places of predictions that are there already; they are not answered.
        tell: gets each prediction when it is there.
    """
    questions: dict[tuple[str, int], str] = {}
    there = set(known)

    def wanted(batch: Batch, prompt: Prompt) -> bool:
        number, key = batch.segment_sources[prompt.segment], batch.segment_keys[prompt.segment]
        source = source_names[number]
        if (source not in sources and (number, key) not in samples) or (source, key, prompt.answer) in there:
            return False
        ids = [one for rows in prompt.rows for one in batch.input_ids[rows].tolist()]
        questions[key, prompt.answer] = question_of(tokenizer.decode(ids))
        return True

    found = []
    for answer in generator.answers(batches, wanted):
        progress.touch()
        number = answer.prompt.answer
        prediction = Prediction(
            key=answer.key,
            answer_number=number,
            source=source_names[answer.source],
            question=questions.pop((answer.key, number)),
            reference=tokenizer.words(answer.prompt.true_ids),
            prediction=tokenizer.words(answer.ids),
            is_cut=not answer.ended,
        )
        tell(prediction)
        found.append(prediction)
    return found


def name_media(predictions: Collection[Prediction], index: Index) -> None:
    """Write into each prediction where the images and clips of its sample are."""
    media = index.media({one.key for one in predictions})
    for one in predictions:
        one.media = media[one.key]


def question_of(prompt: str) -> str:
    """The last question of a rendered prompt, without what stands for pictures and frames.

    >>> question_of("<|im_start|>user\\n<|image_pad|><|image_pad|>\\nWhat?<|im_end|>\\n<|im_start|>assistant\\n")
    'What?'
    """
    turns = prompt.split(IM_START)
    asked = next((turn for turn in reversed(turns) if turn.startswith("user")), turns[-1])
    return PADS.sub("", asked.removeprefix("user").split(IM_END)[0]).strip()


def answer_table(figures: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """A row of the console's table for each source and metric."""
    rows = []
    for source, row in figures.items():
        for metric in (name for name in row if f"{name}_low" in row):
            rows.append(
                {
                    "source": source,
                    "questions": f"{row['questions']}",
                    "cut": f"{row['cut']}",
                    "metric": metric,
                    "mean": f"{row[metric]:.3f}",
                    "95 % interval": f"{row[f'{metric}_low']:.3f} to {row[f'{metric}_high']:.3f}",
                }
            )
    return rows


class PredictionsInProgress:
    """Predictions of an evaluation that is not finished, so that one that was stopped goes on.

    Each rank appends to a file of its own beside ``file``. They are read by any number of ranks, and removed by
    ``finish``. Those of another evaluation (``of``: model, recipe, settings) are not used.
    """

    def __init__(self, file: Path, of: Mapping[str, Any], rank: int) -> None:
        self._of, self._all = json.loads(json_text(of)), f"{escape(file.name)}.*.partial"
        self._paths = sorted(file.parent.glob(self._all))
        self.known = [one for path in self._paths for one in self._read(path)]
        self._path = file.with_name(f"{file.name}.{rank}.partial")
        self._is_new = not any(self._read(self._path))
        if not self._is_new:  # a line that was cut short does not get the next one at its end
            os.truncate(self._path, self._path.read_bytes().rindex(b"\n") + 1)

    def add(self, prediction: Prediction) -> None:
        """Append one; it is kept when this process is killed."""
        with self._path.open("w" if self._is_new else "a", encoding="utf-8") as out:
            if self._is_new:
                out.write(json_text(self._of) + "\n")
                self._is_new = False
            out.write(json_text(asdict(prediction), letters=True) + "\n")

    def finish(self) -> None:
        """Remove the files; for one rank, when the whole file is written."""
        for path in {*self._paths, *self._path.parent.glob(self._all)}:
            path.unlink(missing_ok=True)

    def _read(self, path: Path) -> Iterator[Prediction]:
        if not path.is_file():
            return
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        found = [_parsed(line) for line in lines]  # one without its end was cut short
        if found and found[0] == self._of:
            yield from (one for row in found[1:] if (one := _prediction(row)) is not None)


def _parsed(line: str) -> Any:
    try:
        return without_texts(json.loads(line))
    except (ValueError, RecursionError):
        return None


def _prediction(row: Any) -> Prediction | None:
    """One of the lines, or None of a line that is damaged: it is answered again."""
    try:
        return Prediction(**row)
    except TypeError:
        return None
