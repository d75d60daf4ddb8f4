"""Who needs a moment that is being copied waits for it, and for no other."""

from __future__ import annotations

import copy

import pytest

from tests.engine.optim.test_offload_adamw import assert_same, chunks, go_on, optimizer_of, parameters_on
from vl3train.engine.optim import offload_adamw, offload_chunk


def test_the_host_waits_for_as_few_chunks_as_it_must(monkeypatch):
    monkeypatch.setattr(offload_adamw, "CHUNK_VALUES", 500)
    parameters = parameters_on()
    optimizer = optimizer_of(parameters, True)
    waited = []
    monkeypatch.setattr(
        offload_chunk.Chunk, "wait_until_left", lambda self: waited.append(chunks(optimizer).index(self))
    )
    optimizer.wait()
    go_on(parameters, optimizer, range(3))  # the chunks: 4000, 4000 and 2048 bytes
    for left in (10**9, 10048):
        optimizer.wait(left)
    assert waited == [], "so much may be on its way"
    for left in (10047, 6048, 6047, 2048, 2047, 0):
        optimizer.wait(left)
    assert waited == [0, 1, 2], "for none a second time"
    waited.clear()
    optimizer.state_dict()
    assert waited == []
    go_on(parameters, optimizer, range(3, 4))
    optimizer.state_dict()
    assert waited == [2], "a checkpoint waits for all"


def test_who_waits_for_what_leaves_does_not_wait_for_what_comes(late_link, monkeypatch):
    """The host would queue nothing behind the first layer of a backward pass until all that came early is there."""
    monkeypatch.setattr(offload_adamw, "CHUNK_VALUES", 100)
    parameters = parameters_on()
    optimizer = optimizer_of(parameters, True)
    go_on(parameters, optimizer, range(3))
    coming, leaving = late_link
    assert leaving
    optimizer.prefetch(10**9)
    optimizer.wait()
    assert not leaving
    assert len(coming) == 13, "all of them are still on their way"


@pytest.mark.parametrize("prefetched", [0, 3000, 10**9])
def test_whoever_needs_a_copy_waits_for_it(late_link, monkeypatch, prefetched):
    monkeypatch.setattr(offload_adamw, "CHUNK_VALUES", 100)
    queues = late_link
    torchs = parameters_on()
    on_device = optimizer_of(torchs, False)
    go_on(torchs, on_device, range(6))
    ours = parameters_on()
    on_host = optimizer_of(ours, True)
    go_on(ours, on_host, range(4), lambda: on_host.prefetch(prefetched))
    assert queues[1], "nobody has waited for what left last"
    saved = copy.deepcopy(on_host.state_dict())
    assert not queues[1]
    weights = [parameter.detach().clone() for parameter in ours]
    go_on(ours, on_host, range(4, 6), lambda: on_host.prefetch(prefetched))
    on_host.load_state_dict(saved)  # over what is still leaving
    assert not any(queues)
    for parameter, before in zip(ours, weights, strict=True):
        parameter.data.copy_(before)
    go_on(ours, on_host, range(4, 6), lambda: on_host.prefetch(prefetched))
    on_host.wait()
    assert_same(ours, on_host, torchs, on_device)
