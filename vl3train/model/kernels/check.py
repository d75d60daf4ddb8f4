"""Chooses what makes the matrix products of compiled layers, and checks quack's kernels on this machine."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vl3train.contracts.kept import forget, keep, read_kept
from vl3train.contracts.shapes import TowerShape, tower_shapes
from vl3train.model.attention.backends import KernelChoice
from vl3train.model.attention.check import MAX_ERROR, errors_in, largest
from vl3train.model.kernels.gemm_cases import GemmCase, gemm_cases
from vl3train.model.machine_key import machine_key

INSTALLED_FOLDERS = ("site-packages", "dist-packages")
"""Folders whose packages quack takes as installed (quack/gemm_runtime/identity.py)."""


@dataclass(frozen=True, slots=True)
class GemmError:
    """Largest relative error of one op's results; ``failed`` says why there is none."""

    name: str
    error: float
    failed: str = ""

    @property
    def is_right(self) -> bool:
        """Whether the error is below the limit; NaN is not."""
        return not self.failed and self.error < MAX_ERROR


def choose_gemm_backend(
    requested: str, hf_config: Any, device: torch.device, dtype: torch.dtype, *, compiled: bool
) -> KernelChoice:
    """``quack`` or ``torch``. ``auto`` takes quack where it can serve and is right. The check takes some seconds, once
    on a machine.

    Raises ValueError where quack was asked for and cannot serve, or is wrong; the message has the error measured.
    """
    if requested == "torch":
        return KernelChoice("torch", "asked for")
    shapes = tower_shapes(hf_config)
    problem = why_not_quack(shapes, device, dtype, compiled=compiled)
    problem = problem or wrong_gemm(shapes, device, dtype)
    if problem is None:
        return KernelChoice("quack", "asked for" if requested == "quack" else "auto: first choice")
    if requested == "quack":
        raise ValueError(
            f"machine.gemm_backend=quack cannot serve: {problem}; with machine.gemm_backend=auto the run takes torch"
        )
    return KernelChoice("torch", f"auto: not quack, {problem}")


def why_not_quack(
    shapes: Sequence[TowerShape], device: torch.device, dtype: torch.dtype, *, compiled: bool
) -> str | None:
    """Why quack's matrix products cannot serve, or None."""
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device.type}"
    if not compiled:
        return "it serves compiled layers only (machine.compile_layers=true)"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    sizes = [size for shape in shapes for size in (shape.hidden_size, shape.intermediate_size)]
    if wrong := [size for size in sizes if size % 16]:
        return f"it needs hidden and intermediate sizes that are multiples of 16, not {wrong}"
    if torch.cuda.get_device_capability(device)[0] != 9:
        return "its tiles are measured on GPUs of the Hopper generation only"
    return quack_import_problem()


def quack_import_problem() -> str | None:
    """Why quack-kernels cannot be imported, or None."""
    try:
        importlib.import_module("vl3train.model.kernels.quack_gemm")
    except (ImportError, AttributeError, RuntimeError, TypeError) as error:
        # quack hashes the functions that its kernels call, but takes those of installed packages by name. It knows
        # these by their folder's name alone; elsewhere it reads cutlass's source and meets what it cannot hash.
        installed = {*_folder_of("cutlass").parts} & {*INSTALLED_FOLDERS}
        if "no fail-closed semantic key" in str(error) and not installed:
            return (
                f"quack-kernels lies in {_folder_of('quack')}; quack works only where it and its libraries lie in a "
                f"folder called {' or '.join(INSTALLED_FOLDERS)}: install them into a virtual environment, or rename "
                "the folder"
            )
        return f"quack-kernels is not wholly installed ({error})"
    return None


def _folder_of(package: str) -> Path:
    """The folder in which an importable package lies; the empty path where there is none."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent.parent if spec is not None and spec.origin else Path()


def wrong_gemm(shapes: Sequence[TowerShape], device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with quack's matrix products for these shapes, or None."""
    for shape in shapes:
        for found in proven_gemms(shape, device, dtype):
            if found.failed:
                return f"its {found.name} does not run here ({found.failed})"
            if not found.is_right:
                what = f"relative error against float64: {found.error:.2g}"
                return f"its {found.name} is wrong on this machine ({what})"
    return None


def proven_gemms(
    shape: TowerShape,
    device: torch.device,
    dtype: torch.dtype,
    *,
    part: int = 0,
    parts: int = 1,
    anew: bool = False,
) -> Iterator[GemmError]:
    """``gemm_errors``, but for ops that were right on this machine before. A wrong one is not remembered.

    Of the cases only each ``parts``th, from number ``part`` on, so that several processes can share the work. With
    ``anew`` nothing is taken from before.
    """
    of = {"gemms": asdict(shape), "dtype": str(dtype), **machine_key(device)}
    if not anew and read_kept(of) is True:
        return
    all_right = parts == 1
    for number, case in enumerate(gemm_cases(shape, device, dtype)):
        if number % parts != part:
            continue
        key = {"case": case.name, **of}
        found = GemmError(case.name, errors_in(None if anew else read_kept(key), ["error"])["error"])
        if not found.is_right:
            found = _error_of(case)
            if found.is_right:
                keep(key, {"error": found.error})
            else:
                forget(key)
                forget(of)
        all_right &= found.is_right
        yield found
    if all_right:
        keep(of, True)


def gemm_errors(shape: TowerShape, device: torch.device, dtype: torch.dtype) -> Iterator[GemmError]:
    """Errors, against float64, of the ops for a tower of this shape. An op that raises is reported, not raised."""
    yield from map(_error_of, gemm_cases(shape, device, dtype))


def _error_of(case: GemmCase) -> GemmError:
    try:
        found = case.op(*case.arguments)
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as error:
        message = str(error).splitlines()[0][:200] if str(error) else ""
        return GemmError(case.name, float("nan"), f"{type(error).__name__}: {message}")
    return GemmError(case.name, _relative_error(found, case.reference, case.arguments))


def _relative_error(
    found: Tensor | tuple[Tensor, ...], reference: Callable[..., Any], arguments: tuple[Any, ...]
) -> float:
    """The largest of all results: norm of the difference over the norm, the reference in float64."""
    exact = reference(*(x.double() if isinstance(x, Tensor) else x for x in arguments))
    pairs = zip(found, exact, strict=True) if isinstance(found, tuple) else [(found, exact)]
    return largest([float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs])
