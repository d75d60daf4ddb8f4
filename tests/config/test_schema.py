"""The schema is complete: each option has a meaning, a type that Hydra takes, a range if it is a number."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import typing

import pytest
from omegaconf import OmegaConf

from vl3train.config import schema
from vl3train.config.checks.ranges import RANGES
from vl3train.config.input.options import OPTIONS, SECTIONS
from vl3train.config.plain import as_plain
from vl3train.config.schema import TrainConfig

# rules.rate_problems checks the rate of each part, checks/budgets.py the costs, checks/adapters.py ranks and alphas.
# Parameters are counted, not chosen.
DICTS = {"stage.learning_rates", "model.learning_rates", "model.num_parameters", "model.costs"}
DICTS |= {"adapter.part_ranks", "adapter.part_alphas"}


def silent(source: str) -> list[str]:
    """Fields of the class in ``source`` that no text below explains."""
    [node] = ast.parse(textwrap.dedent(source)).body
    assert isinstance(node, ast.ClassDef)
    return [
        f"{node.name}.{ast.unparse(option.target)}"
        for option, after in zip(node.body, [*node.body[1:], None], strict=True)
        if isinstance(option, ast.AnnAssign)
        and not (isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant))
    ]


@pytest.mark.parametrize("section", sorted(SECTIONS))
def test_every_option_says_what_it_means(section: str):
    """Wherever its class is defined."""
    cls = SECTIONS[section]
    assert silent(inspect.getsource(cls)) == []
    assert (inspect.getdoc(cls) or "").endswith(".")


def test_an_option_without_meaning_is_caught():
    source = 'class RunConfig:\n    a: int = 1\n    """Its meaning."""\n    b: int = 2\n    c: int = 3\n'
    assert silent(source) == ["RunConfig.b", "RunConfig.c"]


def test_every_number_has_a_range_and_every_range_a_number():
    numbers = {
        key
        for key, hint in OPTIONS.items()
        if {int, float} & {hint, *typing.get_args(hint)} and key not in DICTS
    }
    assert numbers == set(RANGES)


def test_hydra_takes_the_schema_and_gives_it_back():
    cfg = OmegaConf.structured(TrainConfig)
    cfg.run.output_dir, cfg.model.name = "runs/a", "debug"
    stage = {"number": 1, "name": "a", "recipe": "b", "learning_rates": {"projector": 1e-3}}
    cfg = OmegaConf.merge(cfg, {"stage": stage})
    cfg.machine.dtype = "float32"
    made = OmegaConf.to_object(cfg)
    assert isinstance(made, TrainConfig)
    assert made.machine.dtype is schema.Dtype.float32
    assert made.stage.learning_rates == {"projector": 1e-3}


def test_plain_form_keeps_every_option():
    cfg = TrainConfig()
    plain = as_plain(cfg)
    assert plain["machine"]["dtype"] == "bfloat16"
    for section in dataclasses.fields(cfg):
        names = {option.name for option in dataclasses.fields(getattr(cfg, section.name))}
        assert set(plain[section.name]) == names
