from __future__ import annotations

import pytest

from vl3train.config.schema import PARTS
from vl3train.model.trainable import PART_PREFIXES, count_parameters, parameter_groups, part_of, set_trainable

RATES = {"vision_encoder": 2e-6, "projector": 1e-5, "language_model": 3e-5}


def test_the_parts_are_those_of_the_schema():
    assert tuple(PART_PREFIXES) == PARTS


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("trained", [[], ["projector"], ["vision_encoder", "projector"], list(PARTS)])
def test_exactly_the_named_parts_train(tiny_model, tied, trained):
    model = tiny_model(tied=tied)
    set_trainable(model, trained)
    assert {part_of(n) for n, p in model.named_parameters() if p.requires_grad} == set(trained)
    frozen = {part_of(n) for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == set(PARTS) - set(trained)
    assert model.lm_head.weight.requires_grad == ("language_model" in trained)


def test_an_unknown_part_is_refused_with_the_list(tiny_model):
    with pytest.raises(ValueError, match="no part named mm_projector; the parts are vision_encoder"):
        set_trainable(tiny_model(), ["mm_projector"])
    with pytest.raises(ValueError, match="none of the parts"):
        part_of("model.audio.weight")


def test_counts_are_of_each_part_and_count_a_tied_head_once(tiny_model):
    model = tiny_model(tied=True)
    set_trainable(model, ["projector"])
    counts = count_parameters(model)
    assert sum(total for _, total in counts.values()) == sum(p.numel() for p in model.parameters())
    assert {part for part, (trainable, _) in counts.items() if trainable} == {"projector"}
    assert counts["projector"] == (model.model.projector.readout[0].weight.numel() + 32 * 32 + 64,) * 2


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_every_trainable_parameter_is_in_one_group_at_its_rate(tiny_model, weight_decay):
    model = tiny_model(tied=False)
    groups = parameter_groups(model, RATES, weight_decay)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    place = {id(p): group for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        group = place[id(parameter)]
        assert group["lr"] == RATES[part_of(name)]
        assert group["weight_decay"] == (weight_decay if parameter.ndim > 1 else 0.0)
        assert group["name"].startswith(part_of(name))
    assert len(groups) == (3 if weight_decay == 0 else 6)


def test_rates_and_training_parts_must_agree(tiny_model):
    model = tiny_model()
    set_trainable(model, ["projector", "vision_encoder"])
    with pytest.raises(ValueError, match="no rate for vision_encoder"):
        parameter_groups(model, {"projector": 1e-3}, 0.0)
    with pytest.raises(ValueError, match="names language_model, where no parameter trains"):
        parameter_groups(model, RATES, 0.0)
