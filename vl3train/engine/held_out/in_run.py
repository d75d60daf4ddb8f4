"""The evaluation of a run: figures of each held-out source to console, evaluations.jsonl and tracker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from vl3train.config.choices import Tracker as TrackerKind
from vl3train.config.problems import counted
from vl3train.contracts.progress.record import progress
from vl3train.contracts.records import Batch
from vl3train.data.data_wait import data_wait
from vl3train.data.loader import FailedEntry, OpenData
from vl3train.data.pipeline import evaluation_batches
from vl3train.data.render.chat_tokens import ChatTokenizer
from vl3train.engine.held_out.answers import answer_table, generate_predictions, name_media
from vl3train.engine.held_out.evaluations_file import EVALUATIONS, record_evaluation
from vl3train.engine.held_out.losses import evaluate, table_rows
from vl3train.engine.held_out.shown import ShownSamples
from vl3train.engine.held_out.unread import unread_remarks
from vl3train.engine.monitor.compile_log import print_compiles, take_compiles
from vl3train.engine.ranks import OneRankError
from vl3train.engine.run import Run
from vl3train.engine.start.folder import gone
from vl3train.engine.tracking.tracker import ShownAnswer
from vl3train.model.generation.generate import Generator
from vl3train.scoring.predictions import Prediction, score_predictions, write_predictions


class EvaluationGivenUp(Exception):  # noqa: N818 - it is no error
    """The run was asked to stop, and a rank waited in vain for held-out samples. Raised on every rank."""


def evaluate_run(run: Run, *, step: int, when: str) -> dict[str, dict[str, Any]] | None:
    """Evaluate the held-out samples; returns the figures of each source, on every rank, or None without samples.

    Sources whose recipe names metrics get generated answers, too. These need whole weights: with ZeRO-3, where each
    rank has a part of them, a message says how to get them later. Where the output folder is gone, another message says
    that nothing is evaluated, and None is returned.

    Raises EvaluationGivenUp on every rank.
    """
    if run.held_out is None:
        return None
    if told := gone(run.folder, run.rank):
        run.console.message(f"{told}. The run goes on, without the evaluation after step {step}")
        return None
    progress.phase("evaluation")
    failed: list[FailedEntry] = []
    batches = held_out_packs(run, run.held_out, failed.append)
    run.engine.train(False)
    names = list(run.held_out.index.source_names)
    figures = evaluate(run.engine.forward, batches, names, dp_size=run.rank.dp_size)
    refuse_given_up(run)
    for remark in unread_remarks(failed, run.rank):
        run.console.message(remark)
    answers, shown = answer_questions(run, names, step)
    run.engine.train(True)
    print_compiles(run.console, "held-out samples", take_compiles())
    figures = {name: {**row, **answers.get(name, {})} for name, row in figures.items()}
    if not run.rank.is_first:
        return figures
    entry = {"stage": run.cfg.stage.number, "step": step, "when": when, "figures": figures}
    run.unwritten_evaluations.append(entry)
    write_evaluations(run)
    title = f"stage {run.cfg.stage.number}, step {step}"
    run.console.table(f"held-out samples, {title}", table_rows(figures))
    if answers:
        run.console.table(f"generated answers, {title}", answer_table(answers))
    run.tracker.log({"held_out": figures}, step)
    if shown:
        run.tracker.answers(shown, step)
    return figures


def held_out_packs(
    run: Run, held_out: OpenData, tell: Callable[[FailedEntry], object] = lambda _: None
) -> Iterator[Batch]:
    """This rank's packs, with shared prefixes where the run trains with them: its start has checked the kernel."""
    share = run.cfg.data.share_prefix
    return evaluation_batches(
        held_out, run.cfg, rank=run.rank.index, dp_size=run.rank.dp_size, share_prefix=share, tell=tell
    )


def refuse_given_up(run: Run) -> None:
    """Raise EvaluationGivenUp on every rank where one has had blank samples."""
    if any(run.rank.gather(data_wait.is_given_up)):
        raise EvaluationGivenUp


