"""A checkpoint's own chat template is told where it renders otherwise, as transformers renders it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vl3train.contracts.tokens import CHAT_TEMPLATE
from vl3train.model.weights.headers.template import (
    KEPT,
    PICTURES,
    WORDS,
    _render,
    export_remark,
    own_template,
)

WITH_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a bot.<|im_end|>\n{% endif %}"
    + CHAT_TEMPLATE
)
SAME = CHAT_TEMPLATE.replace("{%- set id", "{# the same, written otherwise #}{%- set id")


@pytest.mark.parametrize("probe", [PICTURES, WORDS])
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, WITH_SYSTEM, SAME])
def test_templates_are_rendered_as_transformers_does(processor, template, probe):
    expected = processor.tokenizer.apply_chat_template(
        list(probe), chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert _render(template, probe) == expected


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", "{}"),
        ("chat_template.json", {"chat_template": "{}"}),
        ("tokenizer_config.json", {"chat_template": "{}"}),
        ("tokenizer_config.json", {"chat_template": [{"name": "default", "template": "{}"}]}),
    ],
)
def test_a_template_is_found_wherever_it_is_kept(tmp_path: Path, name, content):
    def write(template: str) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        escaped = template if isinstance(content, str) else json.dumps(template)[1:-1]
        (tmp_path / name).write_text(text.replace("{}", escaped))

    for template in (CHAT_TEMPLATE, SAME):
        write(template)
        assert own_template(tmp_path, pictures=True) is None
    write(WITH_SYSTEM)
    own = own_template(tmp_path, pictures=False)
    assert own is not None
    assert (own.file, own.text) == (name, WITH_SYSTEM)
    assert "'<|im_start|>system\\nYou are a bot." in own.difference
    assert "instead of '<|im_start|>user" in own.difference


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{% for %}", "{{ raise_exception('no') }}", "{{ ''.__class__.x() }}"]
)
def test_a_template_that_raises_is_told(tmp_path: Path, template: str):
    (tmp_path / "chat_template.jinja").write_text(template)
    own = own_template(tmp_path, pictures=False)
    assert own is not None
    assert "cannot render a probe conversation" in own.difference


def test_an_export_says_which_template_it_has(tmp_path: Path):
    weights = tmp_path / "run" / "checkpoints" / "step_00000004" / "weights"
    weights.mkdir(parents=True)
    (weights / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    assert export_remark(tmp_path / "run", weights) is None
    (tmp_path / "run" / KEPT).write_text(WITH_SYSTEM)
    for source in (tmp_path / "run", weights.parent):
        assert "with which the run was trained" in str(export_remark(source, weights))
    other = tmp_path / "other"
    other.mkdir()
    (other / "chat_template.jinja").write_text(WITH_SYSTEM)
    assert "is written as it is" in str(export_remark(other, other))
