"""Which process this is, which device it drives, and how processes start and leave together."""

from __future__ import annotations

import datetime
import os
import sys
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from vl3train.config.choices import Device
from vl3train.config.schema import MachineConfig
from vl3train.contracts.exit_codes import FAILED, FINISHED, STOPPED, leave_code
from vl3train.contracts.progress.job import remove_record
from vl3train.data.render.processes import remove_sockets

T = TypeVar("T")

ALLOCATOR = "expandable_segments:True,pinned_use_cuda_host_register:True,pinned_num_register_threads:8"
"""PYTORCH_CUDA_ALLOC_CONF where the environment has none. Every pack has another length: without expandable segments
the freed blocks are gaps that fit no later pack. One thread page-locks 4 GiB of host memory in 2.5 s, eight threads in
0.5 s (benchmarks/log.md, round six)."""


class RunError(RuntimeError):
    """Stops a run on every rank at once. Its message is for the user and needs no traceback."""


class OneRankError(RunError):
    """Stops one rank. Other ranks may wait for it: the launcher ends them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """One data-parallel process."""

    index: int
    dp_size: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    """Of the collectives below; None: that of all that the run does."""

    @property
    def is_first(self) -> bool:
        """Whether this rank prints and writes logs for all."""
        return self.index == 0

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier(self.group)

    def agree(self, problem: str | None) -> None:
        """Raise on every rank what any rank found, so that no rank waits for one that has ended.

        Raises RunError with the first problem that any rank reports; returns where all report None.
        """
        if first := next((text for text in self.gather(problem) if text), None):
            raise RunError(first)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks."""
        found: list[T] = [value] * self.dp_size
        dist.all_gather_object(found, value, group=self.group)
        return found


def join(machine: MachineConfig) -> Rank:
    """Join the process group: nccl on GPUs, gloo on CPU. A plain ``python`` call is a group of one process."""
    cuda = machine.device is Device.cuda or (machine.device is Device.auto and torch.cuda.is_available())
    if not cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"  # otherwise DeepSpeed guesses, and warns
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        if "PYTORCH_ALLOC_CONF" not in os.environ:  # read with the first tensor
            os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", ALLOCATOR)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # Long, because rank 0 may index shards while the others wait.
        timeout = datetime.timedelta(hours=4)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        device_id = device if cuda else None
        if "MASTER_PORT" in os.environ:
            dist.init_process_group(backend, timeout=timeout, device_id=device_id)
        else:  # one process needs no port, so that runs side by side cannot collide on one
            dist.init_process_group(
                backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout, device_id=device_id
            )
    return Rank(index=dist.get_rank(), dp_size=dist.get_world_size(), device=device)


def leave(exit_code: int = FINISHED) -> NoReturn:
    """End this process after all ranks are done, through ``os._exit``.

    The destructors of a gloo group abort sometimes ("terminate called without an active exception"), which would turn a
    finished run into a failed one.
    """
    if exit_code in (FINISHED, STOPPED) and dist.is_initialized():
        try:
            dist.barrier()
        except RuntimeError as error:  # another rank failed after this one was done
            print(f"not every rank finished: {error}", file=sys.stderr)
            exit_code = FAILED
    leave_code(exit_code)
    remove_record()
    remove_sockets()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
