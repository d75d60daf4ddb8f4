"""No option that nobody reads, and nobody changes a config outside config/."""

from __future__ import annotations

import ast
from pathlib import Path

import vl3train
from vl3train.config.input.options import OPTIONS

PACKAGE = Path(vl3train.__file__).parent

READ_IN_CONFIG = {
    "machine.dp_size",  # promised before the launch, for the rules to divide by
    "stage.learning_rates",  # rules.effective_learning_rates joins these two for the engine
    "model.learning_rates",
}


def reads(tree: ast.AST) -> set[str]:
    """Names of the attributes that code reads."""
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return {node.attr for node in nodes if isinstance(node.ctx, ast.Load)}


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


def test_every_option_is_read_by_what_it_is_for():
    """Reading it in config/ (rules) or cli/check.py (a summary) has no effect on a run."""
    files = [
        file
        for file in PACKAGE.rglob("*.py")
        if file.relative_to(PACKAGE).parts[0] != "config" and file != PACKAGE / "cli" / "check.py"
    ]
    read = set().union(*(reads(ast.parse(file.read_text())) for file in files))
    unread = {key for key in OPTIONS if key.partition(".")[2] not in read}
    assert unread - READ_IN_CONFIG == set()


def test_no_config_is_changed_outside_config():
    found = {
        str(file.relative_to(PACKAGE)): changed
        for file in PACKAGE.rglob("*.py")
        if file.relative_to(PACKAGE).parts[0] != "config"
        and (changed := changes(ast.parse(file.read_text())))
    }
    assert found == {}


def test_a_planted_change_is_caught():
    assert changes(ast.parse("cfg.step.max_tokens = 5\nother.x = 1\nsetattr(cfg.step, 'fill', 1)\n")) == [
        "cfg.step.max_tokens",
        "setattr(cfg.step, 'fill', 1)",
    ]
