"""Several fine-tunings on the same data: a run with each combination of values."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from vl3train.config.input.sweeps import has_several_values, sweep_points
from vl3train.config.load import load_config
from vl3train.config.schema import TrainConfig
from vl3train.contracts.exit_codes import FAILED
from vl3train.finetuning.flow import Prepared, prepare, prepare_file, run
from vl3train.finetuning.making import Tell
from vl3train.finetuning.wish import Wish
from vl3train.sweeps.run import SweptRun, run_sweep, swept_runs


def prepare_sweep(wish: Wish, tell: Tell) -> tuple[Prepared, list[SweptRun]]:
    """Make the data once, and check all runs. Words of ``wish.overrides`` may give an option several values.

    run.yaml has what all runs share; each run writes into a folder beside it, named by what differs.

    Raises ValueError where something keeps it from starting; the message has all of it.
    """
    swept = [text for text in wish.overrides if has_several_values([text])]
    shared = tuple(text for text in wish.overrides if text not in swept)
    points = sweep_points(swept)
    prepared = prepare(dataclasses.replace(wish, overrides=shared), tell)

    def check(words: list[str]) -> TrainConfig:
        return load_config(
            [*prepared.overrides, *words], config_file=prepared.run_file, dp_size=prepared.machine.ranks
        )

    return prepared, swept_runs(points, check)


def sweep(prepared: Prepared, runs: Sequence[SweptRun], tell: Tell) -> int:
    """Train the runs one after the other, with answers and a report each; returns the exit code of ``run_sweep``."""

    def train(one: SweptRun) -> int:
        try:
            return run(prepare_file(prepared.run_file, [*prepared.overrides, *one.words], tell), tell)
        except ValueError as error:
            tell(str(error))
            return FAILED

    return run_sweep(runs, train, tell)
