"""Gaps of a trace are told with what the host did in them."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import profile
from benchmarks.gpu.gaps import gaps


def event(cat, name, begin, duration, *, correlation=None, tid=1):
    args = {} if correlation is None else {"correlation": correlation}
    return {
        "ph": "X",
        "cat": cat,
        "name": name,
        "ts": begin * 1e3,
        "dur": duration * 1e3,
        "tid": tid,
        "args": args,
    }


def test_a_gap_is_told_with_the_call_that_kept_the_host():
    events = [
        event("cuda_runtime", "cudaLaunchKernel", 0, 0.1, correlation=1),
        event("kernel", "first", 10, 20, correlation=1, tid=7),
        event("gpu_memcpy", "Memcpy HtoD", 20, 60, tid=8),
        event("cpu_op", "aten::linear", 19, 52),
        event("cpu_op", "aten::mm", 20, 50),
        event("overhead", "Lazy Function Loading", 21, 47, tid=0),
        event("cuda_runtime", "cudaLaunchKernel", 69, 0.1, correlation=2),
        event("cuda_runtime", "cudaStreamSynchronize", 1, 68, tid=2),
        event("kernel", "second", 71, 5, correlation=2, tid=7),
    ]
    (gap,) = gaps(events)
    assert gap["ms"] == pytest.approx(41)
    assert gap["at_ms"] == pytest.approx(20)
    assert gap["before"] == "second"
    assert gap["host"] == "Lazy Function Loading in aten::mm, 47.0 ms"


def test_a_kernel_that_waits_for_a_copy_had_been_launched_before():
    events = [
        event("cuda_runtime", "cudaLaunchKernel", 1, 0.1, correlation=2),
        event("kernel", "first", 10, 30, correlation=1),
        event("kernel", "side", 12, 8, correlation=4),
        event("kernel", "second", 45, 5, correlation=2),
        event("kernel", "third", 51, 5, correlation=3),
        event("kernel", "fourth", 90, 5, correlation=3),
    ]
    longest, other = gaps(events)
    assert (longest["ms"], longest["host"]) == (34, "its launch is not in the trace")
    assert other["ms"] == 5, "the first one ends at 40, another began later and ended before"
    assert other["host"] == "had launched it before: it waits for a copy or another stream"
    assert gaps([]) == []


def test_gaps_are_a_table_of_the_page():
    kernels = [event("kernel", "a|b", at, 1) for at in (0, 50)]
    found = profile.summary(kernels, 0.051)
    page = profile.markdown({"row": "2b", "packs": 2, **found})
    assert "| 49.0 | 1 ms | `a b` | its launch is not in the trace |" in page


@pytest.mark.long
def test_any_step_of_a_row_can_be_profiled(monkeypatch, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path))
    words = ["profile", "--tiny", "--row", "2b", "--packs", "1", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", [*words, "--step", "1"])
    profile.main()
    assert json.loads((tmp_path / "profile_2b.json").read_text())["gaps"] == []
    monkeypatch.setattr(sys, "argv", [*words, "--step", "4"])
    with pytest.raises(SystemExit):
        profile.main()
