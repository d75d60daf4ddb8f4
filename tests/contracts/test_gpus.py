from __future__ import annotations

import pytest

from vl3train.contracts.gpus import peak_teraflops


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA GeForce RTX 4090", 165),
        ("Tesla T4", None),
    ],
)
def test_a_gpu_is_found_by_the_name_its_driver_gives(name, teraflops):
    assert peak_teraflops(name) == teraflops
