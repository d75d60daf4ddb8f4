"""Back to a checkpoint before a row of bad steps, in the same process, and past the steps that led there.

Skipped steps change nothing, so the same steps from the same checkpoint would end in the same weights and the same bad
numbers. So the run also passes over good steps before the row, as many as the row has: PaLM was trained past its spikes
in this way, by going back some hundred steps and passing over the batches before and during the spike
(arXiv:2204.02311, section 5.1). Which steps these are does not depend on the checkpoints that happen to be there, so a
run that is stopped or killed at any moment, and resumed, does the same steps to the same bits.
"""

from __future__ import annotations

from pathlib import Path

from vl3train.contracts.records import Cursor
from vl3train.engine.checkpoints.find import find_checkpoint
from vl3train.engine.checkpoints.keep import name_latest, remove_checkpoint
from vl3train.engine.checkpoints.load import load_checkpoint, refuse_other_identity
from vl3train.engine.held_out.evaluations_file import EVALUATIONS, truncate_evaluations
from vl3train.engine.ranks import OneRankError, RunError
from vl3train.engine.run import Run
from vl3train.engine.start.folder import gone
from vl3train.model.weights.headers.manifest import checkpoints_in, step_of


def go_back(run: Run) -> None:
    """Make the run what it was after the newest checkpoint before the range it passes over.

    Everything is as after a resume from there: engine, random state, cursor, counts, limits, metrics.jsonl. All ranks
    call it, after the last step of the row.

    Raises RunError on every rank where there is no such checkpoint, or where the run has gone back here before.
    """
    bad = run.bad_steps
    first, end = bad.range_to_pass_over(run.cursor.step)
    what = f"{bad.in_a_row} steps in a row were skipped, the last of them step {end}"
    look = where_to_look(run)
    if bad.passed_over and first < max(before := [end for _, end in bad.passed_over]):
        raise RunError(
            f"{what}. That is the second time: the run has already gone back and passed over the steps up to "
            f"{max(before)}, and those after them are no better. {look}"
        )
    if told := gone(run.folder, run.rank):
        raise RunError(f"{what}. {told}, and give the same command again")
    run.saver.wait()
    checkpoint, _ = find_checkpoint(run.folder / "checkpoints", run.rank, last_step=first)
    if checkpoint is None:
        raise RunError(
            f"{what}, and there is no checkpoint of step {first} or before to go back to. {look}. {way_out(run, first)}"
        )
    stored = refuse_other_identity(checkpoint, run.identity)
    load_checkpoint(checkpoint, engine=run.engine, rank=run.rank)
    run.cursor = Cursor(**stored["cursor"])
    run.saver.went_back(run.cursor.step)
    run.failed_samples.load(stored)
    passed_over = [*bad.passed_over, (first, end)]
    bad.load(stored)
    bad.passed_over = passed_over
    run.best.forget_after(run.cursor.step)
    if run.rank.is_first:
        drop_later(checkpoint)
        run.console.go_back(run.cursor.step)
        undo_evaluations(run)
    run.rank.barrier()
    told = f"{what}: the run goes back to {checkpoint} and passes over steps {first + 1} to {end}"
    run.console.message(told)
    run.tracker.alert("run goes back", told, is_bad=True)


def undo_evaluations(run: Run) -> None:
    """Take the evaluations of undone steps out of the run's files; a later start would count them.

    Raises OneRankError where evaluations.jsonl is damaged: the same command then goes back again.
    """
    step = run.cursor.step
    run.unwritten_evaluations = [one for one in run.unwritten_evaluations if one["step"] <= step]
    try:
        truncate_evaluations(run.folder / EVALUATIONS, step)
    except ValueError as error:
        raise OneRankError(f"{error}. Then give the same command again") from error
    run.best.write(run.folder)


def refuse_untrained(run: Run) -> None:
    """Raise RunError, on every rank, where the run is at its end and each of its steps was skipped.

    A short run ends before ``optim.max_skipped_steps`` of them are in a row.
    """
    if run.is_finished and not run.bad_steps.has_trained:
        checkpoints = run.folder / "checkpoints"
        raise RunError(
            f"the run is at its end, at step {run.cursor.step}, and trained nothing: each step was skipped, and the "
            f"weights are those that it started from. {where_to_look(run)}. {way_out(run, 0)}. Then move {checkpoints} "
            "away and give the same command"
        )


def where_to_look(run: Run) -> str:
    """What a person does about skipped steps."""
    return (
        f"Look at {run.folder / 'bad_steps'} with `vl3train inspect --dump FILE`: where always the same samples are "
        "not finite, take them out; where losses or norms are only over their limits, lower the learning rates, or "
        "raise optim.spike_limit"
    )


def way_out(run: Run, first: int) -> str:
    """What a person does where there is nothing to go back to: no step was saved early enough."""
    if first == 0:
        return "A run whose first steps are bad starts wrong: look at stage.init_from and at the learning rates, too"
    checkpoints = run.folder / "checkpoints"
    anew = f"move {checkpoints} away and " if checkpoints_in(checkpoints) else ""
    return (
        f"Or {anew}give the same command with run.save_steps={min(first, run.cfg.run.save_steps)}: it starts from its "
        "first step, saves early enough, and passes over these steps"
    )


def drop_later(checkpoint: Path) -> None:
    """Delete the checkpoints of later steps, which are undone now, and let ``latest`` name this one.

    A run that is killed before its next save resumes from here, comes to the same row again, and goes the same way.
    """
    name_latest(checkpoint)
    first = step_of(checkpoint.name)
    for step, later in checkpoints_in(checkpoint.parent).items():
        if first is not None and step > first:
            remove_checkpoint(later)
