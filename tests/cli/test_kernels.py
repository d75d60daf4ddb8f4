from __future__ import annotations

import torch

from vl3train.cli.main import main
from vl3train.model.attention import backends
from vl3train.model.attention import check as attention_check


def test_the_table_has_every_backend_and_the_one_taken_is_right(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("VL3TRAIN_CACHE_DIR", str(tmp_path))
    if not torch.cuda.is_available():  # kernels that need long segments to go wrong are a GPU's
        monkeypatch.setattr(attention_check, "LENGTHS", ((60, 60, 35, 1), (1, 14)))
    assert main(["kernels", "--check"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in backends.BACKENDS)
    if not torch.cuda.is_available():
        assert "auto takes reference" in shown
        assert "needs a CUDA device" in shown


def test_a_kernel_with_a_wrong_gradient_is_caught(monkeypatch):
    """As one published kernel was: everything right but dq."""
    right = backends.varlen_attention

    def wrong_dq(q, k, v, segments, **settings):
        out = right(q.detach(), k, v, segments, **settings)
        return out + (q * 0)

    shape = dict(heads=4, kv_heads=2, head_dim=16, causal=True, dtype=torch.float32)
    assert attention_check.check_kernel("reference", torch.device("cpu"), **shape).is_right
    monkeypatch.setattr(attention_check, "varlen_attention", wrong_dq)
    found = attention_check.check_kernel("reference", torch.device("cpu"), **shape)
    assert not found.is_right
    assert found.errors["dq"] > 0.5
    assert max(found.errors[name] for name in ("out", "dk", "dv")) < 0.01


def test_a_kernel_that_is_wrong_for_many_segments_alone_is_caught(monkeypatch):
    """flash-attn-4 takes other kernels for more than 256 of them."""
    right = backends.varlen_attention

    def wrong_for_many(q, k, v, segments, **settings):
        out = right(q, k, v, segments, **settings)
        return out if len(segments.lengths) <= 256 else out + q.flip(0) * 0.1

    shape = dict(heads=4, kv_heads=2, head_dim=16, causal=False, dtype=torch.float32)
    monkeypatch.setattr(attention_check, "varlen_attention", wrong_for_many)
    assert not attention_check.check_kernel("reference", torch.device("cpu"), **shape).is_right


def test_a_kernel_that_raises_is_reported():
    shape = dict(heads=4, kv_heads=2, head_dim=16, causal=True)
    found = attention_check.check_kernel("flash_attn_4", torch.device("cpu"), **shape)
    assert not found.is_right
    assert found.failed
