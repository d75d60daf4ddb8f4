"""The levels that a budget chooses against every other choice there is."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vl3train.config.choices import Recompute
from vl3train.model.activations.budget import OFFLOAD_WORK_A_BYTE, ActivationBudget, level_scale
from vl3train.model.activations.work import PackSize, RecomputePlan, RecomputeRates, TowerWork

SCALE = level_scale(in_part=True)
L, NOTHING, ELEMENTWISE = Recompute.layer, Recompute.nothing, Recompute.elementwise


def tower(layers, mlp, layer, pair, trains=True):
    return TowerWork(
        num_layers=layers,
        mlp_row=mlp,
        layer_row=mlp + layer,
        projection_row=layer // 4,
        layer_pair=pair,
        forward_row=2 * mlp + layer,
        backward_row=2 * (2 * mlp + layer),
        has_backward=trains,
    )


def budget(total, vision_bytes, vision_kept, language_kept, vision, language):
    return ActivationBudget(
        total_bytes=total,
        vision_bytes=vision_bytes,
        vision_kept=dict(zip(SCALE, vision_kept, strict=True)),
        language_kept=dict(zip(SCALE, language_kept, strict=True)),
        rates=RecomputeRates(vision=vision, language=language, supervised_token=0),
    )


def price(budget, size, levels):
    """Recomputed work, and the price of offloading."""
    rates = budget.rates
    work = sum(rates.vision.of(level, size.patches, size.patch_pairs) for level in levels.vision)
    work += sum(rates.language.of(level, size.tokens, size.token_pairs) for level in levels.language)
    for tower_levels, kept, rows in (
        (levels.vision, budget.vision_kept, size.patches),
        (levels.language, budget.language_kept, size.tokens),
    ):
        moved = tower_levels.count(Recompute.offload) * rows * kept[Recompute.layer]
        work += OFFLOAD_WORK_A_BYTE * moved
    return work


def needs(budget, size, levels):
    """What the encoder needs when its backward pass begins, and both towers when the language model's does."""
    vision, language = (
        [rows * kept[level] for level in tower_levels]
        for tower_levels, kept, rows in (
            (levels.vision, budget.vision_kept, size.patches),
            (levels.language, budget.language_kept, size.tokens),
        )
    )
    # The last layer, which runs first, makes all that the dearest level keeps.
    vision_most = size.patches * budget.vision_kept[Recompute.elementwise]
    language_most = size.tokens * budget.language_kept[Recompute.elementwise]
    return sum(vision[:-1]) + vision_most, sum(vision) + sum(language[:-1]) + language_most


def fits(budget, size, levels):
    vision, total = needs(budget, size, levels)
    return vision <= budget.vision_bytes and total <= budget.total_bytes


kept = st.lists(st.integers(0, 60), min_size=3, max_size=3).map(
    lambda sizes: [*sorted(sizes, reverse=True), 0]
)
works = st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 3))
sizes = st.builds(PackSize, *[st.integers(1, 30)] * 4)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 8000), st.integers(0, 6000), kept, kept, works, works, sizes)
def test_no_plan_that_fits_recomputes_less(
    total, vision_bytes, vision_kept, language_kept, vision, language, size
):
    found = budget(total, vision_bytes, vision_kept, language_kept, tower(3, *vision), tower(2, *language))
    chosen = found.plan(size)
    everything = [RecomputePlan(levels[:3], levels[3:]) for levels in itertools.product(SCALE, repeat=5)]
    prices = [price(found, size, levels) for levels in everything if fits(found, size, levels)]
    assert fits(found, size, chosen) == bool(prices)
    assert price(found, size, chosen) == min(prices) if prices else chosen == found.least_kept()


