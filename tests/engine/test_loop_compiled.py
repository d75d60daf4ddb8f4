"""What the training loop says of compiled layers."""

from __future__ import annotations

import functools
import json

import pytest
import torch

from tests.engine.runs import run


def compiled_run(words, folder, monkeypatch, *, dynamic):
    """Figures of two steps, traced as on a GPU, without kernels."""
    real = functools.partial(torch.compile, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(torch, "compile", lambda function, **_: real(function, dynamic=dynamic))
    torch._dynamo.reset()
    words = [*words, "stage=1", f"run.output_dir={folder}", "machine.compile_layers=true"]
    run([*words, "step.global_packs=1", "run.num_steps=2", "run.evaluate_at_end=false"])
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "words", [[], pytest.param(["machine.zero_stage=3"], marks=pytest.mark.long)], ids=["ZeRO-1", "ZeRO-3"]
)
def test_a_later_pack_compiles_nothing_anew(demo_words, tmp_path, monkeypatch, words):
    """Neither the encoder, which trains, nor the frozen language model."""
    first, second = compiled_run([*demo_words, *words], tmp_path, monkeypatch, dynamic=True)
    assert first["recompiles"] > 0 == second["recompiles"]
    assert first["tokens"] != second["tokens"]


def test_a_step_says_what_it_compiled_and_why(demo_words, tmp_path, monkeypatch, capsys):
    first, second = compiled_run(demo_words, tmp_path, monkeypatch, dynamic=False)
    assert first["recompiles"] >= second["recompiles"] > 0
    assert all(0 < line["compile_seconds"] < line["step_seconds"] for line in (first, second))
    told = capsys.readouterr().out.splitlines()
    start = told.index(f"step 2: {second['recompiles']} graphs compiled in {second['compile_seconds']:.1f} s")
    reasons = told[start + 1 : start + 1 + second["recompiles"]]
    assert any(line.startswith("  _run (tower.py:") for line in reasons)
    # torch names the newest graph that did not fit, which may be the other tower's or the last layer's.
    other = [line for line in reasons if "size mismatch at index 0" not in line]
    assert all("check_obj_id(body.__code__" in line or "positions" in line for line in other), other
    assert len(other) < len(reasons)
    of_steps = [line for line in told if " step " in line and "loss" in line]
    for line, text in zip((first, second), of_steps, strict=True):
        assert f"compiled {line['compile_seconds']:.1f} s" in text
    assert not any(line.startswith("step 1:") for line in told), "the first step is known to compile"
