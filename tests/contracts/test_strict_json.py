"""Numbers that are not finite go through JSON that every reader takes, and nothing writes JSON past it."""

from __future__ import annotations

import ast
import doctest
import json
import math
from pathlib import Path

import pytest

import vl3train
from vl3train.contracts import strict_json
from vl3train.contracts.strict_json import json_text, without_texts

PACKAGE = Path(vl3train.__file__).parent
PLAIN = {
    "contracts/records.py": "a digest",
    "data/plan/plan.py": "a digest",
    "data/shards/index.py": "a digest",
    "data/sealed.py": "a digest",
    "model/weights/headers/manifest.py": "a digest",
    "data/plan/sample_table.py": "names and reasons, no number",
    "data/render/decode_server.py": "to its own client",
    "demo/tokenizer.py": "a tokenizer's config, in transformers' form",
    "engine/tracking/tensorboard_tracker.py": "a text to look at",
    "finetuning/data/shards.py": "texts quoted for YAML",
    "model/weights/convert.py": "a model's config, in transformers' form",
    "model/weights/export.py": "a model's config, in transformers' form",
    "model/weights/original_parts.py": "an adapter's config, in peft's form",
    "model/weights/streaming.py": "names of files and their bytes",
    "serving/lmms.py": "to our own server, from a program of others that has no other file of ours",
}
"""Files that call ``json.dumps`` themselves, with the reason."""


def test_doctests():
    assert doctest.testmod(strict_json).failed == 0


@pytest.mark.parametrize(
    "value",
    [
        {"a": math.nan, "b": {"c": -math.inf, "d": [1, {"e": math.inf}]}, "f": None, "g": 0.1, "h": "nan"},
        {"note": None, "note_text": "of a user"},
        [math.pi, {"x": 5e-324}],
        {},
    ],
)
def test_what_is_written_is_json_and_read_back(value):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    assert str(without_texts(json.loads(json_text(value), parse_constant=refuse))) == str(value)


def test_without_such_numbers_it_is_what_python_writes():
    value = {"b": [1, 2.5, None], "a": "ä"}
    assert json_text(value) == json.dumps(value)
    assert json_text(value, indent=1, sort_keys=True, letters=True) == json.dumps(
        value, indent=1, sort_keys=True, ensure_ascii=False
    )


def test_nothing_writes_json_past_it():
    found = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dump", "json.dumps"):
                found.add(str(file.relative_to(PACKAGE)))
    assert found - {"contracts/strict_json.py"} == PLAIN.keys()
