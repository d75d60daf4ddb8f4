"""The losses of samples, taken apart from those of their pack's tokens; reasons in words."""

from __future__ import annotations

import doctest
import math
from types import SimpleNamespace

import torch

from tests.engine.packs import collate_samples, random_samples
from vl3train.engine.bad_steps import report
from vl3train.engine.bad_steps.report import sample_losses, worst_first


def test_doctests():
    assert doctest.testmod(report).failed == 0


def test_each_sample_has_the_mean_over_its_own_tokens_and_the_worst_come_first():
    ids = SimpleNamespace(image_token_id=1, video_token_id=2)
    batches = [collate_samples(random_samples(ids, count=4, seed=seed)) for seed in (0, 1)]
    losses = [torch.arange(len(batch.supervised_segments), dtype=torch.float32) for batch in batches]
    losses[1][0] = math.nan
    found = sample_losses(batches, losses, ["even", "odd"], rank=3)
    assert [(one.micro_batch, one.source) for one in found] == [
        (number, name) for number in (0, 1) for name in ("even", "odd", "even", "odd")
    ]
    assert {one.rank for one in found} == {3}
    for one, (batch, losses_U, segment) in zip(
        found, [(*pair, s) for pair in zip(batches, losses, strict=True) for s in range(4)], strict=True
    ):
        mine = losses_U[batch.supervised_segments == segment]
        assert one.supervised_tokens == len(mine) > 0
        assert one.loss == mine.mean().item() or (
            math.isnan(one.loss) and (batch, segment) == (batches[1], 0)
        )
    ordered = sorted(found, key=worst_first)
    assert math.isnan(ordered[0].loss)
    assert [one.loss for one in ordered[1:]] == sorted([one.loss for one in ordered[1:]], reverse=True)
