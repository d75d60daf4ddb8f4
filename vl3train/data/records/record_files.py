"""Files and data sets of records, read one record after the other. What cannot be read comes as its reason.

A record that cannot be read (a line that is no JSON, a missing column) stops nothing. ``vl3train shards --check``, and
``vl3train shards`` before it writes, report all of them together.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from vl3train.contracts.records import SampleError
from vl3train.data.records.annotations import ROLES
from vl3train.data.records.importers import IMPORTERS

RECORD_FILES = ("json", "jsonl")
DATA_FILES = ("parquet", "csv", "arrow")
KINDS_OF_SOURCES = (
    "annotations are .json (one list), .jsonl (one record a line), .parquet, .csv, .arrow, a folder, or hf:NAME of a "
    "data set on the hub"
)


def source_problems(sources: Sequence[str]) -> list[str]:
    """Which of them name nothing that is read, each with the way out; data sets of the hub are not looked up."""
    problems = []
    for source in sources:
        name = _without_importer(source)[1]
        path = Path(name)
        if name.startswith("hf:"):
            problem = "" if name.removeprefix("hf:").partition(":")[0] else "the data set's name is missing"
        elif not path.exists():
            problem = f"no such file or folder (from {Path.cwd()})"
        else:
            known = path.is_dir() or _suffix(name) in (*RECORD_FILES, *DATA_FILES)
            problem = "" if known else "a file of another kind"
        if problem:
            problems.append(f"{name}: {problem}; {KINDS_OF_SOURCES}")
    return problems


def read_annotations(
    source: str | Path, columns: dict[str, str] | None = None
) -> Iterator[tuple[str, Any | SampleError]]:
    """Records of a file or data set, each with where it stands; for one that cannot be read the reason.

    Args:
        source: ``.json`` (one list), ``.jsonl``, or what ``datasets.load_dataset`` opens: ``.parquet``,
            ``.csv``, a folder, or ``hf:NAME[:SPLIT]`` from the hub. With ``caption:`` or another name of
            data/records/importers.py before it, records of that published form.
        columns: What each column means: ``image``, ``video``, ``system``, ``user``, ``assistant``,
            ``conversations``, ``messages``. Turns come in this order. None: the columns are named so already.

    Raises:
        ValueError: there is no such file, or it cannot be opened; an unknown meaning.
    """
    if problems := source_problems([str(source)]):
        raise ValueError(problems[0])
    meanings = {"image", "video", "conversations", "messages", *ROLES.values()}
    if columns and (unknown := sorted(set(columns.values()) - meanings)):
        raise ValueError(f"columns mean {unknown}; known meanings: {sorted(meanings)}")
    name, path = _without_importer(str(source))
    for where, row in _rows(path):
        if isinstance(row, SampleError):
            yield where, row
        elif name:
            yield where, _imported(name, row)
        else:
            yield where, row if columns is None else _mapped(row, columns)


def _without_importer(source: str) -> tuple[str, str]:
    """The importer's name, or nothing, and the rest."""
    name, colon, path = source.partition(":")
    return (name, path) if colon and name in IMPORTERS else ("", source)


def _suffix(source: str) -> str:
    return PurePath(source).suffix.lower().removeprefix(".")


def _imported(name: str, row: Any) -> Any | SampleError:
    try:
        return IMPORTERS[name](row)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        return SampleError(f"no {name} record: {error!r}")


def _mapped(row: Any, columns: Mapping[str, str]) -> Any | SampleError:
    if not isinstance(row, Mapping):
        return row  # write_shards rejects it by its type
    if missing := [name for name in columns if name not in row]:
        return SampleError(
            f"no column {missing}; there are {sorted(row)}; --columns says which there should be"
        )
    record: dict[str, Any] = {}
    for name, meaning in columns.items():
        if meaning in ROLES:
            record.setdefault("messages", []).append({"role": meaning, "content": row[name]})
        else:
            record[meaning] = row[name]
    return record


def _rows(source: str) -> Iterator[tuple[str, Any | SampleError]]:
    if _suffix(source) == "jsonl":
        with open(source, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{source}:{number}", _parsed(line)
    elif _suffix(source) == "json":
        records = _parsed(Path(source).read_bytes())
        if isinstance(records, SampleError):
            yield source, SampleError(f"{records}; a file with one record a line is called .jsonl")
        elif not isinstance(records, list):
            yield (
                source,
                SampleError("holds no list of records; a file with one record a line is called .jsonl"),
            )
        else:
            yield from ((f"{source}[{number}]", record) for number, record in enumerate(records))
    else:
        from datasets.exceptions import DatasetsError

        try:
            yield from ((f"{source}[{number}]", row) for number, row in enumerate(_opened_dataset(source)))
        except (DatasetsError, ValueError, OSError) as error:
            raise ValueError(f"{source} cannot be read: {error}") from error


def _parsed(text: bytes) -> Any | SampleError:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        return SampleError(f"no JSON, line {error.lineno} column {error.colno}: {error.msg}")
    except UnicodeDecodeError as error:
        return SampleError(f"no UTF-8 text, byte {error.start}: {error.reason}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested as deep
        return SampleError(f"no JSON that can be read: {error}")


def _opened_dataset(source: str) -> Any:
    """Rows of what ``datasets`` opens, streamed; images stay files' bytes."""
    import datasets

    if source.startswith("hf:"):
        name, _, split = source.removeprefix("hf:").partition(":")
        rows = datasets.load_dataset(name, split=split or "train", streaming=True)
    elif (builder := _suffix(source)) in DATA_FILES:
        rows = datasets.load_dataset(builder, data_files=source, split="train", streaming=True)
    else:
        rows = datasets.load_dataset(source, split="train", streaming=True)
    for name, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
        elif isinstance(feature, (datasets.Sequence, datasets.List)) and isinstance(
            feature.feature, datasets.Image
        ):
            rows = rows.cast_column(name, datasets.List(datasets.Image(decode=False)))
    return rows
