"""The rows of an index in one file that all processes of a node map into memory; workers are sent its path.

``FOLDER/index-<index fingerprint>.arrow``. It appears under its name only when it is whole, and may be deleted
while no run uses it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

MAPPED_FROM_SAMPLES = 4096
"""Smaller indexes are sent to workers as they are: under a megabyte."""

REFUSED = b"refused"
"""Key of the samples that cannot be used, in the file's own metadata."""

NARROW = ("num_tokens", "num_supervised_tokens", "num_patches")
"""Columns in the width that the plan's compiled code reads, so that it reads the file itself."""


def for_the_plan(rows: pa.Table) -> pa.Table:
    """Index rows with the columns that ``columns`` reads, as narrow as they may be."""
    for name in NARROW:
        rows = rows.set_column(rows.schema.get_field_index(name), name, rows[name].cast(pa.int32()))
    return rows.append_column("num_items", pc.list_value_length(rows["merge_sizes"]).cast(pa.int32()))


def columns(rows: pa.Table) -> dict[str, np.ndarray]:
    """What a ``SampleTable`` has for each sample; views of a mapped file."""
    names = (*NARROW, "num_patch_pairs", "num_items", "shard")
    found = {name: _array(rows[name]) for name in names}
    return {**{name: found[name] for name in names[:-1]}, "shards": found["shard"]}


def _array(column: pa.ChunkedArray) -> np.ndarray:
    values: np.ndarray = column.chunk(0).to_numpy() if column.num_chunks == 1 else column.to_numpy()
    return values


def rows_file(folder: Path, fingerprint: str) -> Path:
    """Where the rows of an index are kept."""
    return folder / f"index-{fingerprint}.arrow"


def write_rows(file: Path, rows: pa.Table, refused: list[tuple[str, str]]) -> None:
    """Write them; of two processes that do so at once both write the same."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    rows = rows.combine_chunks().replace_schema_metadata({REFUSED: json.dumps(refused).encode()})
    with pa.OSFile(str(partial), "wb") as stream, pa.ipc.new_file(stream, rows.schema) as writer:
        writer.write_table(rows)
    partial.replace(file)


def map_rows(file: Path) -> pa.Table:
    """The rows, read from the disk as they are looked at.

    Raises:
        RuntimeError: the file is gone: it was deleted while a run used it.
    """
    try:
        return pa.ipc.open_file(pa.memory_map(str(file))).read_all()
    except FileNotFoundError:
        raise RuntimeError(
            f"{file} is gone, a run still uses it; start the run again, it writes the file again, and leave the "
            "folder data.plan_cache alone meanwhile"
        ) from None


def refused_of(rows: pa.Table) -> tuple[tuple[str, str], ...]:
    """Key and reason of the samples that the index refused, out of a mapped file."""
    return tuple((key, reason) for key, reason in json.loads(rows.schema.metadata[REFUSED]))
