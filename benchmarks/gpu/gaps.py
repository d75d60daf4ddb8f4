"""Stretches of a trace in which no kernel runs, and what the host did meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LEAST_MS = 2.0
"""The shortest gap that is listed."""
CALLS, OVERHEAD = {"cuda_runtime", "cuda_driver"}, "overhead"
"""What kineto calls the host's calls of CUDA, and what these do beside, such as "Lazy Function Loading" of a kernel;
whether that carries the number of the thread is not relied on."""


def gaps(events: Sequence[dict[str, Any]], least_ms: float = LEAST_MS) -> list[dict[str, Any]]:
    """The gaps of a trace's complete events (microseconds), the longest first.

    Copies are no kernels: what computes nothing waits. Each gap has ``ms``, ``at_ms`` from the first kernel's start,
    ``before``, the kernel that ends it, and ``host``: what the host did until it launched that kernel, or that
    the kernel had been launched before.
    """
    kernels = sorted((e for e in events if e.get("cat") == "kernel"), key=lambda e: e["ts"])
    launches = {_correlation(e): e for e in events if e.get("cat") in CALLS and _correlation(e) is not None}
    found = []
    reached = kernels[0]["ts"] if kernels else 0
    for kernel in kernels:
        if kernel["ts"] - reached >= least_ms * 1e3:
            launch = launches.get(_correlation(kernel))
            found.append(
                {
                    "ms": (kernel["ts"] - reached) / 1e3,
                    "at_ms": (reached - kernels[0]["ts"]) / 1e3,
                    "before": kernel["name"][:80],
                    "host": _host(events, reached, launch),
                }
            )
        reached = max(reached, kernel["ts"] + kernel["dur"])
    return sorted(found, key=lambda gap: -gap["ms"])


def _correlation(event: dict[str, Any]) -> Any:
    return event.get("args", {}).get("correlation")


def _host(events: Sequence[dict[str, Any]], begin: float, launch: dict[str, Any] | None) -> str:
    """What the launching thread was longest in from ``begin`` to the launch, and the operation that called it."""
    if launch is None:
        return "its launch is not in the trace"
    if launch["ts"] + launch["dur"] <= begin:
        return "had launched it before: it waits for a copy or another stream"
    until = [e for e in events if e["ts"] < launch["ts"] + launch["dur"]]
    own = [e for e in until if e.get("tid") == launch["tid"]]
    calls = [e for e in own if e.get("cat") in CALLS]  # the launch is one
    calls += [e for e in until if e.get("cat") == OVERHEAD]
    longest = max(calls, key=lambda e: e["ts"] + e["dur"] - max(e["ts"], begin))
    end = longest["ts"] + longest["dur"]
    operations = [e for e in own if e.get("cat") == "cpu_op"]
    around = [e for e in operations if e["ts"] <= longest["ts"] and e["ts"] + e["dur"] >= end]
    within = f" in {min(around, key=lambda e: e['dur'])['name'][:60]}" if around else ""
    return f"{longest['name'][:60]}{within}, {longest['dur'] / 1e3:.1f} ms"
