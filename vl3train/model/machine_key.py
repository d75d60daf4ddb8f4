"""All on which it depends whether a kernel is right, and what memory it takes: the key of what is kept of kernels."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from vl3train.model.compiling import sources_tag

LIBRARIES = ("flash-attn-4", "flash-attn", "quack-kernels", "nvidia-cutlass-dsl", "triton", "liger-kernel")
"""Packages that make kernels, beside torch."""
SOURCES = ("flash_attn", "quack")
"""Modules of them whose kernels are compiled here, from Python files: an edited one is another kernel."""
DRIVER = Path("/proc/driver/nvidia/version")


def machine_key(device: torch.device) -> dict[str, str]:
    """GPU, driver, torch, and the versions and sources of all that makes kernels, ours too.

    Two GPUs of one kind have the same key: a node's ranks share what one of them found out.
    """
    return {**_device_key(device), **_software_key()}


def _device_key(device: torch.device) -> dict[str, str]:
    if device.type != "cuda":
        return {"device": device.type, "processor": platform.processor() or platform.machine()}
    found = torch.cuda.get_device_properties(device)
    return {
        "device": found.name,
        "capability": f"{found.major}.{found.minor}",
        "memory": str(found.total_memory),
        "driver": _driver(),
    }


def _driver() -> str:
    """The driver's own text, or the CUDA version that it brings where a container does not show that."""
    try:
        return DRIVER.read_text(encoding="utf-8", errors="replace")
    except OSError:
        number = ctypes.c_int()
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
        return str(number.value)


@functools.cache
def _software_key() -> dict[str, str]:
    found = {"torch": f"{torch.__version__} {torch.version.git_version} CUDA {torch.version.cuda}"}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    for name in SOURCES:
        spec = importlib.util.find_spec(name)
        folders = sorted(spec.submodule_search_locations or ()) if spec is not None else []
        found[f"sources of {name}"] = " ".join(sources_tag(Path(folder)) for folder in folders)
    found["sources of vl3train"] = sources_tag(Path(__file__).parent)
    return found
