"""The next micro-batch is copied while this one is computed with, and none is taken for another."""

from __future__ import annotations

import pytest
import torch

from tests.engine.memory.test_fit import pack
from vl3train.config.schema import MachineConfig
from vl3train.engine.ranks import join
from vl3train.engine.step import train_step
from vl3train.engine.zero.transfer import Reading, Transfer
from vl3train.model.packed_forward import PackedOutput


def same(one, other):
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(one.values(), other.values(), strict=True))


def test_a_prefetched_copy_is_used_once_and_by_its_own_batch_only():
    first, second = pack(1, 40), pack(2, 60)
    transfer = Transfer(torch.device("cpu"))
    transfer.prefetch(first)
    assert same(transfer.get(second).tensors(), second.tensors())
    assert same(transfer.get(first).tensors(), first.tensors())


class Watched:
    """An engine that only notes what it is asked for."""

    def __init__(self, rank):
        self.rank, self.acts, self.parts = rank, [], []

    def forward(self, batch, *, first, last):
        self.acts.append(("forward", batch, first, last))
        token_losses = torch.zeros(len(batch.supervised_segments))
        return PackedOutput(token_losses.sum(), token_losses, token_losses == 0)

    def prefetch(self, batch):
        self.acts.append(("prefetch", batch))

    def backward(self, loss):
        self.acts.append("backward")

    def finish_micro_batch(self):
        pass

    def step(self, totals, is_bad):
        norm = torch.zeros(1)
        return Reading(torch.cat([totals, norm, is_bad(totals, norm[0]).float().reshape(1)]))

    def end_step(self, *, is_skipped):
        assert not is_skipped


def test_a_step_prefetches_each_micro_batch_before_the_backward_pass_of_the_one_before():
    batches = [pack(number, 40) for number in (1, 2, 3)]
    engine = Watched(join(MachineConfig()))
    train_step(engine, batches, num_supervised_tokens=1, num_sources=1, stop_requested=False)
    one, two, three = batches
    assert engine.acts == [
        ("forward", one, True, False),
        ("prefetch", two),
        "backward",
        ("forward", two, False, False),
        ("prefetch", three),
        "backward",
        ("forward", three, False, True),
        "backward",
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_copies_arrive_whole_while_it_computes_and_the_host_never_waits():
    device = torch.device("cuda")
    transfer = Transfer(device)
    batches = [pack(number, 400).pin_memory() for number in range(6)]
    for round_trip in (0, 1):  # page-locked memory is made in the first
        sums = []
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if round_trip else "default")
        try:
            transfer.prefetch(batches[0])
            for number, batch in enumerate(batches):
                there = transfer.get(batch)
                torch.cuda._sleep(10_000_000)  # what it computes before it reads the last of the batch
                if number + 1 < len(batches):
                    transfer.prefetch(batches[number + 1])
                sums.append(there.pixel_values.double().sum() + there.input_ids.double().sum())
                del there
        finally:
            torch.cuda.set_sync_debug_mode("default")
    wanted = [batch.pixel_values.double().sum() + batch.input_ids.double().sum() for batch in batches]
    assert [float(value) for value in sums] == [float(value) for value in wanted]