def write_evaluations(run: Run) -> None:
    """Write those that wait to evaluations.jsonl, on the first rank. Does not raise where the disk fails, or where the
    file was damaged in the meantime."""
    path, waiting = run.folder / EVALUATIONS, run.unwritten_evaluations
    try:
        while waiting:
            record_evaluation(path, **waiting[0])
            waiting.pop(0)
    except (OSError, ValueError) as error:
        why = f"{path} cannot be written: {error.strerror or error}" if isinstance(error, OSError) else error
        run.console.message(
            f"{why}. The run goes on; {counted(len(waiting), 'evaluation')} in memory will be written when that works "
            "again"
        )


def answer_questions(
    run: Run, names: list[str], step: int
) -> tuple[dict[str, dict[str, Any]], list[ShownAnswer]]:
    """Figures of generated answers of each source with metrics, on every rank, and on the first rank what a tracker
    shows: answers to its first samples of each source, with metrics or without.

    The first rank writes predictions/step_N.jsonl. A metric of the user's own that fails is told, and has no figures.
    """
    metrics = {source.name: source.metrics for source in run.recipe.sources if source.metrics}
    metrics = {name: metrics[name] for name in names if name in metrics}
    assert run.held_out is not None
    tracking = run.cfg.tracking
    rows = 0 if tracking.kind is TrackerKind.none else tracking.table_rows
    if not metrics and not rows:
        return {}, []
    if run.cfg.machine.zero_stage == 3:
        run.console.message(
            f"no answers are generated in a run with machine.zero_stage=3; afterwards: vl3train evaluate {run.folder}"
        )
        return {}, []
    progress.phase("generating answers")
    most = {number: min(rows, size) for number, size in enumerate(run.held_out.index.sizes)}
    shown = ShownSamples(most if run.rank.is_first else {})
    tokenizer = ChatTokenizer.from_folder(run.folder / "processor")
    generator = Generator(
        run.packed, {tokenizer.im_end_id}, max_new_tokens=run.cfg.run.evaluate_max_new_tokens
    )
    mine = []
    if metrics or run.rank.is_first:
        batches = held_out_packs(run, run.held_out)
        try:
            mine = generate_predictions(
                generator,
                shown.watch(batches, to_the_end=bool(metrics)),
                tokenizer,
                names,
                sources=metrics,
                samples=shown.pictures,
            )
        except ValueError as error:  # no room for the keys and values of one answer
            if metrics:
                raise OneRankError(
                    f"{error}; set run.evaluate_max_new_tokens lower, or name no metrics"
                ) from error
            run.console.message(f"the tracker gets no answers: {error}")
    refuse_given_up(run)
    predictions = [one for part in run.rank.gather(mine) for one in part]
    figures: dict[str, dict[str, Any]] = {}
    if run.rank.is_first:
        figures, problems = score_predictions(predictions, metrics, run.recipe.path.parent)
        for problem in problems:
            run.console.message(
                f"{problem}. The run goes on without this figure; `vl3train evaluate` makes it later"
            )
        scored = [one for one in predictions if one.source in metrics]
        if scored:
            name_media(scored, run.held_out.index)
            keep_predictions(run, step, scored)
    return run.rank.gather(figures)[0], shown.rows(predictions, names)


def keep_predictions(run: Run, step: int, scored: list[Prediction]) -> None:
    """Write the answers to predictions/step_N.jsonl. Says so where the disk does not take them: they are then lost."""
    path = run.folder / "predictions" / f"step_{step:06d}.jsonl"
    try:
        path.parent.mkdir(exist_ok=True)
        write_predictions(path, scored)
    except OSError as error:
        run.console.message(
            f"{path} cannot be written: {error.strerror or error}. The run goes on; these answers are lost, and "
            "`vl3train evaluate` makes them again from a checkpoint"
        )
