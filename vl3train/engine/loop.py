"""The training loop: what a run does, in order, written once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from vl3train.config.choices import BestFigure
from vl3train.config.paths import FINISHED, mark_finished
from vl3train.config.schema import TrainConfig
from vl3train.contracts.progress.record import progress
from vl3train.contracts.records import TooManyFailed
from vl3train.data.pipeline import StepBatches
from vl3train.data.render.processes import start_workers_ignoring_signals
from vl3train.engine.bad_steps.go_back import go_back, refuse_untrained
from vl3train.engine.bad_steps.report import report_skipped
from vl3train.engine.best import BEST_FILE
from vl3train.engine.checkpoints.keep import Keep
from vl3train.engine.checkpoints.random_state import forward_state, set_forward_state
from vl3train.engine.failure import told_of_file
from vl3train.engine.held_out.in_run import EvaluationGivenUp, evaluate_run, write_evaluations
from vl3train.engine.log_step import log_step
from vl3train.engine.memory.oom import explain_oom
from vl3train.engine.mirror.uploads import LAST_SECONDS, STOP_SECONDS
from vl3train.engine.monitor.collectives import shorten_timeouts
from vl3train.engine.monitor.compile_log import print_compiles, take_compiles
from vl3train.engine.monitor.console import Console
from vl3train.engine.monitor.silence import watched
from vl3train.engine.optim.build import rate_factor, set_rates
from vl3train.engine.ranks import OneRankError, Rank, RunError
from vl3train.engine.run import Run
from vl3train.engine.start.folder import gone
from vl3train.engine.start.lock import locked_folder
from vl3train.engine.start.run import start_run
from vl3train.engine.step import train_step
from vl3train.engine.steps import steps_to_do
from vl3train.engine.stop import StopRequest
from vl3train.model.kernels.prove import Proving
from vl3train.model.weights.headers.manifest import checkpoint_name


def train(cfg: TrainConfig, rank: Rank, proving: Proving | None = None) -> bool:
    """Train one stage to its end, from its start or from the newest whole checkpoint in its output folder.

    ``proving``: the kernels that are proven already beside this process.

    Returns whether the run is finished; else it was asked to stop, and has saved. Raises RunError on every rank, or
    OneRankError on one, for what a user can act on.
    """
    start_workers_ignoring_signals()
    console = Console(cfg.run.output_dir, stage_name=cfg.stage.name, enabled=rank.is_first)
    with locked_folder(Path(cfg.run.output_dir), rank) as lock, watched(cfg.run, rank):
        try:
            with explain_oom(cfg, rank, "the run started"):
                run = start_run(cfg, rank, console, lock, proving or Proving())
            with contextlib.closing(StopRequest(cfg.run.max_hours)) as stop:
                try:
                    is_finished = run_steps(run, stop)
                except BaseException:
                    run.saver.leave()
                    raise
        except TooManyFailed as error:
            raise OneRankError(f"rank {rank.index}: {error}") from error
        except OSError as error:
            if told := told_of_file(error):
                raise OneRankError(f"rank {rank.index}: {told} and give the same command again") from error
            raise
        finally:
            console.close()  # else the bar is drawn below a failure's cause, and the terminal stays without its cursor
        run.tracker.finish()
    return is_finished


def run_steps(run: Run, stop: StopRequest) -> bool:
    """Do every step from ``run.cursor`` on, and what is due at the end; returns whether the run is finished.

    Where it was asked to stop and waits in vain for data, it gives up the step or the evaluation that needs them, saves
    what is done, and is not finished.
    """
    try:
        do_steps(run, stop)
        refuse_untrained(run)
        save_rest(run)
        if run.cursor.step == run.num_steps and run.cfg.run.evaluate_at_end:
            evaluate_after(run, when="end")
        is_finished = run.is_finished
    except EvaluationGivenUp:
        tell_stop(run, "the evaluation waited in vain for its data and is given up; ")
        is_finished = False
        save_rest(run)
    settle(run)
    write_evaluations(run)
    if is_finished and run.rank.is_first:
        mark_run_finished(run)
    told = (
        f"{run.cfg.stage.name}: {run.cursor.step} of {run.num_steps} steps done; the newest checkpoint is that of step "
        f"{run.saver.step} in {run.folder / 'checkpoints'}"
    )
    run.console.message(told)
    if run.uploads is not None and run.saver.step:  # with what was written since
        run.uploads.offer(checkpoint_name(run.saver.step))
        run.uploads.finish(LAST_SECONDS if is_finished else STOP_SECONDS)
    if is_finished:
        run.tracker.alert("run finished", told, is_bad=False)
    return is_finished


def do_steps(run: Run, stop: StopRequest) -> None:
    """Do every step from ``run.cursor`` on, with logs, checkpoints and evaluations where they are due."""
    cfg, rank = run.cfg, run.rank
    print_compiles(run.console, "before the first step", take_compiles())
    shorten_timeouts(cfg.run)
    if cfg.run.evaluate_at_start and run.cursor.step == 0:
        evaluate_run(run, step=0, when="start")
    elif evaluation_is_due(run) and not run.is_evaluated:
        evaluate_after(run, when="step")

    last_step = run.cursor.step if run.best.is_over else run.num_steps
    if cfg.run.stop_after_steps is not None:
        last_step = min(last_step, run.cursor.step + cfg.run.stop_after_steps)
    first_step = run.cursor.step
    for waited_seconds, started, step_batches in timed(steps_to_do(run, last_step)):
        step = step_batches.cursor.step
        limits = run.bad_steps.spikes.limits()
        random_before = forward_state()
        rates = set_rates(run.engine.optimizer, rate_factor(step, run.num_steps, cfg.optim))
        with explain_oom(cfg, rank, f"step {step + 1} ran", step_batches.batches):
            result = train_step(
                run.engine,
                step_batches.batches,
                num_supervised_tokens=step_batches.num_supervised_tokens,
                num_sources=len(run.source_names),
                stop_requested=stop.requested,
                is_blank=step_batches.is_blank,
                limits=limits,
            )
        if result.is_void:
            set_forward_state(random_before)  # dropout has drawn from it
            tell_stop(run, f"step {step + 1} waited in vain for its data and is given up; ")
            break
        compiles = take_compiles()
        if result.is_skipped:
            report_skipped(run, step_batches, result, limits)
        done = step + 1
        run.bad_steps.count(step, result)
        run.failed_samples.count(done, step_batches.num_samples, result.num_failed_samples)
        if step > first_step:
            print_compiles(run.console, f"step {done}", compiles, compiles.reasons)
        if done % cfg.run.log_steps == 0 or done == last_step or result.is_skipped:
            step_seconds = time.perf_counter() - started
            log_step(run, step_batches, result, rates, compiles, waited_seconds, step_seconds)
        run.cursor = run.data.plan.advance(step_batches.cursor)
        if run.bad_steps.too_many:
            go_back(run)
            continue
        if done % cfg.run.save_steps == 0 or done == last_step or result.stop_requested:
            save_run(run, ends=done == last_step or result.stop_requested)
        run.saver.raise_failure()
        if evaluation_is_due(run):
            evaluate_after(run, when="step")
        if result.stop_requested:
            tell_stop(run)
            break
        if run.best.is_over:
            break


def tell_stop(run: Run, because: str = "") -> None:
    """Say that the run stops after the steps that are done."""
    told = f"{because}stopped on request after step {run.cursor.step}; give the same command again to resume"
    run.console.message(told)
    run.tracker.alert("run stopped", told, is_bad=False)


def timed(steps: Iterator[StepBatches]) -> Iterator[tuple[float, float, StepBatches]]:
    """Each step, with the seconds spent waiting for its data and the moment the wait began."""
    while True:
        started = time.perf_counter()
        step_batches = next(steps, None)
        if step_batches is None:
            return
        yield time.perf_counter() - started, started, step_batches


def evaluation_is_due(run: Run) -> bool:
    """Whether the held-out samples are evaluated after the step that is done."""
    done, every = run.cursor.step, run.cfg.run.evaluate_steps
    return every > 0 and 0 < done < run.num_steps and done % every == 0


def evaluate_after(run: Run, *, when: str) -> None:
    """Evaluate after the step that is done, and save it where it is the best.

    All ranks have the same figures, and so the same answer.
    """
    step = run.cursor.step
    figures = evaluate_run(run, step=step, when=when)
    if figures is None or run.best.figure is BestFigure.none:
        return
    if run.best.count(step, figures):
        if run.saver.step != step:
            save_run(run, ends=False)
        settle(run)  # best.json names a checkpoint that is whole
    if run.rank.is_first:
        try:
            run.best.write(run.folder)
        except OSError as error:
            run.console.message(f"{BEST_FILE} cannot be written: {error.strerror or error}. The run goes on")
    run.console.message(run.best.told())
    if run.best.is_over and step < run.num_steps:
        run.console.message(
            f"the run ends here: run.patience={run.best.patience} evaluations in a row were no better than that of "
            f"step {run.best.step}"
        )


def mark_run_finished(run: Run) -> None:
    """Write FINISHED. Raises OneRankError where the disk does not take it."""
    try:
        mark_finished(run.cfg)
    except OSError as error:
        raise OneRankError(
            f"all steps are done and saved, but {run.folder / FINISHED} cannot be written: {error.strerror or error}. "
            "Free disk space and give the same command again"
        ) from error


def save_rest(run: Run) -> None:
    """Save the steps that are not saved yet: the last ones were passed over, or given up."""
    if run.saver.step != run.cursor.step:
        save_run(run, ends=True)


def save_run(run: Run, *, ends: bool) -> None:
    """Save the run, whose next step is ``run.cursor``.

    Where the disk does not take it, the run goes on with the checkpoint before. Raises RunError on every rank where it
    cannot go on, because this is the last save (``ends``), or because another run has taken its folder.
    """
    settle(run)
    if told := gone(run.folder, run.rank):
        if ends:
            raise RunError(
                f"{told}, and give the same command again; the steps since step {run.saver.step} are lost"
            )
        run.console.message(f"{told}. The run goes on and tries again at its next save")
        return
    run.rank.agree(run.lock.taken())
    write_evaluations(run)
    run.saver.begin(
        run.cursor.step,
        resume=run.resume_state() if run.rank.is_first else {},
        keep=Keep(
            last=run.cfg.run.keep_checkpoints,
            before=run.bad_steps.keep_before(run.cursor.step),
            every=run.cfg.run.keep_every_steps,
            best=run.best.step,
        ),
    )
    if ends or not run.saver.in_background:
        settle(run, ends=ends)


def settle(run: Run, *, ends: bool = False) -> None:
    """Wait for the save in progress, and tell where the disk did not take it; errors of ``save_run``."""
    progress.phase("save")
    problem = run.saver.wait()
    if problem is None:
        return
    newest = (
        f"the newest checkpoint is that of step {run.saver.step}"
        if run.saver.step
        else "there is no checkpoint yet"
    )
    if ends:
        raise RunError(f"{problem}; {newest}. Free disk space and start again: the run resumes from there")
    run.console.message(f"{problem}; {newest}. The run goes on and tries again at its next save")
