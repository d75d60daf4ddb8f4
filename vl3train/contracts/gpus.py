"""GPUs by their data sheets."""

from __future__ import annotations

from typing import NamedTuple


class Gpu(NamedTuple):
    """What a GPU can do at most, and how much it holds."""

    teraflops: float  # dense bfloat16, 1e12 operations a second
    gigabytes: float  # memory, 1e9 bytes


GPUS = {
    "b200": Gpu(2250, 180),
    "h200": Gpu(989.4, 141),
    "h100": Gpu(989.4, 80),
    "a100": Gpu(312, 80),
    "a100-40": Gpu(312, 40),
    "l40s": Gpu(362, 48),
    "4090": Gpu(165, 24),
}
"""NVIDIA's data sheets, SXM forms where there are several. Names as in ``vl3train plan --gpu``."""


def peak_teraflops(device_name: str) -> float | None:
    """Dense bfloat16 TFLOP/s of a GPU by the name that its driver gives it; None for one that is not listed.

    >>> peak_teraflops("NVIDIA H100 80GB HBM3"), peak_teraflops("Tesla T4")
    (989.4, None)
    """
    name = device_name.lower()
    return next((gpu.teraflops for part, gpu in GPUS.items() if part in name), None)
