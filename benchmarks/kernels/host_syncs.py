"""Counts how often the host waits for the GPU."""

from __future__ import annotations

import linecache
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

SYNC_WARNING = "called a synchronizing CUDA operation"


def count_syncs(act: Callable[[], Any]) -> Counter[str]:
    """How often the host waits for the GPU while ``act`` runs, by line of Python.

    torch's sync debug mode tells; torch.cuda.synchronize and waits for events, which it passes over, are watched.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
    found: Counter[str] = Counter()

    def note(message: Any, *_: Any, **__: Any) -> None:
        if SYNC_WARNING in str(message):
            found[caller()] += 1

    def noted(wait: Callable[..., Any]) -> Callable[..., Any]:
        def act_noted(*arguments: Any) -> Any:
            found[caller()] += 1
            return wait(*arguments)

        return act_noted

    with (
        warnings.catch_warnings(),
        mock.patch.object(torch.cuda, "synchronize", noted(torch.cuda.synchronize)),
        mock.patch.object(torch.cuda.Event, "synchronize", noted(torch.cuda.Event.synchronize)),
    ):
        warnings.simplefilter("always")
        warnings.showwarning = note
        try:
            act()
        finally:
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")
    return found


def caller() -> str:
    """The innermost line outside torch and this file that led here, with its text."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/torch/" not in file and file != __file__ and not file.endswith("/warnings.py"):
            short = "/".join(file.split("/")[-3:])
            return f"{short}:{frame.f_lineno} {linecache.getline(file, frame.f_lineno).strip()}"
        frame = frame.f_back
    return "unknown"
