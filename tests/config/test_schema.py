"""The schema is complete: each option has a meaning, a type that Hydra takes, a range if it is a number."""

from __future__ import annotations

import ast
import dataclasses
import typing
from pathlib import Path

from omegaconf import OmegaConf

from vl3train.config import schema
from vl3train.config.checks.ranges import RANGES
from vl3train.config.input.options import OPTIONS
from vl3train.config.plain import as_plain
from vl3train.config.schema import TrainConfig

# A rate for each part: their range is in rules.rate_problems. Parameters are counted, not chosen. Costs are checked
# by rules.cost_problems.
DICTS = {"stage.learning_rates", "model.learning_rates", "model.num_parameters", "model.costs"}


def test_every_option_says_what_it_means():
    tree = ast.parse(Path(schema.__file__).read_text())
    silent = []
    for node in tree.body:
        if not (
            isinstance(node, ast.ClassDef) and node.name.endswith("Config") and node.name != "TrainConfig"
        ):
            continue
        for option, after in zip(node.body, [*node.body[1:], None], strict=True):
            documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if isinstance(option, ast.AnnAssign) and not documented:
                silent.append(f"{node.name}.{ast.unparse(option.target)}")
    assert silent == []


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
