"""A wrong kernel never serves: auto tries the next one and says why; one asked for is refused with its error.

No GPU here: the device is only named, and which backends exist and which are wrong is set by the test.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from vl3train.contracts.shapes import TowerShape
from vl3train.model.attention import backends as attention_backends
from vl3train.model.attention import check as attention_check
from vl3train.model.attention.check import (
    KernelError,
    check_kernel,
    kernel_problem,
    proven_kernel,
    right_attention,
)


@pytest.fixture
def config(tiny_model_dir):
    return AutoConfig.from_pretrained(tiny_model_dir)


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("VL3TRAIN_CACHE_DIR", str(tmp_path))


@pytest.fixture
def gpu(monkeypatch):
    """Every backend is there; those in the returned dict have the given error in dq."""
    errors: dict[str, float] = {}
    monkeypatch.setattr(attention_backends, "_problem", lambda *_: None)

    def check(backend, device, *, heads, kv_heads, head_dim, causal, shares_prefix, dtype):
        found = {"out": 0.002, "dq": errors.get(backend, 0.002), "dk": 0.002, "dv": 0.002}
        return KernelError(backend, heads, kv_heads, head_dim, causal, found)

    monkeypatch.setattr(attention_check, "check_kernel", check)
    monkeypatch.setattr(attention_check, "machine_key", lambda device: {"device": device.type})
    return errors


def choose(requested, config):
    return right_attention(requested, config, torch.device("cuda"), (12, 16), torch.bfloat16)


def test_auto_passes_over_wrong_kernels_and_says_so(gpu, config):
    gpu.update({attention_backends.BACKENDS[0]: 1.2, attention_backends.BACKENDS[1]: float("nan")})
    choice = choose("auto", config)
    assert choice.name == attention_backends.BACKENDS[2]
    assert "dq 1.2" in choice.reason
    assert "dq nan" in choice.reason


def test_a_forced_wrong_kernel_is_refused_with_its_figure(gpu, config):
    gpu["torch_varlen"] = 1.2
    with pytest.raises(ValueError, match=r"machine.attention=torch_varlen is wrong .* dq 1\.2"):
        choose("torch_varlen", config)


def test_nothing_right_is_refused(gpu, config):
    gpu.update(dict.fromkeys(attention_backends.BACKENDS, 1.0))
    with pytest.raises(ValueError, match=r"machine\.attention=reference is wrong"):
        choose("auto", config)


def test_a_kernel_that_was_right_is_not_checked_again_until_the_machine_is_another(gpu, config, monkeypatch):
    first = attention_backends.BACKENDS[0]
    assert choose("auto", config).name == first
    gpu[first] = 1.2  # would be found now
    assert choose("auto", config).name == first
    monkeypatch.setattr(attention_check, "machine_key", lambda device: {"device": "of another driver"})
    assert choose("auto", config).name != first
    del gpu[first]
    assert choose("auto", config).name == first, "a wrong kernel is not remembered"


def test_a_check_anew_takes_nothing_from_before_and_takes_back_what_was_wrong(gpu):
    shape = TowerShape(
        num_layers=1,
        hidden_size=32,
        intermediate_size=64,
        num_heads=2,
        num_kv_heads=2,
        head_dim=16,
        is_decoder=False,
    )

    def is_right(**anew):
        return proven_kernel(
            "torch_varlen", torch.device("cuda"), shape, torch.bfloat16, shares_prefix=False, **anew
        ).is_right

    assert is_right()
    gpu["torch_varlen"] = 1.2
    assert is_right()
    assert not is_right(anew=True)
    assert not is_right()


def test_the_reference_is_right_by_float64_and_a_broken_one_is_not(config, monkeypatch):
    cpu = torch.device("cpu")
    assert kernel_problem("reference", config, cpu, torch.float32) is None
    original = attention_backends.reference
    monkeypatch.setattr(
        attention_backends, "reference", lambda q, k, v, *rest: original(q * 1.1, k, v, *rest)
    )
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 16, "causal": True}
    assert not check_kernel("reference", cpu, **shape, dtype=torch.float32).is_right
