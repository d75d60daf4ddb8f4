"""A row of the GPU benchmark can be held to less memory than its GPU has."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import measure
from benchmarks.gpu.process import in_own_processes
from benchmarks.gpu.rows import Row
from vl3train.engine.memory.device import CudaMemory

GPU = torch.device("cuda", 0)


def taken_memory(name, row, rank, tiny, pipe):
    torch.cuda.init()
    before, total = torch.cuda.mem_get_info(GPU)
    measure.take_memory(GPU, row.gpu_gib)
    after, _ = torch.cuda.mem_get_info(GPU)
    pipe.send(
        {
            "taken": before - after,
            "beyond": total - 2**30 * row.gpu_gib,
            "of_torch": torch.cuda.max_memory_reserved(GPU),
        }
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_a_row_has_no_more_memory_than_it_is_given():
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info(GPU))
    found = in_own_processes(taken_memory, "some", Row(gpu_gib=total - free / 2), False)
    assert found["taken"] == pytest.approx(found["beyond"], abs=2**22)
    assert found["of_torch"] == 0


def test_memory_that_cannot_be_taken_is_told(monkeypatch):
    said = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**33, 2**34))
    measure.child("2b", Row(gpu_gib=24.0), 0, False, SimpleNamespace(send=said.append))
    assert said == [{"failed": "RuntimeError: gpu_gib=24.0, and the GPU has 16.0 GiB"}]


def test_a_process_may_hold_all_but_a_share_of_what_others_leave(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * 2**30, 141 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20 * 2**30)
    assert CudaMemory(GPU).limit() == int(80 * 2**30 * 0.97)
