"""What torch.compile is told, in the one place where it is called."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.config as dynamo_config
import torch._functorch.config as functorch_config
from torch import Tensor
from torch._dynamo.utils import set_compilation_metrics_limit


def compiled(function: Callable[..., Any], *, enabled: bool) -> Callable[..., Any]:
    """``function`` as torch.compile makes it, for any lengths; itself where that is not ``enabled``."""
    if not enabled:
        return function
    from vl3train.model.inductor_choices import choose_for_wide_rows  # a second of imports

    # Process-wide, for the compiler reads them when the first batch comes. Computing elementwise work again is
    # cheaper than the memory that keeping it takes; ops of ours and of torch's own attention are never repeated.
    functorch_config.aggressive_recomputation = True
    functorch_config.is_non_builtin_to_include = True
    # Graphs with torch.autograd.Function in them are kept on disk as well; torch plans to make this its default
    # (https://github.com/facebookresearch/fairchem/pull/2162). They are looked up by the function's body too, but of
    # an op of ours by its name alone: hence the tag.
    functorch_config.autograd_cache_allow_custom_autograd_functions = True
    if (tag := sources_tag(Path(__file__).parent)) not in torch.compiler.config.cache_key_tag:
        torch.compiler.config.cache_key_tag += tag
    # Two towers, with and without gradients, short rows and long: past its own limit of 8 torch would go on
    # without compiling, and say so in a warning alone.
    dynamo_config.recompile_limit = 32
    dynamo_config.fail_on_recompile_limit_hit = True
    choose_for_wide_rows()
    # engine/monitor/compile_log.py reads torch's records once a step; a first step may write more than torch keeps, 64.
    set_compilation_metrics_limit(1024)
    return torch.compile(function, dynamic=True)


def fix_shape(tensor: Tensor) -> None:
    """Let the compiler treat the shape of ``tensor`` as a constant, as it does for weights: no pack changes it."""
    torch._dynamo.mark_static(tensor)


@functools.cache
def sources_tag(folder: Path) -> str:
    """Another one for each state of the Python files in ``folder``, whose ops a graph on disk was made with."""
    sources = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        sources.update(f"{file.relative_to(folder)}\0{file.stat().st_size}\0".encode() + file.read_bytes())
    return f"vl3train-{sources.hexdigest()[:16]}"
