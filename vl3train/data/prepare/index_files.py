"""The files of an index: for each shard its rows and its entry of the manifest, and the manifest over all of them.

Each appears whole. The digest of the rows stands in the entry; entry and manifest have their own. What is damaged is
told, and made again from what is whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vl3train.contracts.files import whole_file
from vl3train.contracts.redaction import shown_address
from vl3train.data.sealed import DamagedFileError, file_digest, read_sealed_json, write_sealed_json
from vl3train.data.shards.index import SCHEMA, USABLE
from vl3train.data.shards.manifest import MANIFEST, IndexPlace, MissingIndexError, check_rows, rows_path
from vl3train.data.shards.remote import address_of


def is_current(place: IndexPlace, shard: Path, decode: bool, damaged: list[str]) -> bool:
    """Whether the rows of a shard are there, whole, and still those of the shard. What is damaged is added in words."""
    try:
        entry = read_sealed_json(_entry_path(place, shard))
        facts = entry.pop("facts")
        if facts != _facts(place, shard) or (decode and not entry["decoded"]):
            return False
        check_rows(place.folder, entry)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (DamagedFileError, MissingIndexError, OSError) as error:
        damaged.append(f"{str(error).partition(';')[0]}; it is made again")
        return False
    return True


def write_rows(place: IndexPlace, shard: Path, rows: list[dict[str, Any]], decoded: bool) -> None:
    """Write the rows of a shard, then its entry: what they are of, how many, and their digests."""
    table, path = pa.Table.from_pylist(rows, SCHEMA), rows_path(place.folder, shard.name)
    _entry_path(place, shard).unlink(missing_ok=True)  # an old entry would call the new rows damaged
    with whole_file(path) as partial:
        pq.write_table(table, partial)
        digest = file_digest(partial)
    entry = {
        "name": shard.name,
        "bytes": shard.stat().st_size if shard.is_file() else None,
        "samples": table.num_rows,
        "rejected": sum(row["status"] != USABLE for row in rows),
        "unread_parts": Counter(name.rpartition(".")[2] for row in rows for name in row["unread_parts"]),
        "remarks": Counter(remark for row in rows for remark in row["remarks"]),
        # Without remarks: those of decoded samples are more exact, and the samples are the same.
        "rows_sha256": rows_digest(table.drop_columns(["remarks"])),
        "file_sha256": digest,
        "decoded": decoded,
        "facts": _facts(place, shard),
    }
    write_sealed_json(_entry_path(place, shard), entry)


def write_manifest(place: IndexPlace, shards: Sequence[Path]) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Written last: its presence says that the index is complete. Returns the one before, if it is whole, and it."""
    try:
        before = read_sealed_json(place.folder / MANIFEST)
    except (OSError, DamagedFileError):
        before = None
    content = {
        "settings": dataclasses.asdict(place.settings),
        "limits": dataclasses.asdict(place.limits),
        "shards": [read_sealed_json(_entry_path(place, shard)) for shard in shards],
    }
    write_sealed_json(place.folder / MANIFEST, content)
    return before, content


def rows_digest(table: pa.Table) -> str:
    """sha256 of the values, in hex: the same for equal rows, whatever version wrote the file they lie in."""
    digest = hashlib.sha256()
    for column in table.itercolumns():
        values = column.combine_chunks()
        if pa.types.is_list(values.type):
            digest.update(pc.list_value_length(values).to_numpy(zero_copy_only=False).tobytes())
            values = pc.list_flatten(values)
        if pa.types.is_string(values.type):
            digest.update(pc.binary_length(values).to_numpy(zero_copy_only=False).tobytes())
            digest.update("".join(values.to_pylist()).encode())
        else:
            digest.update(values.to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


def _entry_path(place: IndexPlace, shard: Path) -> Path:
    return place.folder / f"{shard.name}.json"


def _facts(place: IndexPlace, shard: Path) -> dict[str, Any]:
    """What decides whether rows are still those of the shard.

    Of a remote shard the address, without its signature: requests for all sizes would take minutes. A shard that was
    replaced under the same address is found by crc32 when its samples are read. Of what is no file, nothing.
    """
    limits = dataclasses.asdict(place.limits)
    address = address_of(shard)
    if address is not None:
        return {"address": shown_address(address), "limits": limits}
    stat = shard.stat() if shard.is_file() else None
    return {"bytes": stat and stat.st_size, "mtime_ns": stat and stat.st_mtime_ns, "limits": limits}
