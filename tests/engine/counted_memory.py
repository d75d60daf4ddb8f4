"""A CPU's stand-in for a GPU's counters: every tensor made within it is counted until it is let go."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vl3train.model.activations import offload


class CountedMemory(TorchDispatchMode):
    """An engine.device_memory.DeviceMemory of ``device_bytes``, all but ``margin_bytes`` of which may be used."""

    def __init__(
        self, device_bytes: int, margin_bytes: int = 0, *, there: Iterable[torch.Tensor] = ()
    ) -> None:
        """``there`` are the tensors that exist already: weights, the batch."""
        super().__init__()
        self.device_bytes, self.margin_bytes = device_bytes, margin_bytes
        self._sizes: dict[int, int] = {}
        self._held = self._peak = 0
        self._on_host = False
        for tensor in there:
            self._count(tensor.untyped_storage())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def __enter__(self) -> CountedMemory:
        self._buffer = offload.host_buffer
        offload.host_buffer = self._uncounted
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        offload.host_buffer = self._buffer
        super().__exit__(*error)

    def _uncounted(self, rows: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """What would lie in the host's memory beside a GPU's."""
        self._on_host = True
        try:
            return self._buffer(rows, dtype)
        finally:
            self._on_host = False

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = 0 if self._on_host else storage.nbytes()
        self._held += self._sizes[key]
        self._peak = max(self._peak, self._held)
        weakref.finalize(storage, self._forget, key)
        if self._held > self.device_bytes:
            raise torch.OutOfMemoryError(f"{self._held} of {self.device_bytes} bytes")

    def _forget(self, key: int) -> None:
        self._held -= self._sizes.pop(key)

    def limit(self) -> int:
        return self.device_bytes - self.margin_bytes

    def held(self) -> int:
        return self._held

    def peak(self) -> int:
        return self._peak

    def reset_peak(self) -> None:
        self._peak = self._held
