"""Matrix products with fused epilogues: references against float64 autograd, quack's kernels against the references."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from vl3train.contracts.shapes import ENCODER, LANGUAGE_MODELS, TowerShape
from vl3train.model.kernels import check, gemm_accumulate, gemm_ops
from vl3train.model.kernels.check import (
    GemmError,
    choose_gemm_backend,
    gemm_errors,
    proven_gemms,
    quack_import_problem,
)
from vl3train.model.kernels.ops import rotate

CUDA = torch.device("cuda")
R, W, INTERMEDIATE = 37, 16, 48


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)  # passes are in float32 whatever comes


def test_gelu_and_its_products_are_those_of_autograd():
    rows, into, bias, out, grad = (
        draw(R, W),
        draw(INTERMEDIATE, W),
        draw(INTERMEDIATE),
        draw(W, INTERMEDIATE),
        draw(R, W),
    )
    intermediate, activated = gemm_ops.linear_gelu(rows, into, bias, True)
    expected = F.linear(rows, into, bias)
    expected.retain_grad()
    close((intermediate, activated), (expected, F.gelu(expected, approximate="tanh")))
    F.linear(F.gelu(expected, approximate="tanh"), out).backward(grad)
    d_intermediate, made, sums = gemm_ops.gelu_linear_backward(grad, out, intermediate, True)
    close((d_intermediate, made, sums.double()), (expected.grad, activated, bias.grad))
    d_intermediate, made, sums = gemm_ops.gelu_linear_backward(grad, out, intermediate, False)
    close((d_intermediate, sums.double()), (expected.grad, bias.grad))
    assert made.shape == (0, INTERMEDIATE)
    close(gemm_ops.rows_gemm(d_intermediate, into), rows.grad)


def test_rope_in_the_epilogue_is_rope_after_the_product():
    rows, weight, bias, table = draw(R, W), draw(6 * 8, W), draw(6 * 8), draw(R, 8)
    expected = F.linear(rows, weight, bias).detach()
    rotate(expected, table.detach(), 4, False, False)
    close(gemm_ops.linear_rotate(rows, weight, bias, table, 4), expected)


def test_swiglu_and_its_products_are_those_of_autograd():
    rows, gate, up, out, grad = (
        draw(R, W),
        draw(INTERMEDIATE, W),
        draw(INTERMEDIATE, W),
        draw(W, INTERMEDIATE),
        draw(R, W),
    )
    gate_up, activated = gemm_ops.linear_swiglu(rows, gate, up, True)
    expected = F.silu(F.linear(rows, gate)) * F.linear(rows, up)
    close(activated, expected)
    close(gemm_ops.recompute_gate_up(rows, gate, up, grad), gate_up)
    F.linear(expected, out).backward(grad)
    d_gate_up, made = gemm_ops.swiglu_linear_backward(grad, out, gate_up, True)
    close(made, expected)
    same, nothing = gemm_ops.swiglu_linear_backward(grad, out, gate_up, False)
    assert torch.equal(same, d_gate_up)
    assert nothing.shape == (0, INTERMEDIATE)
    close(gemm_ops.gate_up_rows_grad(d_gate_up, gate, up), rows.grad)
    close(gemm_ops.gate_up_weights_grad(d_gate_up, rows.detach()), torch.cat((gate.grad, up.grad)))


def test_what_need_not_be_kept_is_empty():
    assert gemm_ops.linear_gelu(draw(R, W), draw(INTERMEDIATE, W), draw(INTERMEDIATE), False)[0].shape == (
        0,
        INTERMEDIATE,
    )
    assert gemm_ops.linear_swiglu(draw(R, W), draw(INTERMEDIATE, W), draw(INTERMEDIATE, W), False)[
        0
    ].shape == (0, 2 * INTERMEDIATE)


def test_linear_add_is_differentiable_but_for_its_bias():
    rows, weight, bias, added, grad = (
        draw(R, W),
        draw(INTERMEDIATE, W),
        draw(INTERMEDIATE),
        draw(R, INTERMEDIATE),
        draw(R, INTERMEDIATE),
    )
    inputs = rows, weight, added
    found = gemm_ops.linear_add(rows, weight, bias.detach(), added)
    expected = F.linear(rows, weight, bias) + added
    close(found, expected)
    of_inputs = torch.autograd.grad(expected, inputs, grad)
    close(torch.autograd.grad(found, inputs, grad), of_inputs)
    found = gemm_ops.linear_add(rows, weight, None, added)
    close(torch.autograd.grad(found, inputs, grad), of_inputs)
    with pytest.raises(RuntimeError, match="pass the bias detached"):
        gemm_ops.linear_add(rows, weight, bias, added).sum().backward()


def test_fake_ops_have_the_shapes_of_the_real_ones():
    """torch.compile believes register_fake."""
    rows, gate, up, out, intermediate = (
        torch.randn(s)
        for s in ((R, W), (INTERMEDIATE, W), (INTERMEDIATE, W), (W, INTERMEDIATE), (R, INTERMEDIATE))
    )
    both, bias = torch.randn(R, 2 * INTERMEDIATE), torch.randn(INTERMEDIATE)
    for op, arguments in (
        (gemm_ops.linear_gelu, (rows, gate, bias, True)),
        (gemm_ops.linear_gelu, (rows, gate, bias, False)),
        (gemm_ops.gelu_linear_backward, (rows, out, intermediate, True)),
        (gemm_ops.gelu_linear_backward, (rows, out, intermediate, False)),
        (gemm_ops.linear_swiglu, (rows, gate, up, True)),
        (gemm_ops.linear_swiglu, (rows, gate, up, False)),
        (gemm_ops.recompute_gate_up, (rows, gate, up, rows)),
        (gemm_ops.swiglu_linear_backward, (rows, out, both, True)),
        (gemm_ops.swiglu_linear_backward, (rows, out, both, False)),
        (gemm_ops.gate_up_rows_grad, (both, gate, up)),
        (gemm_ops.gate_up_weights_grad, (both, rows)),
        (gemm_ops.linear_add, (rows, gate, bias, intermediate)),
        (gemm_ops.linear_add, (rows, gate, None, intermediate)),
        (gemm_ops.rows_gemm, (intermediate, gate)),
        (gemm_ops.linear_rotate, (rows, gate, bias, torch.randn(R, 8), 2)),
    ):
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.fixture
def config():
    both = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    both |= {"num_hidden_layers": 2, "vocab_size": 100}
    return SimpleNamespace(vision_config=SimpleNamespace(**both), text_config=SimpleNamespace(**both))


def choose(requested, config, *, device=CUDA, dtype=torch.bfloat16, compiled=True):
    return choose_gemm_backend(requested, config, device, dtype, compiled=compiled)


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        ({"device": torch.device("cpu")}, "it needs a CUDA device, not cpu"),
        ({"compiled": False}, "compiled layers only"),
        ({"dtype": torch.float32}, "bfloat16 or float16, not float32"),
    ],
    ids=["CPU", "not compiled", "float32"],
)
def test_auto_says_why_not_quack_and_who_asks_for_it_is_refused(config, other, problem):
    choice = choose("auto", config, **other)
    assert choice.name == "torch"
    assert problem in choice.reason
    with pytest.raises(
        ValueError, match=r"machine\.gemm_backend=quack cannot serve: .*machine\.gemm_backend=auto"
    ):
        choose("quack", config, **other)
    assert choose("torch", config, **other).reason == "asked for"


def test_odd_sizes_and_other_gpus_are_named(config, monkeypatch):
    config.text_config.intermediate_size = 100
    assert "multiples of 16, not [100]" in choose("auto", config).reason
    config.text_config.intermediate_size = 128
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    assert "Hopper" in choose("auto", config).reason


def test_a_wrong_kernel_never_serves(config, monkeypatch):
    """No GPU here: the device is only named; what the kernels answer is set."""
    monkeypatch.setattr(check, "why_not_quack", lambda *_, **__: None)
    errors = {"linear_gelu": 0.002}
    found = lambda *_: [GemmError(name, error) for name, error in errors.items()]  # noqa: E731
    monkeypatch.setattr(check, "proven_gemms", found)
    assert choose("auto", config).name == "quack"
    errors["linear_swiglu"] = float("nan")
    choice = choose("auto", config)
    assert choice.name == "torch"
    assert "linear_swiglu is wrong on this machine (relative error against float64: nan)" in choice.reason
    errors["linear_swiglu"] = 0.4
    with pytest.raises(ValueError, match=r"float64: 0\.4"):
        choose("quack", config)


def small_tower(*, is_decoder):
    return TowerShape(
        num_layers=1,
        hidden_size=32,
        intermediate_size=64,
        num_heads=2,
        num_kv_heads=1,
        head_dim=128,
        is_decoder=is_decoder,
    )


@pytest.fixture
def fake_quack(tmp_path, monkeypatch):
    """A quack and a cutlass in a folder of the given name, whose import raises what quack 0.6.5 raises there."""

    def lay(folder, error):
        place = tmp_path / folder
        (place / "quack").mkdir(parents=True)
        (place / "quack" / "__init__.py").write_text(f"raise {error}")
        (place / "cutlass").mkdir()
        (place / "cutlass" / "__init__.py").touch()
        monkeypatch.syspath_prepend(place)
        return place

    for name in [*sys.modules]:
        if name.split(".")[0] in ("quack", "cutlass") or name == "vl3train.model.kernels.quack_gemm":
            monkeypatch.delitem(sys.modules, name)
    return lay


NO_FINGERPRINT = (
    """TypeError("epilogue fn depends on <f> (type m.F), which has no fail-closed semantic key.")"""
)


def test_quack_in_a_folder_of_another_name_is_told_so_with_the_way_out(fake_quack):
    place = fake_quack("libraries", NO_FINGERPRINT)
    problem = quack_import_problem()
    assert problem.startswith(
        f"quack-kernels lies in {place}; quack works only where it and its libraries lie in a"
    )
    assert "a folder called site-packages or dist-packages" in problem
    assert "install them into a virtual environment, or rename the folder" in problem


@pytest.mark.parametrize(
    ("folder", "error"),
    [("site-packages", NO_FINGERPRINT), ("libraries", "TypeError('no such kernel')")],
    ids=["another reason, in site-packages", "another error, elsewhere"],
)
def test_quack_that_fails_otherwise_is_not_wholly_installed(fake_quack, folder, error):
    fake_quack(folder, error)
    assert quack_import_problem().startswith("quack-kernels is not wholly installed (")


@pytest.mark.parametrize("gated", [False, True])
def test_the_check_sees_what_is_wrong(gated, monkeypatch, tmp_path):
    """On a CPU the ops are the formulas: right, until one of them is broken."""
    monkeypatch.setenv("VL3TRAIN_CACHE_DIR", str(tmp_path))
    shape, cpu = small_tower(is_decoder=gated), torch.device("cpu")
    found = {one.name: one for one in gemm_errors(shape, cpu, torch.bfloat16)}
    assert len(found) == (11 if gated else 7)
    assert all(one.is_right for one in found.values()), found
    broken = "linear_swiglu" if gated else "linear_gelu"
    right = getattr(gemm_ops, broken)
    monkeypatch.setattr(gemm_ops, broken, lambda *args: tuple(1.1 * x for x in right(*args)))
    found = {one.name: one for one in gemm_errors(shape, cpu, torch.bfloat16)}
    assert found.pop(broken).error > 0.05
    found.pop(f"{broken}, nothing kept")
    assert all(one.is_right for one in found.values()), found

    def without_bias(rows, weight, *_):
        return right_add(rows, weight, None, _[-1])

    monkeypatch.setattr(gemm_ops, broken, right)
    right_add = gemm_ops.linear_add
    monkeypatch.setattr(gemm_ops, "linear_add", without_bias)
    found = {one.name: one for one in gemm_errors(shape, cpu, torch.bfloat16)}
    assert found["linear_add"].is_right == gated, "the encoder's has a bias"

    def forgets(total, grad, rows):
        total.copy_(grad.t().to(total.dtype) @ rows.to(total.dtype))

    monkeypatch.setattr(gemm_accumulate, "add_weight_grad", forgets)
    found = {one.name: one for one in gemm_errors(shape, cpu, torch.bfloat16)}
    assert not gated or found["add_weight_grad"].error > 0.5

    def raises(*_):
        raise TypeError("no such kernel\nand more")

    monkeypatch.setattr(gemm_ops, broken, raises)
    problem = check.wrong_gemm([shape], cpu, torch.bfloat16)
    assert problem == f"its {broken} does not run here (TypeError: no such kernel)"


def test_ops_that_were_right_are_not_run_again_and_shares_make_the_whole(monkeypatch, tmp_path):
    monkeypatch.setenv("VL3TRAIN_CACHE_DIR", str(tmp_path))
    shape, cpu = small_tower(is_decoder=False), torch.device("cpu")

    def wrong(**of):
        return [one.name for one in proven_gemms(shape, cpu, torch.bfloat16, **of) if not one.is_right]

    assert [wrong(part=part, parts=2) for part in range(2)] == [[], []]
    monkeypatch.setattr(gemm_ops, "linear_add", lambda rows, weight, bias, added: added)
    assert wrong() == [], "each op was right in one of the shares"
    assert list(proven_gemms(shape, cpu, torch.bfloat16)) == [], "known as a whole"
    assert wrong(anew=True) == ["linear_add"]
    assert wrong() == ["linear_add"], "taken back"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["2b", "7b"])
def test_quack_on_cuda_is_right(name):
    pytest.importorskip("quack", reason="quack-kernels is not installed")
    for shape in (ENCODER, LANGUAGE_MODELS[name]):
        for found in gemm_errors(shape, CUDA, torch.bfloat16):
            assert found.is_right, f"{found} for {shape}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_full_caches_of_plans_are_emptied(monkeypatch):
    pytest.importorskip("quack", reason="quack-kernels is not installed")
    from vl3train.model.kernels import quack_gemm

    monkeypatch.setattr(quack_gemm, "MAX_PLANS", 3)
    weight, bias = (torch.randn(s, device=CUDA).bfloat16() for s in ((48, 16), (48,)))
    for num_rows in range(1, 12):
        rows = torch.randn(num_rows, 16, device=CUDA).bfloat16()
        _, activated = gemm_ops.linear_gelu(rows, weight, bias, False)
        assert activated.shape == (num_rows, 48)
    plans = quack_gemm._ACTIVATION_EPILOGUES[0]._plan_cache
    assert 1 <= len(plans) <= 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_weights_that_lie_together_are_not_copied():
    pytest.importorskip("quack", reason="quack-kernels is not installed")
    from vl3train.model.kernels.quack_gemm import _concatenated

    both = torch.randn(8, 4, device=CUDA)
    one, other = both.chunk(2)
    assert _concatenated(one, other).data_ptr() == both.data_ptr()
    torch.testing.assert_close(_concatenated(one, other), both)
    torch.testing.assert_close(_concatenated(other, one), torch.cat((other, one)))
