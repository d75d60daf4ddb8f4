"""transformers and DeepSpeed without what a training run never uses of them.

Importing them imports torch's compiler, DTensor and sympy as well: half of all that a start imports. They decorate
functions for the compiler (of FP8 products, paged caches, Muon) and know tensors that are spread over devices. A
process that trains calls none of this. So here

* whatever they decorate for the compiler is left to it until it is called, as ``torch._disable_dynamo`` does;
* transformers takes torch for one without torch.distributed and FlexAttention, which it supports.

``import_leanly`` is for processes of this package alone: where it was not called, nothing is changed.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from typing import Any

COMPILER = "torch._dynamo"
STOOD_FOR = (f"{COMPILER}._trace_wrapped_higher_order_op", f"{COMPILER}.utils")
"""Its modules of which functions are imported by name: transformers/masking_utils.py, torchvision/ops/roi_align.py."""
PACKAGES = ("transformers.", "deepspeed.", "torchvision.")
MARKS = ("allow_in_graph", "assume_constant_result")
"""Decorators that only say how the compiler shall take a function, where it meets it."""
WITHOUT = ("is_torch_distributed_available", "is_torch_flex_attn_available")
"""What transformers asks before it imports DTensor and FlexAttention."""


def import_leanly() -> None:
    """From now on, in this process, import transformers and DeepSpeed so. To call it again changes nothing."""
    if not any(isinstance(finder, LeanFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, LeanFinder())


@contextlib.contextmanager
def no_garbage() -> Iterator[None]:
    """Collect no garbage meanwhile, and never look again through the objects that are there at the end.

    What an import makes stays: Python looks for garbage in it again and again, a tenth of the time.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()


class LeanFinder:
    """Finds modules of transformers and DeepSpeed as Python does, and runs them with ``without_compiler``."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own spec with another ``exec_module``; None for all other modules."""
        if name == COMPILER:  # its own modules look for each other in torch
            end_standing_in()
        if not name.startswith(PACKAGES):
            return None
        spec = next(
            (
                found
                for finder in sys.meta_path
                if finder is not self and (found := finder.find_spec(name, path, target)) is not None
            ),
            None,
        )
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            with without_compiler():
                load(module)
            if name == "transformers.utils.import_utils":
                for question in WITHOUT:
                    if hasattr(module, question):
                        setattr(module, question, _no)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # of this module's loader alone
        return spec


def _no(*_: Any, **__: Any) -> bool:
    return False


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Meanwhile torch's decorators for its compiler import it only when what they decorate is called."""
    import torch

    if COMPILER in sys.modules or STOOD_FOR[0] in sys.modules:  # it is here, or this is within such a module
        yield
        return
    compile_now = torch.compile
    decorators = {name: getattr(torch.compiler, name) for name in ("disable", *MARKS)}
    torch.compile = functools.partial(_compile_later, compile_now)
    torch.compiler.disable = _disable_later
    vars(torch.compiler).update(dict.fromkeys(MARKS, _unmarked))
    vars(torch).setdefault("_dynamo", CompilerToCome(COMPILER))
    sys.modules.update((name, CompilerToCome(name)) for name in STOOD_FOR)
    try:
        yield
    finally:
        torch.compile = compile_now
        vars(torch.compiler).update(decorators)
        end_standing_in((CompilerToCome,))


def end_standing_in(kinds: tuple[type, ...] | None = None) -> None:
    """Take away what stands for torch's compiler, or only what is of these ``kinds``."""
    import torch

    kinds = kinds or (CompilerToCome, UnaskedCompiler)
    if type(vars(torch).get("_dynamo")) in kinds:
        del vars(torch)["_dynamo"]
    for name in STOOD_FOR:
        if type(sys.modules.get(name)) in kinds:
            del sys.modules[name]


def _disable_later(function: Any = None, recursive: bool = True, *, reason: str | None = None) -> Any:
    import torch

    return torch._disable_dynamo(function, recursive)


def _unmarked(function: Any) -> Any:
    return function


def _compile_later(compile_now: Callable[..., Any], function: Any = None, **settings: Any) -> Any:
    if function is None:
        return functools.partial(_compile_later, compile_now, **settings)
    compiled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def compiled_when_called(*args: Any, **named: Any) -> Any:
        if not compiled:
            compiled.append(compile_now(function, **settings))
        return compiled[0](*args, **named)

    return compiled_when_called


class CompilerToCome(types.ModuleType):
    """Stands for a module of torch's compiler, which is imported when one of its functions is called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in MARKS:
            return _unmarked
        return functools.partial(_call_later, self.__name__, name)


def _call_later(module: str, name: str, *args: Any, **named: Any) -> Any:
    end_standing_in()
    return getattr(importlib.import_module(module), name)(*args, **named)


class UnaskedCompiler(CompilerToCome):
    """Stands for ``torch._dynamo`` in a process that compiles nothing. Checkpointing keeps it from a function of its
    own, and reads one of its settings, which it uses only while it is traced."""

    config = types.SimpleNamespace(error_on_nested_fx_trace=True)
    disable = staticmethod(_unmarked)


def run_uncompiled() -> None:
    """Let AdamW and checkpointing run without asking torch's compiler not to compile them.

    torch imports it for that, when one of them is called first. Call this only where nothing is compiled.
    """
    import torch
    from torch.utils import checkpoint

    if COMPILER in sys.modules:
        return
    vars(torch)["_dynamo"] = UnaskedCompiler(COMPILER)
    owners = (checkpoint, *torch.optim.AdamW.__mro__)
    for function in [value for owner in owners for value in vars(owner).values()]:
        if (
            isinstance(function, types.FunctionType)
            and function.__code__.co_filename == torch._compile.__file__
        ):
            inner: Any = function.__wrapped__  # type: ignore[attr-defined]
            inner.__dynamo_disable = inner
