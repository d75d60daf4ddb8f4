"""What is left of a fine-tuning: answers to held-out questions, the report page, and what to do next."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vl3train.config.schema import TrainConfig
from vl3train.contracts.files import write_whole
from vl3train.data.prepare.annotated_records import AnnotatedRecords, medium_bytes
from vl3train.data.prepare.write_shards import part_name
from vl3train.data.records.conversation import Conversation, Image, Text, Video
from vl3train.data.records.media_files import MediaFile
from vl3train.engine.best import best_checkpoint
from vl3train.inference.answer import Asker
from vl3train.inference.requests import Request, as_line
from vl3train.report.make import make_report
from vl3train.report.run_log import read_run

PREDICTIONS = "predictions.jsonl"
REPORT = "report"
BATCH_SIZE = 4


def trained_folder(out: Path) -> Path:
    """The checkpoint with the best held-out figure; without one the run, which means its newest."""
    found = best_checkpoint(out)
    return out if found is None else found


def question_of(conversation: Conversation) -> tuple[str, str | None, list[str], str] | None:
    """The first question of a sample: its prompt, its system text, the media's parts, and the right answer.

    None where it cannot be asked alone: pieces of clips, streams, an answer before the first question.
    """
    system, prompt, parts = None, None, []
    for turn in conversation.turns:
        if turn.role == "assistant":
            answer = "".join(one.text for one in turn.content if isinstance(one, Text))
            return None if prompt is None or not turn.supervised else (prompt, system, parts, answer)
        if turn.role not in ("system", "user") or prompt is not None:
            return None
        text = "".join(one.text for one in turn.content if isinstance(one, Text)).strip()
        for one in turn.content:
            if isinstance(one, Image) or (
                isinstance(one, Video) and (one.start, one.end, one.fps) == (None,) * 3
            ):
                parts.append(one.part)
            elif not isinstance(one, Text):
                return None
        if turn.role == "system":
            system = text
        else:
            prompt = text
    return None


def questions(records: AnnotatedRecords, most: int, media_folder: Path) -> Iterator[tuple[str, Request, str]]:
    """Up to ``most`` held-out questions: the record's place, the request, the right answer.

    Media that have no file of their own are written to ``media_folder``.
    """
    count = 0
    for where, found in records.read():
        if count == most:
            return
        if isinstance(found, str) or (asked := question_of(found[0])) is None:
            continue
        prompt, system, parts, answer = asked
        files = [_file_of(found[1], part, media_folder / f"{count:06d}") for part in parts]
        images = tuple(file for file, kind in files if kind == "image")
        videos = tuple(file for file, kind in files if kind == "video")
        yield where, Request(prompt=prompt, images=images, videos=videos, system=system), answer
        count += 1


def _file_of(media: tuple[MediaFile, ...], part: str, written: Path) -> tuple[Path, str]:
    number = int(part.partition(".")[0])
    medium = media[number]
    if medium.location is not None:
        return medium.location.absolute(), medium.kind
    file = written.with_name(f"{written.name}.{part_name(number, medium)}")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(medium_bytes(medium))
    return file, medium.kind


def write_results(
    cfg: TrainConfig, out: Path, held_out: AnnotatedRecords | None, tell: Callable[[str], None]
) -> None:
    """Answer held-out questions with the best checkpoint, and write the report."""
    samples = []
    if held_out is not None and cfg.finetune.predictions:
        samples = write_predictions(cfg, out, held_out, tell)
    problems: list[str] = []
    log = read_run(out, problems)
    if log is None:
        tell("no report: " + "; ".join(problems))
        return
    make_report([log], out / REPORT, samples)
    tell(f"report: {out / REPORT / 'report.html'}")


def write_predictions(
    cfg: TrainConfig, out: Path, held_out: AnnotatedRecords, tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    """predictions.jsonl, and its lines as the report shows them."""
    model = trained_folder(out)
    asker = Asker.load(model, frame_sampling=cfg.data.frame_sampling.value)
    asked = []
    unusable = 0
    for one in questions(held_out, cfg.finetune.predictions, out / "predictions_media"):
        if asker.problems(one[1]):
            unusable += 1
        else:
            asked.append(one)
    lines: list[dict[str, Any]] = []
    shown: list[dict[str, Any]] = []
    for first in range(0, len(asked), BATCH_SIZE):
        together = asked[first : first + BATCH_SIZE]
        answers = asker.answers([request for _, request, _ in together])
        for (where, request, right), answer in zip(together, answers, strict=True):
            lines.append({**as_line(request), "answer": answer, "expected": right, "where": where})
            media = [str(path) for path in (*request.images, *request.videos)]
            about = {"media": media, "question": request.prompt, "prediction": answer}
            shown.append({"source": cfg.stage.name, "key": where, "answer": right, **about})
    write_whole(out / PREDICTIONS, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    equal = sum(line["answer"].strip() == line["expected"].strip() for line in lines)
    left = f"; {unusable} have a medium that cannot be decoded" if unusable else ""
    tell(f"answers: {out / PREDICTIONS}, {equal} of {len(lines)} as expected, word for word{left}")
    return shown


def next_commands(cfg: TrainConfig, out: Path) -> list[str]:
    """What a person may want to do now."""
    model = shlex.quote(str(trained_folder(out)))
    folder = shlex.quote(str(out))
    return [
        "next:",
        f"  vl3train generate --model {model} --image PICTURE --prompt QUESTION",
        f"  vl3train export {model} {shlex.quote(str(out / 'export'))}",
        f"  vl3train evaluate {folder} --model {model}",
        f"  vl3train finetune --config {shlex.quote(str(out / 'run.yaml'))} run.num_epochs={2 * cfg.run.num_epochs:g} "
        "   trains on",
    ]
