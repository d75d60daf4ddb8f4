"""What a scene says of itself, against the pixels that are drawn."""

from __future__ import annotations

import random

import numpy as np
import pytest

from vl3train.demo.scenes import (
    COLOURS,
    Scene,
    bar_chart,
    draw,
    many_shapes,
    one_shape,
    two_shapes,
    written_word,
)


def mask(scene: Scene, colour: str) -> np.ndarray:
    """Where ``colour`` is in the picture: (height, width) bool."""
    pixels = np.asarray(draw(scene)).astype(int)
    return np.abs(pixels - COLOURS[colour]).max(axis=2) < 8


def number_of_patches(found: np.ndarray) -> int:
    """Connected groups of at least nine pixels, by flooding."""
    found, groups = found.copy(), 0
    while found.any():
        stack, size = [tuple(np.argwhere(found)[0])], 0
        found[stack[0]] = False
        while stack:
            row, column = stack.pop()
            size += 1
            for near in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
                inside = 0 <= near[0] < found.shape[0] and 0 <= near[1] < found.shape[1]
                if inside and found[near]:
                    found[near] = False
                    stack.append(near)
        groups += size >= 9
    return groups


@pytest.mark.parametrize("seed", range(25))
def test_the_shape_is_on_its_side(seed: int) -> None:
    scene, side = one_shape(random.Random(seed))
    rows, columns = np.nonzero(mask(scene, scene.shapes[0].colour))
    down, across = rows.mean() / scene.height - 0.5, columns.mean() / scene.width - 0.5
    far = {"left": -across, "right": across, "top": -down, "bottom": down}
    assert max(far, key=lambda name: far[name]) == side


@pytest.mark.parametrize("seed", range(25))
def test_as_many_shapes_as_counted(seed: int) -> None:
    scene, number = many_shapes(random.Random(seed))
    assert number_of_patches(mask(scene, scene.shapes[0].colour)) == number


@pytest.mark.parametrize("seed", range(25))
def test_the_named_bar_is_the_tallest(seed: int) -> None:
    scene, tallest = bar_chart(random.Random(seed))
    heights = {colour: mask(scene, colour).sum(axis=0).max() for colour, _ in scene.bars}
    assert max(heights, key=lambda colour: heights[colour]) == tallest


def test_a_word_is_inside_the_picture_and_words_look_different() -> None:
    pictures = {}
    for seed in range(40):
        scene, word = written_word(random.Random(seed))
        ink = mask(scene, scene.word_colour)
        rows, columns = np.nonzero(ink)
        assert columns.min() > 0
        assert columns.max() < scene.width - 1
        assert rows.min() > 0
        assert rows.max() < scene.height - 1
        pictures[word] = ink.mean()
    assert len(pictures) == 5
    assert len(set(pictures.values())) == 5


def test_two_shapes_differ_and_are_both_described() -> None:
    for seed in range(20):
        scene, sides = two_shapes(random.Random(seed))
        for shape, side in zip(scene.shapes, sides, strict=True):
            assert f"{shape.colour} {shape.kind}, {side}." in scene.description
            assert mask(scene, shape.colour).sum() > 100
