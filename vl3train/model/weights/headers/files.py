"""Which weight files a folder has, and the names, dtypes and shapes of the tensors in them, from headers alone."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from vl3train.model.weights.headers.faults import COPY_ONE, LFS_MARK, Fault, listed, read_object, unfetched
from vl3train.model.weights.headers.pickled import read_pickled

BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64"), 64),
}
"""Bits of a value by the dtype's name in safetensors."""

FORMS = (("model", "safetensors"), ("pytorch_model", "bin"))
"""Names of weight files, in the order in which transformers looks for them: one file, else an index and its shards."""

MAX_HEADER = 100_000_000
"""Bytes; safetensors refuses a longer header."""

COPY_ALL = "copy or download them again, or take an older checkpoint of the run"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it, such as BF16
    file: str


@dataclass(slots=True)
class StoredWeights:
    """All tensors of a folder that can be read, and what cannot be."""

    files: list[Path] = field(default_factory=list)  # that hold the weights, and exist
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)  # tensors of the index whose file is missing or damaged
    has_index: bool = True  # False: several files without the index that transformers needs
    complete: bool = True  # False: a file is missing or damaged, and no index says what was in it
    faults: list[Fault] = field(default_factory=list)


def read_stored(folder: Path) -> StoredWeights:
    """The tensors in a folder's weight files, and every file that is missing, cut off or damaged."""
    stored = StoredWeights()
    for stem, suffix in FORMS:
        if (folder / f"{stem}.{suffix}").is_file():
            _add_files(stored, [folder / f"{stem}.{suffix}"], {})
            return stored
        index = folder / f"{stem}.{suffix}.index.json"
        if index.is_file():
            _add_indexed(stored, folder, index)
            return stored
        if shards := sorted(folder.glob(f"{stem}-*-of-*.{suffix}")):
            _add_unindexed(stored, shards)
            return stored
    linked = [file.name for file in folder.glob("*.safetensors") if file.is_symlink() and not file.exists()]
    dangling = f" ({listed(linked)}: a link to a file that does not exist)" if linked else ""
    found = [
        file.name for file in folder.glob("*") if file.suffix in (".safetensors", ".bin", ".pt", ".gguf")
    ]
    found_text = f", only {listed(found)}" if found and not linked else ""
    stored.complete = False
    stored.faults.append(
        Fault(
            f"holds no weights{dangling}{found_text}: neither model*.safetensors nor pytorch_model*.bin",
            "copy or download the weights into it",
        )
    )
    return stored


def adapter_faults(folder: Path) -> list[Fault]:
    """What is wrong with the weight file of a folder of adapters."""
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        return [Fault(f"holds no {file.name}", COPY_ALL)]
    _, fault = tensors_of(file)
    return [] if fault is None else [fault]


def _add_indexed(stored: StoredWeights, folder: Path, index: Path) -> None:
    content, fault = read_object(index)
    places = content.get("weight_map")
    if fault is None and not (isinstance(places, dict) and all(isinstance(f, str) for f in places.values())):
        fault = Fault(f"{index.name} has no weight_map of names and files", COPY_ONE)
    if fault is not None:
        stored.complete = False
        stored.faults.append(fault)
        return
    assert isinstance(places, dict)
    names = sorted(set(places.values()))
    if outside := [name for name in names if Path(name).name != name]:
        stored.complete = False
        stored.faults.append(
            Fault(f"{index.name} names files outside its folder: {listed(outside)}", COPY_ONE)
        )
        return
    if missing := [name for name in names if not (folder / name).is_file()]:
        what = f"{len(missing)} of {len(names)} weight files named by {index.name} are missing: {listed(missing)}"
        stored.faults.append(Fault(what, COPY_ALL))
        stored.lost |= {tensor for tensor, name in places.items() if name in missing}
    _add_files(stored, [folder / name for name in names if name not in missing], places)
    elsewhere = {
        tensor
        for tensor, name in places.items()
        if tensor not in stored.lost and (tensor not in stored.tensors or stored.tensors[tensor].file != name)
    }
    if elsewhere:
        what = f"{index.name} names tensors that are not in the files it says: {listed(elsewhere)}"
        stored.faults.append(Fault(what, COPY_ALL))
        stored.lost |= elsewhere


def _add_unindexed(stored: StoredWeights, shards: list[Path]) -> None:
    numbers = [re.search(r"-(\d+)-of-(\d+)\.", shard.name) for shard in shards]
    total = max((int(found[2]) for found in numbers if found), default=0)
    if lacking := sorted(set(range(1, total + 1)) - {int(found[1]) for found in numbers if found}):
        what = f"weight files {listed(map(str, lacking))} of {total} are missing, and so is their index"
        stored.faults.append(Fault(what, COPY_ALL))
        stored.complete = False
    stored.has_index = False
    _add_files(stored, shards, {})


def _add_files(stored: StoredWeights, files: list[Path], places: dict[str, str]) -> None:
    """Add the tensors of ``files``; ``places`` are the index's, by tensor."""
    for file in files:
        stored.files.append(file)
        tensors, fault = tensors_of(file)
        if fault is not None:
            stored.faults.append(fault)
            stored.complete = stored.complete and bool(places)
            stored.lost |= {name for name, place in places.items() if place == file.name}
        stored.tensors |= tensors


def tensors_of(file: Path) -> tuple[dict[str, StoredTensor], Fault | None]:
    """The tensors of one weight file by name; empty with the reason why it cannot be used."""
    try:
        with file.open("rb") as stream:
            if stream.read(len(LFS_MARK)) == LFS_MARK:
                return {}, unfetched(file)
        if file.suffix == ".bin":
            pickled, fault = read_pickled(file)
            return {
                name: StoredTensor(one.shape, one.dtype, file.name) for name, one in pickled.items()
            }, fault
        return _safetensors_header(file)
    except OSError as error:
        return {}, Fault(f"{file.name} cannot be read ({error.strerror})", COPY_ONE)


def _safetensors_header(file: Path) -> tuple[dict[str, StoredTensor], Fault | None]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 2 <= length <= MAX_HEADER:
            return {}, Fault(f"{file.name} ({size:,} bytes) is no safetensors file", COPY_ALL)
        if 8 + length > size:
            return {}, _cut_off(file, size, f"its header alone has {length:,}")
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = {
            name: StoredTensor(tuple(map(int, one["shape"])), str(one["dtype"]), file.name)
            for name, one in header.items()
        }
        ends = {name: tuple(map(int, one["data_offsets"])) for name, one in header.items()}
        end = max((last for _, last in ends.values()), default=0)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        what = f"{file.name} ({size:,} bytes) is damaged: its header cannot be read ({type(error).__name__})"
        return {}, Fault(what, COPY_ALL)
    wrong = [
        name
        for name, one in tensors.items()
        if one.dtype in BITS and math.prod(one.shape) * BITS[one.dtype] != 8 * (ends[name][1] - ends[name][0])
    ]
    if wrong:
        return {}, Fault(f"{file.name} is damaged: sizes of {listed(wrong)} contradict themselves", COPY_ALL)
    if size < 8 + length + end:
        return {}, _cut_off(file, size, f"its header says {8 + length + end:,}")
    if size > 8 + length + end:
        what = f"{file.name} is damaged: it has {size:,} bytes, its header says {8 + length + end:,}"
        return {}, Fault(what, COPY_ALL)
    return tensors, None


def _cut_off(file: Path, size: int, says: str) -> Fault:
    return Fault(f"damaged weights: {file.name} is cut off: it has {size:,} bytes, {says}", COPY_ALL)
