"""No picture or clip is on both sides, also through others; the choice depends on the records alone."""

from __future__ import annotations

import random

import pytest

from vl3train.finetuning.data.split import Item, choose_held_out, groups, shared_media, wanted_samples


def random_items(rng: random.Random) -> list[Item]:
    media = [f"m{i}" for i in range(rng.randint(1, 40))]
    return [
        Item(str(i), f"{rng.random()}", tuple(rng.sample(media, rng.randint(0, min(3, len(media))))))
        for i in range(rng.randint(1, 60))
    ]


def reached(items: list[Item], first: int) -> set[int]:
    """Items that share media with the first, or with one that does: by repeated looking."""
    found, media = {first}, set(items[first].media)
    while new := {i for i, item in enumerate(items) if i not in found and media & set(item.media)}:
        found |= new
        media |= {medium for i in new for medium in items[i].media}
    return found


@pytest.mark.parametrize("seed", range(30))
def test_no_medium_is_on_both_sides(seed: int):
    rng = random.Random(seed)
    items = random_items(rng)
    wanted = rng.randint(0, len(items))
    chosen = choose_held_out(items, wanted)
    held_out = {medium for i in chosen for medium in items[i].media}
    training = {medium for i, item in enumerate(items) if i not in chosen for medium in item.media}
    assert held_out & training == set()
    assert len(chosen) <= wanted
    for group in groups(items):
        assert set(group) == reached(items, group[0])
        assert len(group) + len(chosen) > wanted or chosen.issuperset(group)


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_the_same_in_any_order(seed: int):
    rng = random.Random(seed)
    items = random_items(rng)
    names = {items[i].where for i in choose_held_out(items, len(items) // 3)}
    rng.shuffle(items)
    assert {items[i].where for i in choose_held_out(items, len(items) // 3)} == names


def test_the_same_text_is_not_on_both_sides():
    items = [Item(str(i), f"key{i // 2}", ()) for i in range(10)]
    chosen = choose_held_out(items, 4)
    assert sorted(i // 2 for i in chosen) == sorted(2 * sorted({i // 2 for i in chosen}))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("5%", 10),
        ("0.1%", 1),
        ("0%", 0),
        ("12.5 %", 25),
        ("7", 7),
        ("0", 0),
        ("my.jsonl", None),
        ("-5%", None),
    ],
)
def test_a_share_a_number_or_a_file(text: str, wanted: int | None):
    assert wanted_samples(text, 200) == wanted


def test_media_of_a_file_that_are_trained_on_are_told():
    training, other = (
        [Item("a", "", ("x", "y"))],
        [Item("b", "", ("y",)), Item("c", "", ("z",)), Item("d", "", ())],
    )
    assert [item.where for item in shared_media(training, other)] == ["b"]
