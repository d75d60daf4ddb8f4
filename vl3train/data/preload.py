"""What loader workers and decode processes need, loaded and compiled once: multiprocessing's fork server imports this.

numba loads a part of itself at the first compiled call of a process, and reads each function from its cache: 0.4 s of
CPU time in every worker, and 0.3 s in every decode server, before its first sample. Pillow loads its formats.
"""

from __future__ import annotations

import os

import numpy as np
import torch
from PIL import Image

import vl3train.data.loader  # noqa: F401 - for the processes to come
from vl3train.config.schema import StepConfig
from vl3train.contracts.records import Cursor
from vl3train.data.compiled import is_on_disk
from vl3train.data.media.patches import resize_and_patchify
from vl3train.data.plan.cut import cut_epoch
from vl3train.data.plan.plan import Plan
from vl3train.data.plan.sample_table import SampleTable


def call_compiled_code() -> None:
    """Plan two samples, and resize two pictures: one whose size changes, one that is cut as it is.

    Where nothing is on disk yet, a fork compiles the plan meanwhile, which takes about as long as the pictures. It
    starts no thread, so that a process that has done it may be forked.
    """
    torch.set_num_threads(1)
    fork = os.fork() if not is_on_disk(cut_epoch) else None
    if fork == 0:
        try:
            plan_two_samples()
        finally:
            os._exit(0)  # where it failed, the other does it, and says why
    resize_two_pictures()
    if fork is not None:
        os.waitpid(fork, 0)
    plan_two_samples()


def resize_two_pictures() -> None:
    """One changes its size, the other is cut as it is."""
    for side in (57, 56):
        resize_and_patchify(np.zeros((side, side, 3), np.uint8), grid=(4, 4), merge_size=2)


def plan_two_samples() -> None:
    """Plan an epoch and pack its step."""
    Plan(_two_samples(), 0, StepConfig(global_packs=1), max_family_records=2).step_packs(Cursor())


def _two_samples() -> SampleTable:
    """Of one family."""
    two, of_64_bits = np.ones(2, np.int32), np.ones(2, np.int64)
    return SampleTable(
        sizes=(2,),
        weights=(1.0,),
        num_tokens=two,
        num_supervised_tokens=two,
        num_patches=two,
        num_patch_pairs=of_64_bits,
        num_items=two,
        prefix_tokens=two,
        families=of_64_bits,
        fingerprint="two",
    )


Image.preinit()
call_compiled_code()
