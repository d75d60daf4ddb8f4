"""The steps that a run still has to do, in order, wherever it goes back or jumps ahead."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from vl3train.data.pipeline import StepBatches, train_steps
from vl3train.engine.run import Run


def steps_to_do(run: Run, last_step: int) -> Iterator[StepBatches]:
    """The batches of each step from ``run.cursor`` to ``last_step`` (not included).

    The caller sets ``run.cursor`` to the next step before it asks for more. Where that is not the step after the last
    one, the run went back, and loading begins anew there. Steps that are passed over are neither loaded nor given; at
    its end ``run.cursor`` is at ``last_step``, also where the last ones were.
    """
    plan, rank = run.data.plan, run.rank
    while True:
        run.cursor = run.bad_steps.jump(plan, run.cursor, last_step)
        if run.cursor.step >= last_step:
            return
        steps = train_steps(
            run.data,
            run.cfg,
            first=run.cursor,
            last_step=run.bad_steps.range_ahead(run.cursor.step, last_step),
            rank=rank.index,
            dp_size=rank.dp_size,
            ledger_path=run.folder / f"ledger.rank{rank.index}.jsonl",
        )
        with contextlib.closing(steps):
            for step_batches in steps:
                following = plan.advance(step_batches.cursor)
                yield step_batches
                if run.cursor != following:
                    break
