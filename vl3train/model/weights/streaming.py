"""Weights written from one set of files to another, tensor by tensor: at most one shard is in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vl3train.model.weights.headers.files import BITS, StoredTensor
from vl3train.model.weights.hf_folder import WrongExport

SHARD_BYTES = 5 * 10**9
"""Bytes of a written file at most, as transformers does; one tensor may be larger."""


class Source(NamedTuple):
    """Where a weight is read: its file, its name there, and what the header says of it."""

    file: Path
    name: str
    stored: StoredTensor

    @property
    def num_bytes(self) -> int:
        """Of the tensor."""
        return math.prod(self.stored.shape) * BITS[self.stored.dtype] // 8


class Reader:
    """Opens weight files when they are asked for, safetensors and pickles of torch; no code of theirs is run."""

    def __init__(self) -> None:
        self._files: dict[Path, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.clear()
        self._stack.close()

    def tensor(self, source: Source) -> Tensor:
        """The tensor itself, in memory of its own."""
        if source.file not in self._files:
            self._files[source.file] = (
                torch.load(source.file, map_location="cpu", weights_only=True, mmap=True)
                if source.file.suffix == ".bin"
                else self._stack.enter_context(safe_open(source.file, framework="pt"))
            )
        opened = self._files[source.file]
        if isinstance(
            opened, dict
        ):  # clones: tensors of a pickle may share memory, which safetensors refuses
            return opened[source.name].detach().clone().contiguous()
        return opened.get_tensor(source.name)


def write_weights(
    weights: dict[str, Source], folder: Path, *, shard_bytes: int, progress: Callable[[str], None]
) -> None:
    """Write ``weights`` as safetensors, in shards with an index where one file would be too large.

    Each shard is read back and compared to the byte. Raises WrongExport where the disk gives back other bytes.
    """
    shards = list(_shards(weights, shard_bytes))
    total = sum(source.num_bytes for source in weights.values())
    written, places = 0, {}
    with Reader() as reader:
        for number, names in enumerate(shards, 1):
            file = folder / (
                "model.safetensors"
                if len(shards) == 1
                else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            )
            tensors = {name: reader.tensor(weights[name]) for name in names}
            save_file(tensors, file, metadata={"format": "pt"})
            _compare(file, tensors)
            places.update(dict.fromkeys(names, file.name))
            written += sum(weights[name].num_bytes for name in names)
            progress(f"{number} of {len(shards)} files, {written / 2**30:.1f} of {total / 2**30:.1f} GiB")
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _shards(weights: dict[str, Source], shard_bytes: int) -> Iterator[list[str]]:
    """Names in the order of the files they are read from, in groups of at most ``shard_bytes``."""
    names: list[str] = []
    size = 0
    for name, source in sorted(weights.items(), key=lambda one: (one[1].file.name, one[0])):
        if names and size + source.num_bytes > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += source.num_bytes
    yield names


def _compare(file: Path, tensors: dict[str, Tensor]) -> None:
    with safe_open(file, framework="pt") as written:
        for name, tensor in tensors.items():
            found = written.get_tensor(name)
            if found.dtype != tensor.dtype or not torch.equal(
                found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
            ):
                raise WrongExport(
                    f"{file.name}: {name} is not what was written: the disk or memory is at fault"
                )
