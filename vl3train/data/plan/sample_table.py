"""What the plan reads of an index: one entry for each usable sample, in one file that all processes of a node map.

The file is ``FOLDER/index-<index fingerprint>.arrow``. A worker gets its path in place of the arrays. It appears under
its name only when it is whole, and may be deleted while no run uses it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vl3train.contracts.files import whole_file
from vl3train.data.plan.cache import whole_size
from vl3train.data.sealed import DIGEST_BYTES, seal

MAPPED_FROM_SAMPLES = 4096
"""Smaller indexes are sent to workers as they are: under a megabyte."""

REJECTED_KEY = b"rejected"
"""Key of the samples that the index rejected, in the file's own metadata."""

INT32_COLUMNS = ("num_tokens", "num_supervised_tokens", "num_patches", "prefix_tokens")
"""Columns in the type that the plan's compiled code reads, so that it reads the mapped file itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleTable:
    """The usable samples of an index, source after source."""

    sizes: tuple[int, ...]  # samples of each source
    weights: tuple[float, ...]  # of each source
    num_tokens: np.ndarray  # (n,) integers
    num_supervised_tokens: np.ndarray  # (n,) integers
    num_patches: np.ndarray  # (n,) integers
    num_patch_pairs: np.ndarray  # (n,) integers
    fingerprint: str  # of the index
    num_items: np.ndarray | None = None  # (n,) integers: images and clips; None counts none
    shards: np.ndarray | None = None
    """(n,) integers: the shard each sample lies in, for ``OrderRules.block_shards``."""
    prefix_tokens: np.ndarray | None = None
    """(n,) integers: tokens that each sample may share with others of its family; 0 for none."""
    families: np.ndarray | None = None
    """(n,) int64, the same for samples of the same media behind the same text; 0 for those that share nothing."""
    file: Path | None = None
    """Where the arrays are mapped from. Another process gets this path in place of them."""

    def __reduce__(self) -> tuple[Any, ...]:
        if self.file is not None:
            return _mapped_table, (self.sizes, self.weights, self.fingerprint, self.file)
        fields = dataclasses.fields(self)
        return functools.partial(SampleTable, **{one.name: getattr(self, one.name) for one in fields}), ()


def _mapped_table(
    sizes: tuple[int, ...], weights: tuple[float, ...], fingerprint: str, file: Path
) -> SampleTable:
    arrays = columns(map_rows(file))
    return SampleTable(sizes=sizes, weights=weights, fingerprint=fingerprint, file=file, **arrays)


def for_the_plan(rows: pa.Table) -> pa.Table:
    """Index rows with the columns that ``columns`` reads, in the types that it needs."""
    for name in INT32_COLUMNS:
        rows = rows.set_column(rows.schema.get_field_index(name), name, rows[name].cast(pa.int32()))
    return rows.append_column("num_items", pc.list_value_length(rows["merge_sizes"]).cast(pa.int32()))


def columns(rows: pa.Table) -> dict[str, np.ndarray]:
    """The arrays of a ``SampleTable``, by field; views of a mapped file."""
    names = {name: name for name in (*INT32_COLUMNS, "num_patch_pairs", "num_items")}
    names.update(shards="shard", families="family")
    return {field: _array(rows[name]) for field, name in names.items()}


def _array(column: pa.ChunkedArray) -> np.ndarray:
    values: np.ndarray = column.chunk(0).to_numpy() if column.num_chunks == 1 else column.to_numpy()
    return values


def rows_file(folder: Path, fingerprint: str) -> Path:
    """Where the rows of an index are kept."""
    return folder / f"index-{fingerprint}.arrow"


def write_rows(file: Path, rows: pa.Table, rejected: list[tuple[str, str]]) -> None:
    """Write the rows, and key and reason of those the index rejected. Two processes at once write the same bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = rows.combine_chunks().replace_schema_metadata({REJECTED_KEY: json.dumps(rejected).encode()})
    with whole_file(file) as partial:
        with pa.OSFile(str(partial), "wb") as stream, pa.ipc.new_file(stream, rows.schema) as writer:
            writer.write_table(rows)
        seal(partial)


def is_whole(file: Path) -> bool:
    """Whether the rows are there as they were written. Who maps a damaged file may die of it."""
    return whole_size(file) is not None


def map_rows(file: Path) -> pa.Table:
    """The rows of a file that is whole; each page comes from the disk when it is first read.

    Raises:
        RuntimeError: the file is gone: it was deleted while a run used it.
    """
    try:
        content = pa.memory_map(str(file))
        return pa.ipc.open_file(content.read_buffer(file.stat().st_size - DIGEST_BYTES)).read_all()
    except FileNotFoundError:
        raise RuntimeError(
            f"{file} was deleted while a run used it. Start the run again, which writes the file, and leave the "
            "folder data.plan_cache alone meanwhile"
        ) from None


def rejected_of(rows: pa.Table) -> tuple[tuple[str, str], ...]:
    """Key and reason of the samples that the index rejected, out of a mapped file."""
    return tuple((key, reason) for key, reason in json.loads(rows.schema.metadata[REJECTED_KEY]))
