"""Kernels are compiled and compared with float64 by several processes at once, while a run reads its data and weights.

On a machine that has compiled nothing yet, one process after the other would take a minute and more for it. Each of
these proves a share and keeps what was right (contracts/kept.py). The run then finds that, and what was compiled, on
the disk. Where one of them fails, the run proves its share itself and says what is wrong: they only come before it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from vl3train.config.choices import GemmBackend
from vl3train.config.schema import TrainConfig
from vl3train.contracts.kept import keep, read_kept
from vl3train.contracts.shapes import ENCODER, LANGUAGE_MODELS, TowerShape
from vl3train.contracts.strict_json import json_text
from vl3train.model.attention.backends import choose_attention
from vl3train.model.attention.check import proven_kernel
from vl3train.model.kernels.check import proven_gemms, why_not_quack
from vl3train.model.machine_key import machine_key

GEMM_PROCESSES = 3
"""For the matrix products of each tower: eight to twelve ops, each of which takes seconds to compile."""
LONGEST_SECONDS = 300.0
"""For all of it; then the run proves what is missing itself."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The kernels that a run will use."""

    shapes: tuple[TowerShape, ...]
    device: str
    dtype: str  # of torch, without "torch."
    attention: str  # as machine.attention has it
    gemms: bool  # whether quack is to serve where it can
    shares_prefix: bool

    def shares(self) -> list[tuple[str, int, int]]:
        """What each process proves: attention or matrix products, of which tower, which part of them."""
        towers = range(len(self.shapes))
        parts = range(GEMM_PROCESSES if self.gemms else 0)
        return [("attention", t, 0) for t in towers] + [("gemms", t, part) for t in towers for part in parts]


@dataclass(frozen=True)
class Proving:
    """Processes that prove kernels; none where all were right before."""

    key: dict[str, Any] = field(default_factory=dict)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def wait(self) -> None:
        """Return when all have ended. Remember where all were right: no process is started then next time."""
        if not self.processes:
            return
        end = time.monotonic() + LONGEST_SECONDS
        codes = []
        for process in self.processes:
            try:
                codes.append(process.wait(max(0.0, end - time.monotonic())))
            except subprocess.TimeoutExpired:
                process.kill()
                codes.append(process.wait())
            assert process.stdin is not None, "it was opened"
            process.stdin.close()
        if not any(codes):
            keep(self.key, True)


def prove_early(cfg: TrainConfig, device: torch.device) -> Proving:
    """``start_proving`` for a run whose model is of a published size, on a GPU; once for all ranks of a node."""
    language_model, machine = LANGUAGE_MODELS.get(cfg.model.name), cfg.machine
    if device.type != "cuda" or language_model is None or os.environ.get("LOCAL_RANK", "0") != "0":
        return Proving()
    wanted = Wanted(
        shapes=(ENCODER, language_model),
        device=str(device),
        dtype=machine.dtype.value,
        attention=machine.attention.value,
        gemms=machine.compile_layers and machine.gemm_backend is not GemmBackend.torch,
        shares_prefix=cfg.data.share_prefix,
    )
    return start_proving(wanted)


def start_proving(wanted: Wanted) -> Proving:
    """Start a process for each share, unless all were right on this machine before."""
    key = {"all of": asdict(wanted), **machine_key(torch.device(wanted.device))}
    if read_kept(key) is True:
        return Proving()
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "vl3train.model.kernels.prove",
                json_text(asdict(wanted)),
                json_text(share),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # the run says it better: it proves again what was not right
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # a Ctrl-C is for the run
        )
        for share in wanted.shares()
    ]
    return Proving(key, processes)


def prove(wanted: Wanted, what: str, tower: int, part: int) -> bool:
    """Prove one share; whether all of it was right."""
    shape, device, dtype = wanted.shapes[tower], torch.device(wanted.device), getattr(torch, wanted.dtype)
    if what == "attention":
        head_dims = [one.head_dim for one in wanted.shapes]
        backend = choose_attention(wanted.attention, device, head_dims, dtype).name
        return proven_kernel(backend, device, shape, dtype, shares_prefix=wanted.shares_prefix).is_right
    if why_not_quack(wanted.shapes, device, dtype, compiled=True) is not None:
        return True  # torch serves
    return all(
        found.is_right for found in proven_gemms(shape, device, dtype, part=part, parts=GEMM_PROCESSES)
    )


def main(wanted: str, share: str) -> int:
    """A process of ``start_proving``; it ends with the one that started it."""
    threading.Thread(target=_end_with_input, daemon=True).start()
    given = json.loads(wanted)
    shapes = tuple(TowerShape(**shape) for shape in given.pop("shapes"))
    return int(not prove(Wanted(shapes=shapes, **given), *json.loads(share)))


def _end_with_input() -> None:
    os.read(0, 1)  # nothing is written: it returns when the other end is closed
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
