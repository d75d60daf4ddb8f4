"""Who decides a part's learning rate: stage, model, or one rate for all. What the user wrote last and closest wins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from omegaconf import DictConfig

from vl3train.config.choices import AdapterKind
from vl3train.config.problems import Problem
from vl3train.config.schema import PARTS

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


def train_adapters_only(base: DictConfig, file: Values, command_line: Values) -> None:
    """With adapters, take out of ``base`` the stage's rates of parts that the user did not name.

    A part is named by a rate that the user wrote for it as the stage's, or in adapter.modules_to_save. ``base`` is the
    composed config, which changes in place: stage.learning_rates then holds what trains in full beside adapters. A rate
    that the user wrote for a part with adapters, as the stage's or the model's, is theirs. Then adapter.learning_rate
    is null, and stage.learning_rates has a rate for each part with adapters. Written in the same place,
    adapter.learning_rate wins.
    """
    if base.adapter.kind is AdapterKind.none or "learning_rates" not in base.stage:
        return
    adapted, rates, own = set(base.adapter.parts), base.stage.learning_rates, base.adapter.learning_rate
    by_part: set[str] = set()
    named = set(base.adapter.modules_to_save or []) - adapted
    for values in (file, command_line):
        by_part |= adapted & {*rates_of("stage", values), *rates_of("model", values)}
        named |= rates_of("stage", values).keys() - adapted
        if any(key == "adapter.learning_rate" and rate is not None for key, rate in values):
            by_part = set()
    by_part &= rates.keys()  # a part that is frozen has none
    if own is None:
        named |= adapted  # the stage's rates are theirs
    for part in [part for part in rates if part not in named | by_part]:
        del rates[part]
    if by_part and own is not None:
        for part in adapted - by_part:
            rates[part] = own
            base.model.learning_rates.pop(part, None)
        base.adapter.learning_rate = None


def frozen_as_zero(key: str, value: Any) -> Any:
    """A rate of the stage, or all of them, with null written as 0: ``drop_frozen`` takes both away.

    >>> frozen_as_zero("stage.learning_rates", {"projector": None}), frozen_as_zero("run.num_steps", None)
    ({'projector': 0.0}, None)
    """
    if key == "stage.learning_rates" and isinstance(value, Mapping):
        return {part: 0.0 if rate is None else rate for part, rate in value.items()}
    return 0.0 if value is None and key.startswith("stage.learning_rates.") else value


def drop_frozen(base: DictConfig) -> None:
    """Take parts out of the stage's rates whose rate is 0. A rate of no known part stays, and is refused later."""
    rates = base.stage.learning_rates if "learning_rates" in base.stage else {}
    for part in [part for part, rate in rates.items() if part in PARTS and rate == 0]:
        del rates[part]


def spread_one_rate(base: DictConfig, file: Values, command_line: Values) -> None:
    """Put optim.learning_rate in place of every rate that was not written as close to the run as it was.

    Which parts train stays as it is. A rate out of range is left for its own check.
    """
    rate = base.optim.learning_rate
    if rate is None or not 0 < rate < 1 or "learning_rates" not in base.stage:
        return
    places = (file, command_line)
    own = _closest(places, lambda values: "optim.learning_rate" in dict(values))
    for part in base.stage.learning_rates:
        theirs = _closest(places, partial(_writes_rate, part))
        if theirs < max(own, 1):
            base.stage.learning_rates[part] = rate
            base.model.learning_rates.pop(part, None)
    adapter = base.adapter
    theirs = _closest(places, lambda values: dict(values).get("adapter.learning_rate") is not None)
    if adapter.kind is not AdapterKind.none and theirs < max(own, 1):
        has_rates = all(part in base.stage.learning_rates for part in adapter.parts)
        adapter.learning_rate = None if has_rates else rate


def _closest(places: Sequence[Values], is_written: Callable[[Values], bool]) -> int:
    """Where something is written closest to the run: 2 the command line, 1 a file, 0 neither."""
    return max((number for number, values in enumerate(places, 1) if is_written(values)), default=0)


def _writes_rate(part: str, values: Values) -> bool:
    return part in rates_of("stage", values) or part in rates_of("model", values)
