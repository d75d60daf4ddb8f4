"""The state of every random generator of a rank, in a file that holds numbers only: reading it runs no code."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch


def save_random_state(path: Path, state: dict[str, Any]) -> None:
    """Write a ``random_state()``."""
    torch.save(state, path)


def load_random_state(path: Path) -> None:
    """Set the generators to the state that ``save_random_state`` wrote.

    Raises pickle.UnpicklingError where the file holds anything but numbers.
    """
    with torch.serialization.safe_globals(_globals_before_2026_12()):
        set_random_state(torch.load(path, weights_only=True))


def load_random_state_of(folder: Path, index: int) -> None:
    """Set the generators to those of a rank; ``folder`` has ``rank_0.pt`` and more.

    A rank that was not there begins a sequence of its own, with a seed that a saved rank draws: the same at each
    resume, and not the dropout masks of another rank.
    """
    count = len(list(folder.glob("rank_*.pt")))
    load_random_state(folder / f"rank_{index % count}.pt")
    if index >= count:
        seed = (int(torch.randint(2**32, ())) + index) % 2**32
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """State of every generator a training step may draw from (dropout of adapters)."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).copy()), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Set the generators to a ``random_state()``. A missing key is an error."""
    name, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((name, np.asarray(keys), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


def forward_state() -> tuple[torch.Tensor, torch.Tensor | None]:
    """The state of the generators that a forward pass draws from. No wait for the device."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def set_forward_state(state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    """Undo what was drawn since ``forward_state()``."""
    on_host, on_device = state
    torch.set_rng_state(on_host)
    if on_device is not None:
        torch.cuda.set_rng_state(on_device)


def _globals_before_2026_12() -> list[Any]:
    """What builds a numpy array, which the file held until then. None of it runs code of the file."""
    array = np.zeros(1, np.uint32).__reduce__()
    return [array[0], np.ndarray, np.dtype, type(np.dtype(np.uint32))]
