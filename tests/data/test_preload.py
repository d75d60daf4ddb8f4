"""A process of the fork server has the compiled code of its first sample: it compiles and loads nothing anew."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest

from tests.data.plan.test_plan import step_config
from tests.data.plan.test_sample_table import opened, write_index
from vl3train.contracts.records import Cursor
from vl3train.data.media import resampling_kernels
from vl3train.data.media.patches import resize_and_patchify
from vl3train.data.plan import balance, cut
from vl3train.data.plan.plan import Plan
from vl3train.data.render.processes import clean_processes


def compiled() -> dict[str, int]:
    """How many signatures each compiled function of the first sample's way has in this process."""
    functions = (
        balance.pack_step,
        cut.cut_epoch,
        resampling_kernels.resample,
        resampling_kernels.cut_whole,
    )
    return {one.__name__: len(one.signatures) for one in functions}


def first_sample(plan: Plan) -> tuple[dict[str, int], dict[str, int]]:
    """In a worker: what was compiled before a pack was planned and two pictures were resized, and after."""
    before = compiled()
    plan.step_packs(Cursor())
    for side in (110, 112):
        resize_and_patchify(np.zeros((side, side, 3), np.uint8), grid=(8, 8), merge_size=2)
    return before, compiled()


@pytest.mark.parametrize("num_samples", [100, 8000], ids=["sent", "mapped"])
def test_a_worker_finds_the_plans_and_the_pictures_code_compiled(tmp_path, num_samples):
    write_index(tmp_path, num_samples)
    _, plan = opened(tmp_path, tmp_path / "cache")
    assert (plan.table.file is None) == (num_samples < 4096)
    prefixes = np.full(plan.table.num_tokens.shape, 5, np.int32)
    table = dataclasses.replace(plan.table, prefix_tokens=prefixes, file=None)
    shared = Plan(table, 3, step_config(), max_family_records=4)
    assert shared.units is not None
    with ProcessPoolExecutor(1, mp_context=clean_processes()) as pool:
        for one in (plan, shared):
            before, after = pool.submit(first_sample, one).result()
            assert min(before.values()) > 0
            assert after == before
