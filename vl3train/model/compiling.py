"""The one place where torch.compile is called, with the settings it gets."""

from __future__ import annotations

import copyreg
import functools
import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor


def compiled(function: Callable[..., Any], *, enabled: bool) -> Callable[..., Any]:
    """``function`` compiled for any lengths; the function itself where not ``enabled``."""
    if not enabled:
        return function
    # Seconds of imports, which a command that compiles nothing (plan) goes without.
    import torch._dynamo.config as dynamo_config
    from torch._dynamo.utils import set_compilation_metrics_limit

    from vl3train.model.inductor_choices import choose_for_wide_rows

    # The settings are process-wide: the compiler reads them when the first batch comes. To recompute elementwise work
    # is cheaper than to keep it in memory; our own ops and torch's attention are never recomputed.
    functorch_config.aggressive_recomputation = True
    functorch_config.is_non_builtin_to_include = True
    # Cache graphs with a torch.autograd.Function on disk as well; torch plans to make this its default
    # (https://github.com/facebookresearch/fairchem/pull/2162). The cache key has the function's body, but only the name
    # of an op of ours: so the tag adds our sources to the key.
    functorch_config.autograd_cache_allow_custom_autograd_functions = True
    if (tag := sources_tag(Path(__file__).parent)) not in torch.compiler.config.cache_key_tag:
        torch.compiler.config.cache_key_tag += tag
    # Part of a graph's key too, where a size is fixed. pickle would name a memory format by the first module of
    # sys.modules that has torch, so that a process in which another module came first would compile all anew.
    copyreg.pickle(torch.memory_format, _reduce_memory_format)
    # Two towers, with and without gradients, short rows and long: more graphs than torch's own limit of 8. Past its
    # limit torch would run uncompiled with only a warning; here it is an error.
    dynamo_config.recompile_limit = 32
    dynamo_config.fail_on_recompile_limit_hit = True
    # The layers' floats (a norm's epsilon, an adapter's scaling) are constants. torch would first trace each layer with
    # them as inputs, see that an op needs their values, and trace it anew: 6 to 7 s for a layer, now 2 to 3.
    dynamo_config.specialize_float = True
    choose_for_wide_rows()
    # engine/monitor/compile_log.py reads torch's records once a step. A first step may write more than the 64 that
    # torch keeps.
    set_compilation_metrics_limit(1024)
    # torch 2.11 says so of the loss over the vocabulary. A user can do nothing about it.
    warnings.filterwarnings(
        "ignore", message=r"\s*Online softmax is disabled on the fly since Inductor decides"
    )
    return torch.compile(function, dynamic=True)


def fix_shape(tensor: Tensor) -> None:
    """Let the compiler treat the shape of ``tensor`` as a constant, as it does for weights: no pack changes it."""
    torch._dynamo.mark_static(tensor)


def _reduce_memory_format(
    which: torch.memory_format,
) -> tuple[Callable[[str], torch.memory_format], tuple[str]]:
    return _memory_format, (str(which).removeprefix("torch."),)


def _memory_format(name: str) -> torch.memory_format:
    return getattr(torch, name)


@functools.cache
def sources_tag(folder: Path) -> str:
    """A tag that changes with every change of a Python file below ``folder``: cached graphs call the ops there."""
    sources = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        sources.update(f"{file.relative_to(folder)}\0{file.stat().st_size}\0".encode() + file.read_bytes())
    return f"vl3train-{sources.hexdigest()[:16]}"
