"""Names, dtypes and shapes of the tensors in a pytorch_model.bin, without torch and without running its code.

A file of torch.save is a zip archive: ``data.pkl`` rebuilds each tensor from a storage, which is a member of its own.
We read the pickle with an unpickler that knows these few calls and refuses every other, as torch does (weights_only).
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from vl3train.model.weights.headers.faults import Fault

STORAGES = {
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "DoubleStorage": "F64",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
"""Dtypes of torch's storages by their names in safetensors."""

REWRITE = (
    "write it as safetensors where you trust it: safetensors.torch.save_file(torch.load(FILE), "
    '"model.safetensors"), with clones of tensors that share memory'
)


class Pickled(NamedTuple):
    """A tensor as its pickle describes it."""

    shape: tuple[int, ...]
    dtype: str


def _tensor(storage: str, offset: int, size: tuple[int, ...], *rest: Any) -> Pickled:
    return Pickled(tuple(size), storage)


def _parameter(data: Pickled, *rest: Any) -> Pickled:
    return data


class _Reader(pickle.Unpickler):
    """Reads tensors as ``Pickled``. Raises UnpicklingError for anything that torch would have to run."""

    CALLS: dict[tuple[str, str], Callable[..., Any]] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch._utils", "_rebuild_parameter"): _parameter,
    }

    def find_class(self, module: str, name: str) -> Any:
        """One of the known calls, or the dtype of a storage."""
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) not in self.CALLS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self.CALLS[module, name]

    def persistent_load(self, pid: Any) -> str:
        """The dtype of a storage, for its bytes."""
        return str(pid[1])


def read_pickled(file: Path) -> tuple[dict[str, Pickled], Fault | None]:
    """The tensors of a weight file that torch.save wrote, by name; empty with the reason why it cannot be used."""
    if not zipfile.is_zipfile(file):
        what = f"{file.name} ({file.stat().st_size:,} bytes) is no whole file of torch.save"
        return {}, Fault(what, "download it again; if it is of torch before 1.6, load and save it again")
    try:
        with zipfile.ZipFile(file) as archive:
            member = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
            if member is None:
                return {}, Fault(f"{file.name} is a zip archive without weights", "download it again")
            with archive.open(member) as stream:
                content = _Reader(stream).load()
    except (pickle.UnpicklingError, AttributeError, TypeError, ValueError, IndexError, KeyError) as error:
        return {}, Fault(
            f"{file.name} holds more than weights ({error}); no code of a checkpoint is run", REWRITE
        )
    except (EOFError, OSError, zipfile.BadZipFile) as error:
        return {}, Fault(f"{file.name} is damaged ({error})", "download it again")
    if not isinstance(content, dict) or not all(isinstance(value, Pickled) for value in content.values()):
        return {}, Fault(f"{file.name} holds no tensors by name, but other things", REWRITE)
    return {str(name): value for name, value in content.items()}, None
