"""The house stays in order: short functions, small folders with a charter, the words of the field."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import vl3train
from tests.conftest import SLOW

PACKAGE = Path(vl3train.__file__).parent
FILES = sorted(str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py"))
FOLDERS = sorted({str(Path(path).parent) for path in FILES})

MAX_LINES = 80
MAX_PARAMETERS = 8
MAX_MODULES = 9

LONG_FUNCTIONS: dict[str, str] = {}
"""Functions of more than MAX_LINES lines, with the reason."""

MANY_PARAMETERS = {
    "data/prepare/write_shards.py:write_shards": "one for each option of `vl3train shards`",
    "data/render/samples.py:render_sample": "one sample: what is known of it, how it is rendered, where it goes",
    "model/kernels/ops.py:norm_backward_reference": "takes what the custom op norm_backward takes",
}
"""Public functions of more than MAX_PARAMETERS parameters whose signature no library asks for, with the reason."""

LARGE_FOLDERS = {
    "cli": "one file a command",
    "contracts": "what all layers share, in one file each: records, shapes, words, and how files are written",
    "config": "the schema's sections, what is made of them, and the folders that a config names",
    "data/records": "what a record's keys mean, in one file each: turns, media, times; and the files that hold records",
    "data/shards": "tar files and their index on any storage: headers, members, addresses, reads, waits",
    "model/kernels": "each operation in its own file, with the check of all of them",
    "model/weights/headers": "what is said of a folder without torch: each kind of file, and digests of all",
}

ANYWHERE = ("",)
FORMER_WORDS = {
    "means": ("engine",),  # of AdamW: moments
    "states_on_host": ANYWHERE,  # offload_optimizer
    "HostAdamW": ANYWHERE,  # OffloadAdamW
    "others": ("engine", "model"),  # bytes: reserved_bytes
    "send": ("data", "engine"),  # a batch: prefetch
    "take": ("data/loader.py", "engine"),  # a batch: get
    "Levels": ANYWHERE,  # RecomputePlan
    "again": ANYWHERE,  # recompute
    "products": ("config", "engine", "model"),  # gemm_backend
    "told_if_out_of_memory": ANYWHERE,  # explain_oom
    "start_deaf_workers": ANYWHERE,  # start_workers_ignoring_signals
    "rehearsal": ANYWHERE,  # warmup
    "rehearse": ANYWHERE,
    "firewall": ANYWHERE,  # decode sandbox
    "wide": ("model", "preview"),  # intermediate_size
    "narrow": ("model", "preview"),  # hidden_size
    "skipped": ANYWHERE,  # rejected by the index, failed in the run
    "faulty": ANYWHERE,
}
"""Identifiers that gave way to the field's words, and where they may not come back: beginnings of paths."""


Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(source: str) -> Iterator[tuple[str, Function, list[str]]]:
    """Functions and methods with their names in the file and the bases of their class.

    Functions within a function are part of it.
    """
    bodies: list[tuple[str, list[str], list[ast.stmt]]] = [("", [], ast.parse(source).body)]
    while bodies:
        prefix, bases, body = bodies.pop()
        for node in body:
            if isinstance(node, ast.ClassDef):
                own = [ast.unparse(base) for base in node.bases]
                bodies.append((f"{prefix}{node.name}.", own, node.body))
            elif isinstance(node, Function):
                yield f"{prefix}{node.name}", node, bases


def signature_is_given(node: Function, bases: list[str]) -> bool:
    """Whether a library asks for plain arguments: autograd's forward, custom ops, numba."""
    decorators = " ".join(ast.unparse(decorator) for decorator in node.decorator_list)
    is_op = any(word in decorators for word in ("custom_op", "register_fake", "njit"))
    return is_op or (node.name == "forward" and "torch.autograd.Function" in bases)


def num_lines(node: Function) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def num_parameters(node: Function) -> int:
    """Without self, cls and autograd's ctx."""
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return len([argument for argument in arguments if argument.arg not in ("self", "cls", "ctx")])


def identifiers(source: str) -> set[str]:
    """Names that code gives: of functions, classes, parameters, variables and fields."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return found


def former_words(source: str, path: str) -> set[str]:
    """Words of the list that are names in a file of the package again."""
    return {word for word in identifiers(source) & set(FORMER_WORDS) if path.startswith(FORMER_WORDS[word])}


def package_functions() -> Iterator[tuple[str, Function, list[str]]]:
    """Every function of the package as ``path:name``. Triton kernels are excepted, by the name of their file."""
    for path in FILES:
        if not Path(path).name.startswith("triton_"):
            for name, node, bases in functions((PACKAGE / path).read_text()):
                yield f"{path}:{name}", node, bases


def test_no_function_is_longer_than_a_screen():
    found = {name: num_lines(node) for name, node, _ in package_functions() if name not in LONG_FUNCTIONS}
    assert {name: lines for name, lines in found.items() if lines > MAX_LINES} == {}


def test_no_public_function_has_more_parameters_than_one_can_remember():
    found = {
        name: num_parameters(node)
        for name, node, bases in package_functions()
        if not node.name.startswith("_")
        and not signature_is_given(node, bases)
        and name not in MANY_PARAMETERS
    }
    assert {name: count for name, count in found.items() if count > MAX_PARAMETERS} == {}


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_says_what_it_is_for_and_has_few_modules(folder: str):
    charter = ast.get_docstring(ast.parse((PACKAGE / folder / "__init__.py").read_text())) or ""
    assert charter.endswith(".")
    assert "\n" not in charter
    modules = [path for path in (PACKAGE / folder).glob("*.py") if path.name != "__init__.py"]
    assert len(modules) <= MAX_MODULES or folder in LARGE_FOLDERS, [path.name for path in modules]


@pytest.mark.parametrize("path", FILES)
def test_no_former_word_is_a_name_again(path: str):
    assert former_words((PACKAGE / path).read_text(), path) == set()


def test_planted_faults_are_caught():
    long = "class A(B):\n    def f(self):\n" + "        x = 1\n" * 80
    [(name, node, bases)] = functions(long)
    assert (name, num_lines(node), bases) == ("A.f", 81, ["B"])
    [(name, node, bases)] = functions("def g(a, b, c, d, e, *, f, g, h, i): ...\n")
    assert (name, num_parameters(node), signature_is_given(node, bases)) == ("g", 9, False)
    [(_, node, bases)] = functions("@torch.library.custom_op('a::b')\ndef g(a, b): ...\n")
    assert signature_is_given(node, bases)
    planted = "def f(again): self.means = [wide for x in y]; firewall = wide = 1\n"
    assert former_words(planted, "engine/run.py") == {"again", "means", "firewall"}
    assert former_words(planted, "model/layers/layers.py") == {"again", "wide", "firewall"}


def test_the_slow_files_that_workers_begin_with_are_there():
    tests = Path(__file__).parent
    assert [name for name in SLOW if not (tests / name).is_file()] == []
