"""Copies of a state in the host's memory: training goes on while they are written to the disk."""

from __future__ import annotations

import contextlib
import copy
import mmap
import threading
import weakref
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes: of a cache line, and a multiple of every dtype's size."""


class HostCopies:
    """The copies of one save at a time, in memory that is set aside for them or, where that ends, in new memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._reserved: PageLocked | None = None
        self._used = 0  # bytes of it

    def reserve(self, num_bytes: int) -> None:
        """Set memory aside for copies of ``num_bytes``, in a thread: to page-lock 26 GiB takes ten seconds.

        A copy within it waits for that thread.
        """
        self._reserved = PageLocked(num_bytes + num_bytes // 100 + 2**20, self._device)
        weakref.finalize(self, self._reserved.unlock).atexit = False  # a process that ends gives back all

    @property
    def problem(self) -> str | None:
        """Why the memory that is set aside is not page-locked, though the device asks for that."""
        return None if self._reserved is None else self._reserved.problem

    def begin(self) -> None:
        """A save begins: the copies of the one before are void."""
        self._used = 0

    def copy(self, value: Any) -> Any:
        """The same value, with each tensor a contiguous copy on the host. ``finish`` says when they are filled.

        Tensors that are one in ``value`` are one in the copy, so that a file holds them once.
        """
        return self._copy(value, {})

    def _copy(self, value: Any, copied: dict[tuple[Any, ...], Tensor]) -> Any:
        if isinstance(value, Tensor):
            key = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
            if key not in copied or not value.numel():
                copied[key] = self._tensor(value.detach())
            return copied[key]
        if isinstance(value, dict):
            return {key: self._copy(item, copied) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copy(item, copied) for item in value)
        return copy.deepcopy(value)

    def finish(self) -> None:
        """Return when all copies are filled."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def _tensor(self, tensor: Tensor) -> Tensor:
        out = self._take(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
        return out.copy_(tensor, non_blocking=True)

    def _take(self, num_bytes: int) -> Tensor:
        """Bytes that nothing of this save has, as a storage of their own: torch.save writes whole storages."""
        begin, end = self._used, self._used + num_bytes
        if not num_bytes or self._reserved is None or end > self._reserved.num_bytes:
            return torch.empty(num_bytes, dtype=torch.uint8)
        self._used = end + -end % ALIGNMENT
        return self._reserved.part(begin, num_bytes)


class PageLocked:
    """Memory of the host in pages of its own, locked where ``device`` is a GPU: it writes to them at its link's rate.

    Not from torch's allocator, which takes the next power of two. And not from malloc, whose areas share pages: CUDA
    refuses to lock a page twice, and to copy to an area of which a part is locked.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.num_bytes = num_bytes
        self.problem: str | None = None
        self._device = device
        self._area = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._bytes = torch.frombuffer(self._area, dtype=torch.uint8)
        self._is_locked = False
        self._thread = threading.Thread(target=self._lock, name="page-lock", daemon=True)
        self._thread.start()

    def part(self, begin: int, num_bytes: int) -> Tensor:
        """Bytes of it, as a tensor with a storage of its own."""
        self._thread.join()
        return torch.frombuffer(self._area, dtype=torch.uint8, count=num_bytes, offset=begin)

    def unlock(self) -> None:
        """Give the pages back to the host's memory manager, before they are freed."""
        self._thread.join()
        if self._is_locked:
            self._is_locked = False
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr())))

    def _lock(self) -> None:
        if self._device.type != "cuda":
            return
        with contextlib.suppress(OSError):  # of a kernel that has none
            self._area.madvise(mmap.MADV_HUGEPAGE)  # 512 times fewer pages to lock
        self._bytes.zero_()  # the kernel hands pages out when they are written
        torch.cuda.set_device(self._device)  # of this thread: else CUDA starts on the first GPU
        error = torch.cuda.cudart().cudaHostRegister(self._bytes.data_ptr(), self.num_bytes, 0)
        self._is_locked = int(error) == 0
        self.problem = None if self._is_locked else str(error)
