"""Who decides a part's learning rate: the stage or the model. Whatever the user wrote last, and closest, wins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vl3train.config.problems import Problem

Values = Sequence[tuple[str, Any]]
"""Options by their full names, as the user wrote them."""


def parts_by_stage(file: Values, command_line: Values) -> set[str]:
    """Parts whose rate the user wrote as the stage's, so that the model's own rate does not replace it.

    What is written in the command line wins over a file, and a file over the groups. Written in the same place, the
    model's rate wins: a run's config.yaml holds both, and the run took the model's.

    >>> sorted(parts_by_stage([], [("stage.learning_rates", {"projector": 1e-4})]))
    ['projector']
    >>> parts_by_stage([("stage.learning_rates.projector", 1e-4), ("model.learning_rates.projector", 1e-3)], [])
    set()
    """
    of_stage: set[str] = set()
    for values in (file, command_line):
        of_stage |= rates_of("stage", values).keys()
        of_stage -= rates_of("model", values).keys()
    return of_stage


def two_rates(command_line: Values) -> list[Problem]:
    """Parts for which the user wrote two different rates in the same line."""
    model = rates_of("model", command_line)
    return [
        Problem(
            f"stage.learning_rates.{part}",
            rate,
            f"you also wrote model.learning_rates.{part}={model[part]}",
            "write one of them: the part has one rate",
        )
        for part, rate in rates_of("stage", command_line).items()
        if part in model and model[part] != rate
    ]


def rates_of(owner: str, values: Values) -> dict[str, Any]:
    """Rates of parts that the user wrote for the stage or the model; a whole dict replaces what was written before."""
    rates: dict[str, Any] = {}
    for key, value in values:
        if key == f"{owner}.learning_rates":
            rates = dict(value) if isinstance(value, Mapping) else {}
        elif key.startswith(f"{owner}.learning_rates."):
            rates[key.rpartition(".")[2]] = value
        elif key.startswith(f"~{owner}.learning_rates."):
            rates.pop(key.rpartition(".")[2], None)
    return rates
