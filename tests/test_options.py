"""No option that nobody reads, and nobody changes a config outside config/."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import vl3train
from vl3train.config.input.options import OPTIONS, SECTIONS

PACKAGE = Path(vl3train.__file__).parent
CONFIG_CLASSES = {cls.__name__: section for section, cls in SECTIONS.items()} | {"TrainConfig": ""}
"""Section of each config class; that of the whole config is the empty word."""

READ_IN_CONFIG_ONLY = {
    "stage.learning_rates": "rules.effective_learning_rates joins these two for the engine",
    "model.learning_rates": "rules.effective_learning_rates joins these two for the engine",
    "optim.learning_rate": "input/rates.py puts it in place of the rates of stage, model and adapter",
    "adapter.learning_rate": "rules.adapter_rates puts it in place of the stage's rate",
}


class Reader(ast.NodeVisitor):
    """Finds ``section.option`` wherever a name or attribute that is known to hold a config is read.

    A name is known by its annotation (``data: DataConfig``), by an assignment from what is known (``data = cfg.data``),
    or because it is ``cfg``. An attribute (``self.step``, ``plan.step``) is known where a class annotates it, or
    ``self.step = cfg.step`` stands somewhere in the package: ``fields`` holds those.
    """

    def __init__(self, fields: dict[str, str]) -> None:
        self.fields = fields
        self.scopes: list[dict[str, str]] = [{"cfg": ""}]
        self.found: set[str] = set()

    def section_of(self, node: ast.expr | None) -> str | None:
        """Section that an expression holds; None where it is no config."""
        if isinstance(node, ast.Name):
            return next((scope[node.id] for scope in reversed(self.scopes) if node.id in scope), None)
        if isinstance(node, ast.Call):
            return annotated(node.func)
        if isinstance(node, ast.Attribute):
            if self.section_of(node.value) == "" and node.attr in SECTIONS:
                return node.attr
            return self.fields.get(node.attr)
        return None

    def bind(self, target: ast.expr, value: ast.expr | None) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, other in zip(target.elts, value.elts, strict=True):
                self.bind(one, other)
        elif isinstance(target, ast.Name) and (section := self.section_of(value)) is not None:
            self.scopes[-1][target.id] = section
        elif isinstance(target, ast.Attribute) and (section := self.section_of(value)) is not None:
            self.fields[target.attr] = section

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self.bind(target, node.value)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        section = annotated(node.annotation)
        if section is not None and isinstance(node.target, ast.Name):
            self.scopes[-1][node.target.id] = section
        self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for line in node.body:
            if isinstance(line, ast.AnnAssign) and (section := annotated(line.annotation)) is not None:
                self.fields[ast.unparse(line.target)] = section
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        sections = {argument.arg: annotated(argument.annotation) for argument in arguments}
        self.scopes.append({name: section for name, section in sections.items() if section is not None})
        self.generic_visit(node)
        self.scopes.pop()

    def visit_Attribute(self, node: ast.Attribute) -> None:
        section = self.section_of(node.value)
        if section and isinstance(node.ctx, ast.Load):
            self.found.add(f"{section}.{node.attr}")
        self.generic_visit(node)


def annotated(node: ast.expr | None) -> str | None:
    """Section of an annotation, or of the class that a call makes: ``DataConfig``, ``schema.DataConfig | None``."""
    names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)} if node else set()
    names |= {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)} if node else set()
    known = sorted(names & CONFIG_CLASSES.keys())
    return CONFIG_CLASSES[known[0]] if known else None


def reads(sources: list[str]) -> set[str]:
    """Options that code reads, by full name."""
    trees = [ast.parse(source) for source in sources]
    fields: dict[str, str] = {}
    for tree in trees:  # what classes hold is known before anything is looked up in them
        Reader(fields).visit(tree)
    readers = [Reader(fields) for _ in trees]
    for reader, tree in zip(readers, trees, strict=True):
        reader.visit(tree)
    return {key for reader in readers for key in reader.found if key in OPTIONS}


def changes(tree: ast.AST) -> list[str]:
    """Assignments to something below a name that means a config, in source form."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            root: ast.expr = node
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id == "cfg":
                found.append(ast.unparse(node))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "object.__setattr__"):
            found += [ast.unparse(node)] if ast.unparse(node.args[0]).split(".")[0] == "cfg" else []
    return found


def outside_config() -> Iterator[Path]:
    return (file for file in PACKAGE.rglob("*.py") if file.relative_to(PACKAGE).parts[0] != "config")


def test_every_option_is_read_by_what_it_is_for():
    """Reading it in config/ (rules), cli/ or preview/ (pages about a config) has no effect on a run."""
    shows = ("cli", "preview")
    files = [file for file in outside_config() if file.relative_to(PACKAGE).parts[0] not in shows]
    read = reads([file.read_text() for file in files])
    assert set(OPTIONS) - read == set(READ_IN_CONFIG_ONLY)


def test_an_option_is_read_by_section_and_name_and_not_by_its_name_alone():
    other = (
        "def f(cfg: TrainConfig, plan):\n    print(cfg.data.fill, cfg.run.fps, plan.step.fill, plan.fps)\n"
    )
    assert reads([other]) == set()
    by_names = (
        "def f(data: DataConfig | None, cfg):\n"
        "    machine, run = cfg.machine, cfg.run\n"
        "    optim = cfg.optim\n"
        "    def inner(n):\n"
        "        return data.fps + machine.dtype + run.seed + optim.eps + AdapterConfig().rank\n"
    )
    assert reads([by_names]) == {"data.fps", "machine.dtype", "run.seed", "optim.eps", "adapter.rank"}
    by_fields = "class Plan:\n    step: schema.StepConfig\n\ndef f(plan):\n    return plan.step.fill\n"
    assert reads([by_fields]) == {"step.fill"}
    by_self = "def f(self):\n    return self.own.seed\n\ndef g(self, cfg):\n    self.own = cfg.run\n"
    assert reads([by_self]) == {"run.seed"}


def test_no_config_is_changed_outside_config():
    found = {
        str(file.relative_to(PACKAGE)): changed
        for file in outside_config()
        if (changed := changes(ast.parse(file.read_text())))
    }
    assert found == {}


def test_a_planted_change_is_caught():
    assert changes(ast.parse("cfg.step.max_tokens = 5\nother.x = 1\nsetattr(cfg.step, 'fill', 1)\n")) == [
        "cfg.step.max_tokens",
        "setattr(cfg.step, 'fill', 1)",
    ]
