"""Files and data sets of records, read one record after the other. What cannot be read comes as its reason.

A record that cannot be read (a line that is no JSON, a missing column) stops nothing. ``vl3train shards --check``, and
``vl3train shards`` before it writes, report all of them together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from vl3train.contracts.records import SampleError
from vl3train.contracts.redaction import without_keys
from vl3train.data.records.forms import DIALOGUE_KEYS, ROLES
from vl3train.data.records.importers import IMPORTERS
from vl3train.data.records.media_files import is_nothing
from vl3train.data.records.text_files import read_table, read_text_file, text_suffix
from vl3train.data.shards.tar_headers import CLIP_SUFFIXES, IMAGE_SUFFIXES

TABLE_BUILDERS = ("parquet", "arrow")
"""Suffixes of files that ``datasets`` opens by a builder of that name."""
IGNORE = "ignore"
"""Meaning of a column that is left out."""
MEANINGS = ("image", "video", "conversations", "messages", "system", "user", "assistant", IGNORE)
KINDS_OF_SOURCES = (
    "annotations are .json (a list), .jsonl (one record a line), .csv, .tsv, these with .gz, .zst, .bz2 or .xz behind, "
    ".parquet, .arrow, a folder, or hf:NAME of a data set on the hub"
)

KINDS_IN_FOLDERS = (
    "records: annotations (.jsonl, .json, .csv, .parquet, ...), a data set that `datasets` saved, or pictures and "
    "clips with metadata.jsonl"
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
            known = path.is_dir() or text_suffix(name) or _suffix(name) in TABLE_BUILDERS
            problem = "" if known else "a file of another kind"
        if problem:
            problems.append(f"{without_keys(name)}: {problem}; {KINDS_OF_SOURCES}")
    return problems


def source_folders(sources: Sequence[str]) -> list[Path]:
    """The folders among them. Media in a folder that is named as a data set may be read."""
    return [path for source in sources if (path := Path(_without_importer(source)[1])).is_dir()]


def read_annotations(
    source: str | Path, columns: dict[str, str] | None = None, others: Sequence[str] = ()
) -> Iterator[tuple[str, Any | SampleError]]:
    """Records of a file or data set, each with where it stands; for one that cannot be read the reason.

    Args:
        source: a file of text (``text_files``), or what ``datasets`` opens: ``.parquet``, ``.arrow``, a folder, or
            ``hf:NAME[:SPLIT]`` from the hub. With ``caption:`` or another name of data/records/importers.py
            before it, records of that published form.
        columns: What each column means, one of MEANINGS. Turns come in this order. Columns that are not named keep
            their own names. None: the columns are named so already.
        others: sources that are named with this one; questions find their answers there.

    Raises:
        ValueError: there is no such file, or it cannot be opened; an unknown meaning.
    """
    if problems := source_problems([str(source)]):
        raise ValueError(problems[0])
    if columns and (unknown := sorted(set(columns.values()) - set(MEANINGS))):
        raise ValueError(f"columns mean {unknown}; known meanings: {sorted(MEANINGS)}")
    name, path = _without_importer(str(source))
    in_text = not path.startswith("hf:") and text_suffix(path) and Path(path).is_file()
    rows = (
        read_text_file(path, [_without_importer(other)[1] for other in others])
        if in_text
        else _data_set(path)
    )
    for where, row in rows:
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
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        return SampleError(f"no {name} record: {error!r}")


def _mapped(row: Any, columns: Mapping[str, str]) -> Any | SampleError:
    """A row with its columns named by their meanings. Turns of its own give way to the turns that columns name."""
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
        elif meaning != IGNORE:
            record[meaning] = row[name]
    turns = DIALOGUE_KEYS if any(key in record for key in DIALOGUE_KEYS) else ()
    if "system" in columns.values():
        turns = (*turns, "system")
    return {
        **{name: row[name] for name in row if name not in columns and name not in (*record, *turns)},
        **record,
    }


def _data_set(source: str) -> Iterator[tuple[str, Any | SampleError]]:
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError, DatasetsError

    if not source.startswith("hf:") and (listed := _metadata(Path(source))):
        yield from _with_media(read_text_file(str(listed)), listed.parent)
        return
    try:
        yield from _opened_data_set(source)
    except (DataFilesNotFoundError, EmptyDatasetError) as error:
        if source.startswith("hf:"):
            raise ValueError(f"{source} has no files of records that `datasets` reads") from error
        raise ValueError(f"{source} is a folder without {KINDS_IN_FOLDERS}{_inside(Path(source))}") from error
    except (DatasetsError, ValueError, OSError, ImportError) as error:
        raise ValueError(f"{source} cannot be read: {error}") from error


def _inside(folder: Path) -> str:
    """What a folder has instead, as the end of a sentence."""
    names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir())
    if not names:
        return "; it is empty"
    return (
        f"; it has {', '.join(names[:5])}{' and others' if len(names) > 5 else ''}. Name the file of records"
    )


def _metadata(folder: Path) -> Path | None:
    """The file that describes a folder of pictures or clips, as ``datasets`` names it; None without one."""
    names = (
        part / f"metadata.{suffix}" for part in (folder, folder / "train") for suffix in ("jsonl", "csv")
    )
    return next((name for name in names if name.is_file()), None)


def _with_media(rows: Iterator[tuple[str, Any]], folder: Path) -> Iterator[tuple[str, Any | SampleError]]:
    """Rows of such a file with ``file_name`` as ``image`` or ``video``, ``x_file_name`` as ``x``; lists likewise."""
    for where, row in rows:
        if not isinstance(row, Mapping):
            yield where, row
            continue
        found: dict[str, Any] = {}
        for name, value in row.items():
            stem = re.fullmatch(r"(?:(.*)_)?file_names?", name)
            if not stem or is_nothing(value):
                found[name] = value
                continue
            paths = [str(folder / str(one)) for one in (value if isinstance(value, list) else [value])]
            suffixes = {_suffix(path) for path in paths}
            kind = (
                "image"
                if suffixes <= IMAGE_SUFFIXES
                else "video"
                if suffixes <= CLIP_SUFFIXES
                else "file_name"
            )
            found[stem[1] or kind] = paths if isinstance(value, list) else paths[0]
        yield where, found


def _opened_data_set(source: str) -> Iterator[tuple[str, Any | SampleError]]:
    """Rows of what ``datasets`` opens, streamed. Media stay files or bytes, however deep in a row they are.

    It would decode them by libraries of its own, clips and sound by torchcodec.
    """
    import datasets
    import fsspec
    from datasets.packaged_modules.csv.csv import CsvConfig

    if _suffix(source) in TABLE_BUILDERS and Path(source).is_file():
        rows = datasets.load_dataset(_suffix(source), data_files=source, split="train", streaming=True)
    elif (Path(source) / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(source)
        if "train" not in splits and len(splits) > 1:
            folders = ", ".join(str(Path(source) / name) for name in splits)
            raise ValueError(f"it has no split `train`; name one of {folders}")
        rows = splits["train" if "train" in splits else next(iter(splits))].to_iterable_dataset()
    elif (Path(source) / "state.json").is_file():
        rows = datasets.load_from_disk(source).to_iterable_dataset()
    else:
        name, _, split = (
            source.removeprefix("hf:").partition(":") if source[:3] == "hf:" else (source, "", "")
        )
        config = datasets.load_dataset_builder(name).config
        if isinstance(config, CsvConfig):  # it would guess numbers and what is missing
            for path in map(str, config.data_files[split or "train"]):
                with fsspec.open(path, "rb", compression="infer") as file:
                    yield from read_table(path, file)
            return
        rows = datasets.load_dataset(name, split=split or "train", streaming=True)
    rows = rows.decode(False) if rows.features else rows
    yield from ((f"{source}[{number}]", row) for number, row in enumerate(rows))
