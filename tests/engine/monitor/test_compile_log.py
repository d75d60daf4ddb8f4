"""What is compiled in a step is counted, timed and told with its reason; a step that compiles nothing tells nothing."""

from __future__ import annotations

import doctest
import functools
import time

import pytest
import torch

import vl3train.engine.monitor.compile_log as module
from vl3train.engine.monitor.compile_log import Compiles, take_compiles
from vl3train.model.compiling import compiled


@pytest.fixture
def backend(monkeypatch):
    """Traced and cut into forward and backward as on a GPU, without kernels of its own; nothing compiled yet."""
    name = "aot_eager_decomp_partition"
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=name))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    take_compiles()
    return name


def scaled(x, twice):
    y = torch.sin(x) * 2
    return y.exp() if twice else y


def rows(count, *, grad=True):
    return torch.ones(count, 4, requires_grad=grad)


def test_examples():
    assert doctest.testmod(module).failed == 0


def test_the_first_call_is_counted_and_timed_and_other_lengths_compile_nothing(backend):
    function = compiled(scaled, enabled=True)
    started = time.perf_counter()
    function(rows(5), True).sum().backward()
    took = time.perf_counter() - started
    first = take_compiles()
    assert first.graphs == 1
    assert took / 2 < first.seconds <= took, "nearly all of a first call is compilation"
    assert len(first.reasons) == 1
    assert first.reasons[0].startswith("scaled (test_compile_log.py:")
    assert first.reasons[0].endswith("its first graph")
    for count in (5, 9, 64):
        function(rows(count), True).sum().backward()
        assert take_compiles() == Compiles()


def test_a_recompile_is_told_with_the_guard_that_failed(backend):
    function = compiled(scaled, enabled=True)
    function(rows(5), True)
    take_compiles()
    function(rows(5), False)
    flag = take_compiles()
    function(rows(5, grad=False), False)
    grad = take_compiles()
    assert (flag.graphs, grad.graphs) == (1, 1)
    assert flag.seconds > 0
    assert ": twice == True" in flag.reasons[0]
    assert grad.reasons[0].endswith("tensor 'x' requires_grad mismatch. expected requires_grad=1")
    assert all("\n" not in line for line in flag.reasons + grad.reasons)


def test_a_backward_graph_that_is_compiled_in_its_backward_pass_counts_its_seconds_only(backend):
    function = torch.compile(scaled, dynamic=False)  # torch puts it off where no length is unknown
    loss = function(rows(5), True).sum()
    assert take_compiles().graphs == 1
    loss.backward()
    late = take_compiles()
    assert late.graphs == 0
    assert late.seconds > 0
    assert late.reasons == (f"rest of graph 0/0, {late.seconds:.1f} s",)


def test_graphs_are_those_of_torchs_counter(backend):
    def broken(x):
        y = x * 2
        torch._dynamo.graph_break()
        return y + 1

    for function in (broken, lambda x: x, lambda x: x.sum()):
        torch.compile(function)(rows(5))
    found = take_compiles()
    assert found.graphs == torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    assert found.breaks == ("not compiled in one piece: User-inserted graph break. Message: None",)
    function = compiled(scaled, enabled=True)
    function(rows(5), True)
    assert take_compiles().breaks == (), "each is told once"


@pytest.mark.long
def test_more_graphs_than_torch_keeps_records_of_by_itself_are_all_counted(backend):
    function = compiled(torch.neg, enabled=True)
    for _ in range(70):
        torch._dynamo.reset()
        function(rows(2, grad=False))
    assert take_compiles().graphs == 70
