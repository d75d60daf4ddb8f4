"""numba's ``njit``, set up before anything is compiled: processes compile alike, and find on disk what one compiled.

The compiler stops at vectors of 32 bytes unless it is told that the processor can take 64 at a time. With them, a
picture is resized in a tenth less time. The environment's ``NUMBA_CPU_FEATURES`` goes before.
"""

from __future__ import annotations

from typing import Any

from llvmlite.binding import get_host_cpu_features
from numba import config, njit

__all__ = ["njit"]

_settings: Any = config
if not _settings.CPU_FEATURES:
    _settings.CPU_FEATURES = f"{get_host_cpu_features().flatten()},-prefer-256-bit"
