"""What is left of a fine-tuning: answers to held-out questions, the report page, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from vl3train.config.schema import TrainConfig
from vl3train.engine.best import best_checkpoint
from vl3train.engine.held_out.first_answers import METRIC, answer_first
from vl3train.report.make import make_report
from vl3train.report.run_log import read_run

PREDICTIONS = "predictions.jsonl"
REPORT = "report"


def trained_folder(out: Path) -> Path:
    """The checkpoint with the best held-out figure; without one the run, which means its newest."""
    found = best_checkpoint(out)
    return out if found is None else found


def write_results(cfg: TrainConfig, out: Path, tell: Callable[[str], None], *, is_held_out: bool) -> None:
    """Answer held-out questions, if there are any, with the best checkpoint, and write the report."""
    samples = []
    if is_held_out and cfg.finetune.predictions:
        samples = answer_held_out(cfg, out, tell)
    problems: list[str] = []
    log = read_run(out, problems)
    if log is None:
        tell("no report: " + "; ".join(problems))
        return
    make_report([log], out / REPORT, samples)
    tell(f"report: {out / REPORT / 'report.html'}")


def answer_held_out(cfg: TrainConfig, out: Path, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """predictions.jsonl, and what the report shows of it: with the pictures and frames that the model saw."""
    rows = answer_first(
        cfg,
        trained_folder(out),
        tokenizer_dir=out / "processor",
        most=cfg.finetune.predictions,
        out=out / PREDICTIONS,
    )
    right = sum(row.scores[METRIC] == 1 for row in rows)
    tell(f"answers: {out / PREDICTIONS}, {right} of {len(rows)} are the expected ones")
    seen = out / "predictions_seen"
    shown = []
    for number, row in enumerate(rows):
        about = {"question": row.question, "prediction": row.answer, "answer": row.expected}
        shown.append({"source": row.source, "key": row.key, "media": [], **about})
        if row.picture is not None:
            seen.mkdir(exist_ok=True)
            Image.fromarray(row.picture).save(seen / f"{number:03d}.png")
            shown[-1]["media"] = [str(seen / f"{number:03d}.png")]
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
