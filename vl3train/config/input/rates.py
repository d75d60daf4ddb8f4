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


def leave_rate_of_adapters(base: DictConfig, file: Values, command_line: Values) -> list[Problem]:
    """Take the adapters' rate away, where the user wrote the rates of their parts closer to the run.

    Written in the same place, the adapters' rate wins: it says more exactly what is meant. All adapters have one rate,
    so parts of them with a rate of their own are a problem.
    """
    rate, parts = base.adapter.learning_rate, set(base.adapter.parts)
    places = (file, command_line)
    own = _closest(places, lambda values: dict(values).get("adapter.learning_rate") is not None)
    written = {
        part for part in parts if _closest(places, partial(_writes_rate, part)) > own
    } & base.stage.get("learning_rates", {}).keys()
    if rate is None or not written:
        return []
    if written == parts:
        base.adapter.learning_rate = None
        return []
    reason = f"you wrote another rate for {', '.join(sorted(written))}, and all adapters have this one"
    way_out = f"write adapter.learning_rate, or the rates of {', '.join(sorted(parts - written))} too"
    return [Problem("adapter.learning_rate", rate, reason, way_out)]


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
