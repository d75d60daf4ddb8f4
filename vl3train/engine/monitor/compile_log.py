"""What torch.compile did since the last question, from the records that torch itself keeps.

torch has callbacks for the start and end of a compilation (``torch._dynamo.on_compile_start``), but they give neither
function nor reason. Its records give both at no cost: torch 2.11 and 2.14 write one at the end of each compilation.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vl3train.engine.monitor.console import Console

if TYPE_CHECKING:
    from torch._dynamo.utils import CompilationMetrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiles:
    """The compilations of some time.

    ``seconds`` is wall-clock: tracing, forward and backward graphs, and the tuning of Triton kernels at their first
    call. ``graphs`` counts traced functions that compute anything; a backward graph counts with its forward graph
    (torch's own counter "unique_graphs"). ``on_disk`` of them were only traced and took their code from torch's cache
    on disk. ``reasons`` has one line for each: function, seconds, and the first guard that failed of the function's
    newest graph; TORCH_LOGS=recompiles prints those of older graphs. ``breaks`` has one line for each operation that
    the tracer could not follow: that part of a layer runs uncompiled. TORCH_LOGS=graph_breaks prints where.
    """

    seconds: float = 0.0
    graphs: int = 0
    on_disk: int = 0
    reasons: tuple[str, ...] = ()
    breaks: tuple[str, ...] = ()

    def __str__(self) -> str:
        """As the console prints it, without reasons.

        >>> str(Compiles(seconds=3.21, graphs=1)), str(Compiles(seconds=40.0, graphs=8, on_disk=7))
        ('1 graph compiled in 3.2 s', '8 graphs compiled in 40.0 s, 7 of them found on disk')
        """
        found = f", {self.on_disk} of them found on disk" if self.on_disk else ""
        return f"{self.graphs} graph{'' if self.graphs == 1 else 's'} compiled in {self.seconds:.1f} s{found}"


def print_compiles(console: Console, when: str, compiles: Compiles, reasons: Sequence[str] = ()) -> None:
    """Print what was compiled, if anything was: one line, then one for each graph break and each of ``reasons``."""
    if compiles.seconds:
        console.message("\n  ".join([f"{when}: {compiles}", *compiles.breaks, *reasons]))


def take_compiles() -> Compiles:
    """Everything that this process compiled since the last call; torch then forgets it. 0.6 us where nothing was."""
    if "torch._dynamo" not in sys.modules:  # to import it takes 3 s
        return Compiles()
    from torch._dynamo.utils import clear_compilation_metrics, counters, get_compilation_metrics

    records = get_compilation_metrics()
    if not records:
        return Compiles()
    clear_compilation_metrics()
    breaks = tuple(map(_break, counters["graph_break"]))
    counters["graph_break"].clear()
    return Compiles(
        seconds=sum(map(_seconds, records)),
        # Only the record of a trace has a count: records of a backward graph, kernel tuning or a failure have none.
        graphs=sum(bool(record.graph_op_count) for record in records),
        on_disk=counters["aot_autograd"].pop("autograd_cache_hit", 0),
        reasons=_reasons(records),
        breaks=breaks,
    )


def _seconds(record: CompilationMetrics) -> float:
    return (record.duration_us or 0) / 1e6


def _reasons(records: Sequence[CompilationMetrics]) -> tuple[str, ...]:
    """One line for each graph, with the seconds of all records that share its ``compile_id``."""
    by_id: dict[str | None, list[CompilationMetrics]] = {}
    for record in records:
        by_id.setdefault(record.compile_id, []).append(record)
    lines = []
    for compile_id, of_graph in by_id.items():
        seconds = sum(map(_seconds, of_graph))
        forward = next((record for record in of_graph if record.co_name), None)
        if forward is None:  # its forward graph was compiled earlier
            lines.append(f"rest of graph {compile_id}, {seconds:.1f} s")
            continue
        name = f"{forward.co_name} ({Path(forward.co_filename or '').name}:{forward.co_firstlineno})"
        lines.append(f"{name}, {seconds:.1f} s: {_why(forward.recompile_reason)}")
    return tuple(lines)


def _break(reason: str) -> str:
    """torch's explanation in one line.

    >>> _break("Failed to trace builtin operator\\n  Explanation: Dynamo does not know `not_`.\\n  Hint: Avoid it.")
    'not compiled in one piece: Dynamo does not know `not_`.'
    """
    explained = re.search(r"Explanation: (.*)", reason)
    return f"not compiled in one piece: {explained[1] if explained else reason.splitlines()[0]}"


def _why(reason: str | None) -> str:
    """torch's reason in one line, without the graph's number before it and the stack after it.

    >>> _why("0/1: tensor 'x' requires_grad mismatch. expected requires_grad=1")
    "tensor 'x' requires_grad mismatch. expected requires_grad=1"
    >>> _why("0/0: flag == True      # return y  # layers.py:7 in f\\nUser stack trace:\\n ...")
    'flag == True # return y # layers.py:7 in f'
    """
    if reason is None:
        return "its first graph"
    first_line = reason.partition("\n")[0]
    return re.sub(r"^\S+/\d+: ", "", " ".join(first_line.split()))
