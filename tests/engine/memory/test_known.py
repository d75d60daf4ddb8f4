"""What an earlier start found of the memory is taken for as heavy a pack or a lighter one, and only whole."""

from __future__ import annotations

import json

import pytest

from tests.model.conftest import make_model
from vl3train.config.choices import Recompute
from vl3train.config.schema import MachineConfig
from vl3train.engine.memory.known import NO_LEVELS, KnownFit
from vl3train.engine.ranks import join
from vl3train.model.activations.budget import ActivationBudget
from vl3train.model.activations.work import recompute_rates, uniform_plan

KEPT = {Recompute.elementwise: 300, Recompute.mlp: 200, Recompute.layer: 100, Recompute.offload: 0}


@pytest.fixture(scope="module")
def rank():
    return join(MachineConfig())


@pytest.fixture
def known(monkeypatch, tmp_path, rank):
    monkeypatch.setenv("VL3TRAIN_CACHE_DIR", str(tmp_path))
    rates = recompute_rates(make_model(layers=2), recomputes_logits=True)

    def make(worst_bytes, **key):
        return KnownFit({"model": "some", **key}, worst_bytes, rates, rank)

    return make


def budget(rates):
    return ActivationBudget(
        total_bytes=10**9, vision_bytes=10**8, vision_kept=KEPT, language_kept=KEPT, rates=rates
    )


def test_a_budget_serves_the_same_run_whose_worst_pack_is_no_heavier(known):
    first = known(1000)
    assert first.budget is None
    found = budget(first.rates)
    first.found(found)
    assert known(1000).budget == known(900).budget == found
    assert list(known(900).budget.vision_kept) == list(KEPT), "the level that keeps most first"
    assert known(1001).budget is None
    assert known(1000, model="another").budget is None


def test_levels_that_steps_took_are_known_next_time(known):
    first = known(1000)
    first.found(budget(first.rates))
    first.note(uniform_plan(Recompute.mlp, Recompute.nothing, (2, 2)))
    first.note(uniform_plan(Recompute.elementwise, Recompute.nothing, (2, 2)))
    assert first.levels == NO_LEVELS, "as it was at the start"
    assert known(1000).levels == ((Recompute.elementwise, Recompute.mlp), (Recompute.nothing,))
    assert known(1001).levels == NO_LEVELS, "they go with their budget"


def test_what_is_damaged_is_not_taken(known, tmp_path):
    first = known(1000)
    first.found(budget(first.rates))
    (file,) = (tmp_path / "kept").iterdir()
    whole = json.loads(file.read_text())
    for name, bad in (
        ("vision_kept", {}),
        ("vision_kept", {"another": 3}),
        ("language_kept", None),
        ("total_bytes", None),
        ("worst_bytes", "many"),
    ):
        file.write_text(json.dumps({**whole, "value": {**whole["value"], name: bad}}))
        assert known(1000).budget is None, (name, bad)
