"""What is shown of a sample is what the encoder sees of it."""

from __future__ import annotations

import numpy as np

from tests.engine.packs import collate_samples
from vl3train.contracts.records import RenderedSample
from vl3train.data.render.families import cut_family
from vl3train.engine.held_out.shown import ShownSamples, frames_of, side_by_side
from vl3train.preview.step_samples import sample_pictures


def sample(key, source, grids, merges, seed=0):
    """A rendered sample with random patches; nothing is pruned."""
    draw = np.random.default_rng(seed)
    patches = sum(t * h * w for t, h, w in grids)
    tokens = sum(t * h * w // merge**2 for (t, h, w), merge in zip(grids, merges, strict=True))
    return RenderedSample(
        key=key,
        source=source,
        input_ids=np.full(tokens + 4, 7),
        labels=np.concatenate([np.full(tokens + 3, -100), [5]]),
        patches=draw.integers(0, 256, (patches, 588), dtype=np.uint8),
        grids=np.array(grids).reshape(-1, 3),
        merge_sizes=np.array(merges, int),
        keep_mask=np.ones(tokens, bool),
        placeholder_positions=np.arange(2, 2 + tokens),
    )


def test_frames_are_those_that_inspect_shows_wherever_the_sample_lies_in_its_pack():
    samples = [
        sample("a", 0, [(1, 4, 6)], [1], 1),
        sample("b", 1, [(3, 4, 2), (1, 2, 2)], [2, 1], 2),
        sample("c", 0, [], [], 3),
        sample("d", 1, [(1, 2, 4)], [2], 4),
    ]
    batch = collate_samples(samples)
    for segment, one in enumerate(samples):
        wanted = [picture for item in sample_pictures(one) for picture in item]
        found = frames_of(batch, segment)
        # A pack holds items by merge size.
        as_bytes = sorted(picture.tobytes() for picture in wanted)
        assert sorted(picture.tobytes() for picture in found) == as_bytes, one.key
        assert {picture.shape for picture in found} == {picture.shape for picture in wanted}


def test_of_a_sample_with_a_shared_prefix_the_prefixs_pictures_are_shown():
    first, other = sample("a", 0, [(1, 4, 6)], [1], 1), sample("b", 0, [(1, 2, 2)], [1], 2)
    prefix, *branches = cut_family(first, [(first.input_ids, first.labels)], ["a", "a2"], 26)
    batch = collate_samples([other, prefix, *branches, other])
    for segment, one in ((0, other), (2, first), (3, first), (4, other)):
        [wanted] = [picture for item in sample_pictures(one) for picture in item]
        [found] = frames_of(batch, segment)
        assert np.array_equal(found, wanted)


def test_long_clips_show_their_first_and_last_frame():
    one = sample("a", 0, [(20, 2, 2)], [2])
    frames = sample_pictures(one)[0]
    found = frames_of(collate_samples([one]), 0)
    assert len(found) == 8
    assert np.array_equal(found[0], frames[0])
    assert np.array_equal(found[-1], frames[-1])


def test_packs_pass_until_every_source_has_its_samples():
    packs = [
        collate_samples([sample(f"{number}", number % 2, [(1, 2, 2)], [1], number)]) for number in range(6)
    ]
    shown = ShownSamples({0: 1, 1: 2})
    assert len(list(shown.watch(packs, to_the_end=False))) == 4
    assert set(shown.pictures) == {(0, "0"), (1, "1"), (1, "3")}
    assert len(list(ShownSamples({}).watch(packs, to_the_end=True))) == 6
    assert side_by_side([]) is None
