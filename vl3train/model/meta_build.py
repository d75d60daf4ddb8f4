"""Building transformers' modules on the meta device, without torch's Python code for that device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class MetaBuild(TorchFunctionMode):
    """Within it, an arange of the meta device is one of the CPU, and what is there is not filled with numbers.

    transformers builds its modules there, before it loads their weights and computes rotary frequencies anew. For
    arange, pow and normal_ on that device torch has references in Python, which import its compiler and sympy: 4 s of a
    core.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if func is torch.arange and torch.device(named.get("device") or "cpu").type == "meta":
            named["device"] = "cpu"
        if getattr(func, "__module__", None) == "torch.nn.init":
            filled = next(value for value in (*args, *named.values()) if isinstance(value, Tensor))
            if filled.is_meta:
                return filled
        return func(*args, **named)
