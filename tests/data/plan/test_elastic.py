"""Every step's content is the same over worlds and workers, fresh or resumed, across an epoch's end.

The real loader, plan and index; only decoding is left out, which tests/data/test_pipeline.py adds for some of these.
"""

from __future__ import annotations

import dataclasses
import hashlib

import pytest
from torch.utils.data import DataLoader

from tests.data.shards_fixture import make_recipe, train_config
from tests.long import first_of
from vl3train.data.loader import PackDataset
from vl3train.data.pipeline import open_data

# Three workers on two cores are slow, not wrong.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

CASES = [
    # ranks, workers of each, whether the run resumes just before the epoch's end
    *((1, 1, True), (1, 3, False)),
    *((2, 0, False), (2, 1, False), (2, 3, True)),
    *((4, 0, True), (4, 1, True), (4, 3, False)),
    *((8, 0, False), (8, 1, True)),
    *((16, 0, True), (16, 1, False)),
]
"""All pairs of two columns but three workers of 8 or 16 ranks: a loader's workers know of its own rank alone."""


class PlannedPacks(PackDataset):
    """A PackDataset that gives what it would decode: rows, keys and where their bytes lie."""

    def _load(self, pack, num_loss_chunks):
        index = self.data.index
        return [(row, index.key(row), index.rows["part_offsets"][row].as_py()) for row in pack.samples]


@pytest.fixture(
    scope="module", params=[{}, {"block_shards": 2, "max_epoch_samples": 25}], ids=["free", "blocks"]
)
def opened(request, tmp_path_factory, tokenizer_dir):
    root = tmp_path_factory.mktemp("data")
    cfg = train_config(root, make_recipe(root, held_out=False), global_packs=16, max_samples=8)
    for option, value in request.param.items():
        setattr(cfg.data, option, value)
    return open_data(cfg, tokenizer_dir=tokenizer_dir, held_out=False, build=True)


def step_hashes(data, first, last, dp_size, num_workers):
    """A hash of each step: what all ranks' loaders gave for it, whichever rank it was."""
    cursor, per_rank = data.plan.cursor_at(first), 16 // dp_size
    steps = [[] for _ in range(first, last)]
    for rank in range(dp_size):
        dataset = PlannedPacks(data=data, first=cursor, rank=rank, dp_size=dp_size, loss_chunk_tokens=32)
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=range((last - first) * per_rank),
            num_workers=num_workers,
            multiprocessing_context="fork" if num_workers else None,  # starts in a hundredth of the time
        )
        for number, pack in enumerate(loader):
            steps[number // per_rank].append(pack)
    return [hashlib.sha256(repr(sorted(packs)).encode()).hexdigest() for packs in steps]


@pytest.mark.parametrize("cases", first_of(CASES[1::3], CASES), ids=["some", "all"])
def test_steps_hash_alike_in_every_world_with_any_workers_fresh_or_resumed(opened, cases):
    in_epoch = opened.plan.steps_in_epoch(0)
    last = in_epoch + 2
    straight = step_hashes(opened, 0, last, 1, 0)
    assert len(set(straight)) == last > 4  # no two steps are alike
    for dp_size, num_workers, resumed in cases:
        first = in_epoch - 1 if resumed else 0
        assert step_hashes(opened, first, last, dp_size, num_workers) == straight[first:]


def test_a_resume_at_any_step_goes_on_as_the_straight_run(opened):
    last = opened.plan.steps_in_epoch(0) + opened.plan.steps_in_epoch(1)
    straight = step_hashes(opened, 0, last, 1, 0)
    for first in range(last):
        assert step_hashes(opened, first, last, 2, 0) == straight[first:]


def test_another_seed_hashes_otherwise(opened):
    """Breaks if the hash said nothing of the content."""
    plan = dataclasses.replace(opened.plan, seed=opened.plan.seed + 1)
    other = dataclasses.replace(opened, plan=plan)
    assert set(step_hashes(other, 0, 3, 1, 0)).isdisjoint(step_hashes(opened, 0, 3, 1, 0))