# Bytes a row and operations of the published 2B in bfloat16.
C, H, I_VISION, I_LANGUAGE = 1152, 1536, 4304, 8960
PUBLISHED = (
    [2 * (6 * C + I_VISION), 2 * 6 * C, 2 * C, 0],
    [2 * (5 * H + 2 * I_LANGUAGE), 2 * 5 * H, 2 * H, 0],
    tower(27, 2 * C * I_VISION, 8 * C * C, 4 * C),
    tower(28, 4 * H * I_LANGUAGE, 4 * H * H * 7 // 6, 4 * H),
)
PACK = PackSize(patches=57_000, patch_pairs=57_000 * 1500, tokens=16_384, token_pairs=16_384 * 800)


@pytest.mark.parametrize("gib", [0, 3, 8, 20, 35, 50, 100])
def test_less_memory_is_never_exceeded_and_never_recomputes_less(gib):
    found, more = (budget(size * 2**30, size * 2**30, *PUBLISHED) for size in (gib, gib + 2))
    levels = found.plan(PACK)
    assert fits(found, PACK, levels) or levels == found.least_kept()
    assert price(found, PACK, levels) >= price(found, PACK, more.plan(PACK))


def test_a_smaller_pack_recomputes_less():
    found = budget(40 * 2**30, 40 * 2**30, *PUBLISHED)
    half = PackSize(*(size // 2 for size in PACK))
    assert Recompute.mlp in found.plan(PACK).language + found.plan(PACK).vision
    assert set(found.plan(half).vision + found.plan(half).language) == {Recompute.elementwise}


def test_inputs_go_to_the_host_only_when_nothing_else_helps():
    last_layer = PACK.tokens * (2 * (5 * H + 2 * I_LANGUAGE) - 2 * H)  # by the language model's last layer
    inputs = PACK.patches * 27 * 2 * C + PACK.tokens * 28 * 2 * H + last_layer
    barely = budget(inputs, inputs, *PUBLISHED).plan(PACK)
    assert set(barely.vision + barely.language[:-1]) == {L}
    assert barely.language[-1] is Recompute.elementwise, "recomputed at once it would take as much"
    less = budget(inputs - 2**20, inputs, *PUBLISHED).plan(PACK)
    assert (less.vision + less.language).count(Recompute.offload) == 1


@pytest.mark.parametrize("reserved_bytes", [0, 7])
@pytest.mark.parametrize(("total", "of_vision"), [(40, 30), (100, 20)])
def test_the_room_beside_each_layer_is_what_the_layers_so_far_leave(total, of_vision, reserved_bytes):
    total, of_vision = total * 2**30, of_vision * 2**30
    found = budget(total, of_vision, *PUBLISHED)
    levels = found.plan(PACK, reserved_bytes=reserved_bytes * 2**30)
    room = found.room_beside(PACK, levels)
    assert room == sorted(room, reverse=True)
    for position in range(27 + 28):
        # A pack of these layers alone: what is over then.
        so_far = RecomputePlan(levels.vision[: position + 1], levels.language[: max(0, position - 26)])
        if position < 27:
            assert room[position] == of_vision - needs(found, PACK, so_far._replace(language=(L,)))[0]
        else:
            assert room[position] == min(room[26], total - needs(found, PACK, so_far)[1])
    assert room[-1] >= reserved_bytes * 2**30
    too_much = RecomputePlan((Recompute.elementwise,) * 27, (Recompute.elementwise,) * 28)
    assert found.room_beside(PACK, too_much)[-1] == 0


@pytest.mark.parametrize("wanted", [0, 7, 60])
@pytest.mark.parametrize("gib", [3, 8, 20, 50])
def test_reserved_bytes_are_spared_down_to_every_layers_input(gib, wanted):
    vision_gib = gib * 3 // 4
    found = budget(gib * 2**30, vision_gib * 2**30, *PUBLISHED)
    spared, levels = found.can_spare(PACK, wanted * 2**30), found.plan(PACK, reserved_bytes=wanted * 2**30)
    inputs = needs(found, PACK, RecomputePlan((L,) * 27, (L,) * 28))
    rest = budget(gib * 2**30 - spared, vision_gib * 2**30 - spared, *PUBLISHED)
    assert levels == rest.plan(PACK)
    assert fits(rest, PACK, levels)
    if fits(found, PACK, RecomputePlan((L,) * 27, (L,) * 28)):
        assert Recompute.offload not in levels.vision + levels.language
        left = min(gib * 2**30 - inputs[1], vision_gib * 2**30 - inputs[0])
        assert spared == min(wanted * 2**30, left)
    else:
        assert spared == 0


def test_layers_that_keep_most_come_last_and_words_say_how_many():
    levels = budget(30 * 2**30, 30 * 2**30, *PUBLISHED).plan(PACK)
    order = [SCALE.index(level) for level in levels.language]
    assert len(set(order)) > 1
    assert order == sorted(order, reverse=True)
    assert str(RecomputePlan((Recompute.mlp, Recompute.mlp), (Recompute.layer,))) == (
        "encoder 2 x mlp, language model 1 x layer"
    )


def test_what_does_not_fit_keeps_least():
    assert budget(-5, 0, *PUBLISHED).plan(PACK).vision == (Recompute.offload,) * 27


def with_nothing(total, of_vision, *, more_vision=2 * I_VISION, more_language=2 * I_LANGUAGE):
    """A budget that has measured what layers keep more at nothing, of each row."""
    found = budget(total, of_vision, *PUBLISHED)
    return replace(
        found,
        vision_kept={
            Recompute.nothing: found.vision_kept[Recompute.elementwise] + more_vision,
            **found.vision_kept,
        },
        language_kept={
            Recompute.nothing: found.language_kept[Recompute.elementwise] + more_language,
            **found.language_kept,
        },
    )


@pytest.mark.parametrize("of_vision", [20, 45, 200])
@pytest.mark.parametrize("total", [8, 30, 60, 70, 80, 200])
@pytest.mark.parametrize("reserved_bytes", [0, 5])
def test_what_elementwise_layers_leave_spares_elementwise_work(total, of_vision, reserved_bytes):
    total, of_vision, reserved_bytes = total * 2**30, of_vision * 2**30, reserved_bytes * 2**30
    found = with_nothing(total, of_vision)
    levels = found.plan(PACK, reserved_bytes=reserved_bytes)
    plain = RecomputePlan(
        *(tuple(level if level is not NOTHING else ELEMENTWISE for level in own) for own in levels)
    )
    spared = found.can_spare(PACK, reserved_bytes)

    def fits(levels):
        vision, needed = found.needed_bytes(PACK, levels)
        return vision <= of_vision - spared and needed <= total - spared

    assert fits(levels) or levels == found.least_kept()
    # By operations the choice is that of a budget that knows nothing of it, with as much room for one layer at work.
    for position, own in enumerate(levels):
        assert list(own) == sorted(own, key=list(Recompute).index, reverse=True), "what keeps most comes last"
        if ELEMENTWISE in own:
            more = list(own)
            more[own.index(NOTHING) - 1 if NOTHING in own else -1] = NOTHING
            more = levels._replace(**{levels._fields[position]: tuple(more)})
            assert not fits(more), "one layer more would fit"
    assert price(found, PACK, levels) == price(found, PACK, plain)
    if total == of_vision == 200 * 2**30:
        assert set(levels.vision + levels.language) == {NOTHING}
    if total == 8 * 2**30:
        assert NOTHING not in levels.vision + levels.language[:-1]


def test_a_tower_that_keeps_no_more_at_nothing_stays_at_elementwise():
    found = with_nothing(200 * 2**30, 200 * 2**30)
    language_kept = {level: size for level, size in found.language_kept.items() if level is not NOTHING}
    levels = replace(found, language_kept=language_kept).plan(PACK)
    assert set(levels.vision) == {NOTHING}
    assert set(levels.language) == {ELEMENTWISE}
