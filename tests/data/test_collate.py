"""A batch holds exactly what its samples held, where Batch says it lies."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
import torch

from vl3train.contracts.records import Pack, RenderedSample
from vl3train.contracts.tokens import IGNORE_INDEX
from vl3train.data import collate as data_collate
from vl3train.data.collate import collate, patch_positions

PAD = 5


def sample(name, source, grids, merge_sizes, text_tokens, seed):
    """A sample whose patches, ids and labels are random, with some visual tokens pruned."""
    rng = np.random.default_rng(seed)
    masks = []
    for (t, h, w), merge in zip(grids, merge_sizes, strict=True):
        mask = rng.random(t * h * w // merge**2) < 0.6
        mask[0] = True
        masks.append(mask)
    keep_mask = np.concatenate(masks) if masks else np.zeros(0, bool)
    num_visual = int(keep_mask.sum())
    ids = rng.integers(10, 90, text_tokens + num_visual)
    places = np.sort(rng.choice(len(ids), num_visual, replace=False))
    ids[places] = PAD
    labels = np.where(rng.random(len(ids)) < 0.4, rng.integers(10, 90, len(ids)), IGNORE_INDEX)
    labels[-1] = IGNORE_INDEX
    return RenderedSample(
        key=name,
        source=source,
        input_ids=ids,
        labels=labels,
        patches=rng.integers(0, 256, (sum(t * h * w for t, h, w in grids), 588)).astype(np.uint8),
        grids=np.array(grids, np.int64).reshape(-1, 3),
        merge_sizes=np.array(merge_sizes, np.int64),
        keep_mask=keep_mask,
        placeholder_positions=places,
    )


SAMPLES = [
    sample("clip", 2, [(3, 4, 6)], [2], 9, 0),
    sample("text", 0, [], [], 7, 1),
    sample("mixed", 1, [(1, 5, 3), (2, 2, 4), (1, 1, 2)], [1, 2, 1], 12, 2),
]
PACK = Pack(samples=(7, 8, 9), num_tokens=77, num_patches=1, num_supervised_tokens=3, cost=1)


def merged_tokens(samples):
    """Each sample's kept visual tokens: the mean over the patches of each merged block, in placeholder order."""
    result = []
    for one in samples:
        patch, tokens = 0, []
        for (t, h, w), merge in zip(one.grids, one.merge_sizes, strict=True):
            count = t * h * w
            blocks = one.patches[patch : patch + count].astype(float).reshape(count // merge**2, merge**2, -1)
            tokens.append(blocks.mean(1))
            patch += count
        result.append(np.concatenate(tokens)[one.keep_mask] if tokens else np.zeros((0, 588)))
    return result


def test_doctests():
    assert doctest.testmod(data_collate).failed == 0


def test_every_placeholder_gets_its_own_samples_visual_token():
    batch = collate(SAMPLES, PACK, num_loss_chunks=1)
    pieces, first = [], 0
    for merge, count in batch.patches_by_merge:  # one mean for each merge size, as the model does it
        pixels = batch.pixel_values[first : first + count].double()
        pieces.append(pixels.reshape(-1, merge**2, 588).mean(1))
        first += count
    merged = torch.cat(pieces)
    row = torch.zeros(len(batch.input_ids), 588, dtype=torch.double)
    row[batch.placeholder_positions] = merged[batch.kept]
    assert (batch.input_ids[batch.placeholder_positions] == PAD).all()
    for start, one, tokens in zip(batch.cu_seqlens, SAMPLES, merged_tokens(SAMPLES), strict=False):
        mine = row[int(start) + torch.from_numpy(one.placeholder_positions)]
        torch.testing.assert_close(mine, torch.from_numpy(tokens))
    assert batch.patches_by_merge == ((1, 17), (2, 88))
    assert len(batch.placeholder_positions) == sum(len(one.placeholder_positions) for one in SAMPLES)


def test_segments_positions_and_labels_lie_end_to_end():
    batch = collate(SAMPLES, PACK, num_loss_chunks=3, num_failed_samples=1)
    assert batch.input_ids.tolist() == [i for one in SAMPLES for i in one.input_ids]
    assert batch.position_ids.tolist() == [i for one in SAMPLES for i in range(len(one.input_ids))]
    assert batch.cu_seqlens.dtype == torch.int32
    assert (
        batch.cu_seqlens.diff().tolist() == list(batch.segment_lengths) == [len(o.input_ids) for o in SAMPLES]
    )
    labels = torch.full((len(batch.input_ids),), IGNORE_INDEX)
    labels[batch.supervised_positions] = batch.supervised_labels
    assert labels.tolist() == [label for one in SAMPLES for label in one.labels]
    for position, segment in zip(batch.supervised_positions, batch.supervised_segments, strict=True):
        assert batch.cu_seqlens[segment] <= position < batch.cu_seqlens[segment + 1]
    assert batch.segment_sources == (2, 0, 1)
    assert batch.segment_keys == ("clip", "text", "mixed")
    assert (batch.num_loss_chunks, batch.num_planned_tokens, batch.num_failed_samples) == (3, 77, 1)


def test_frames_are_the_encoders_segments():
    batch = collate(SAMPLES, PACK, num_loss_chunks=1)
    assert batch.frame_lengths == (
        15,
        2,
        24,
        24,
        24,
        8,
        8,
    )  # merge size 1 first, then 2, each in sample order
    assert batch.vision_cu_seqlens.diff().tolist() == list(batch.frame_lengths)
    assert batch.patch_positions.shape == (len(batch.pixel_values), 2)


@pytest.mark.parametrize(("grid", "merge"), [((2, 4, 6), 2), ((1, 3, 5), 1)])
def test_patch_positions_are_those_of_transformers(grid, merge):
    from transformers.vision_utils import get_vision_position_ids

    theirs = get_vision_position_ids(torch.tensor([grid]), torch.tensor([merge]))
    assert patch_positions(grid, merge).tolist() == theirs.tolist()


@pytest.mark.parametrize("samples", [[SAMPLES[1]], []])
def test_a_pack_without_pictures_carries_four_zero_patches(samples):
    batch = collate(samples, PACK, num_loss_chunks=1)
    assert batch.pixel_values.shape == (4, 588)
    assert batch.pixel_values.sum() == 0
    assert batch.patches_by_merge == ((2, 4),)
    assert batch.frame_lengths == (4,)
    assert len(batch.kept) == len(batch.placeholder_positions) == 0


def test_an_empty_pack_is_one_unsupervised_token():
    batch = collate([], PACK, num_loss_chunks=2)
    assert batch.input_ids.tolist() == [0]
    assert batch.segment_sources == (-1,)
    assert len(batch.supervised_positions) == 0
    assert batch.cu_seqlens.tolist() == [0, 1]
