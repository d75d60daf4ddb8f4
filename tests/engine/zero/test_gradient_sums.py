"""Gradients come into their sums whole, whatever their format and size."""

from __future__ import annotations

import pytest
import torch

from tests.engine.packs import collate_samples, random_samples
from tests.engine.zero.states import write_state
from tests.long import first_of
from vl3train.config.choices import Recompute
from vl3train.config.optim_options import OptimConfig
from vl3train.config.schema import MachineConfig
from vl3train.engine.ranks import join
from vl3train.engine.zero import gradient_sums
from vl3train.engine.zero.engine import Zero
from vl3train.engine.zero.gradient_sums import add_gradients, put_gradients
from vl3train.model.kernels import gemm_accumulate
from vl3train.model.kernels.gemm_accumulate import add_gate_up_weights_grad, add_weight_grad
from vl3train.model.layers.tower import FUNCTIONS_ARE_REPEATED
from vl3train.model.packed_forward import PackedModel
from vl3train.model.trainable import set_trainable
from vl3train.model.weights.from_parts import load_model


@pytest.fixture
def rank():
    return join(MachineConfig())


def pairs(device, sizes):
    torch.manual_seed(0)
    return [(torch.randn(size, device=device), torch.randn(size, device=device).bfloat16()) for size in sizes]


def check(device, sizes):
    for act, keeps in ((put_gradients, 0), (add_gradients, 1)):
        given = pairs(device, sizes)
        wanted = [keeps * total.double() + gradient.double() for total, gradient in given]
        act(given)
        for (total, _), expected in zip(given, wanted, strict=True):
            torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-6)
        act([])


def test_sums_on_a_cpu():
    check("cpu", (1, 7, 4096, 5000))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_sums_on_a_gpu():
    """Sums that begin anywhere, as in DeepSpeed's flat buffers, and both ways to add."""
    large = gradient_sums.LARGE
    check("cuda", (1, 7, 4096, large - 1, large, large + 3))
    flat = torch.randn(2 * large + 9, device="cuda")
    before, gradient = flat.clone(), torch.randn(large + 1, device="cuda").bfloat16()
    add_gradients([(flat[3 : large + 4], gradient)])
    before[3 : large + 4] += gradient.float()
    assert torch.equal(flat, before)


def check_gemms(device, dtype, tolerance):
    """What products add to sums that hold something already, against float64."""
    torch.manual_seed(0)
    num_rows, width, wide = 333, 64, 96
    d_gate_up, rows, grad = (
        torch.randn(num_rows, columns, device=device).to(dtype) for columns in (2 * wide, width, width)
    )
    activated = torch.randn(num_rows, wide, device=device).to(dtype)
    gate_up, down = torch.randn(2 * wide, width, device=device), torch.randn(width, wide, device=device)
    d_gate, d_up = d_gate_up.double().unflatten(1, (-1, 2)).unbind(2)
    wanted = (
        gate_up.double() + torch.cat((d_gate, d_up), 1).t() @ rows.double(),
        down.double() + grad.double().t() @ activated.double(),
    )
    add_gate_up_weights_grad(gate_up, d_gate_up, rows)
    add_weight_grad(down, grad, activated)
    for total, expected in zip((gate_up, down), wanted, strict=True):
        assert (total - expected).norm() / expected.norm() < tolerance


def test_products_add_to_sums_on_a_cpu():
    check_gemms("cpu", torch.float32, 1e-6)
    check_gemms("cpu", torch.bfloat16, 1e-6)  # nothing is rounded to it


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_products_add_to_sums_on_a_gpu():
    pytest.importorskip("quack", reason="quack-kernels is not installed")
    check_gemms("cuda", torch.bfloat16, 1e-3)


@pytest.mark.parametrize("gemm_backend", ["torch", "quack"])
def test_gate_and_up_of_frozen_layers_lie_together(tiny_model_dir, rank, tmp_path, gemm_backend):
    """And are saved, each whole, as before."""
    hf_model = load_model(tiny_model_dir, dtype=torch.bfloat16)
    set_trainable(hf_model, ["vision_encoder", "projector"])
    before = {name: tensor.clone() for name, tensor in hf_model.state_dict().items()}
    packed = PackedModel(hf_model, "reference", compile_layers=True, gemm_backend=gemm_backend)
    trained = [parameter for parameter in packed.parameters() if parameter.requires_grad]
    engine = Zero(
        packed,
        torch.optim.SGD([{"name": "all", "params": trained, "lr": 0.0}]),
        machine=MachineConfig(),
        optim=OptimConfig(max_grad_norm=0),
        num_micro_batches=1,
        rank=rank,
    )
    for layer in hf_model.model.language_model.layers:
        gate, up = layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight
        assert (up.data_ptr() == gate.data_ptr() + gate.nbytes) == (gemm_backend == "quack")
        assert gate.is_contiguous()
        assert up.is_contiguous()
    after = hf_model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    write_state(engine, tmp_path)
    with torch.no_grad():
        hf_model.model.language_model.layers[0].mlp.up_proj.weight.zero_()
    engine.load(tmp_path)
    after = hf_model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def sums_of_two_steps(tiny_model_dir, rank, level, own):
    """Sums and gradient norm of two steps of two micro-batches under ZeRO-1 in bfloat16; rate 0."""
    hf_model = load_model(tiny_model_dir, dtype=torch.bfloat16)
    packed = PackedModel(
        hf_model, "reference", recompute_language=level, compile_layers=True, gemm_backend="quack"
    )
    if not own:
        packed.weights_with_sums = list
    engine = Zero(
        packed,
        torch.optim.SGD([{"name": "all", "params": list(packed.parameters()), "lr": 0.0}]),
        machine=MachineConfig(),
        optim=OptimConfig(max_grad_norm=0),
        num_micro_batches=2,
        rank=rank,
    )
    engine.train(True)
    samples = random_samples(hf_model.config, count=4)
    names = {parameter: name for name, parameter in hf_model.named_parameters()}
    found = []
    for _ in range(2):
        for last, first in enumerate((0, 2)):
            output = engine.forward(collate_samples(samples[first : first + 2]))
            engine.backward(output.loss_sum / 40)
            if not last:
                engine.finish_micro_batch()
        (group,), (totals,) = engine.optimizer.bf16_groups, engine.optimizer.fp32_groups_gradients
        sums = {names[weight]: total.clone() for weight, total in zip(group, totals, strict=True)}
        found.append((sums, engine.step(torch.zeros(0)).wait()))
    return found


@pytest.mark.parametrize(
    "levels",
    first_of([Recompute.elementwise, Recompute.layer], [Recompute.mlp]),
    ids=["most and least", "mlp"],
)
def test_layers_add_what_they_would_have_given(tiny_model_dir, rank, monkeypatch, compile_on_cpu, levels):
    """With sums of the layers' own, at each level, and without; the graphs of the encoder are the same in all runs."""
    added, plain = [], gemm_accumulate.add_weight_grad_reference
    monkeypatch.setattr(
        gemm_accumulate, "add_weight_grad_reference", lambda *args: added.append(1) or plain(*args)
    )
    without = sums_of_two_steps(tiny_model_dir, rank, Recompute.elementwise, own=False)
    assert not added
    for level in levels:
        found = sums_of_two_steps(tiny_model_dir, rank, level, own=True)
        repeated = FUNCTIONS_ARE_REPEATED or level is not Recompute.layer
        assert len(added) == 2 * 2 * 2 * repeated, "layers, micro-batches, steps"
        added.clear()
        for (expected, norm), (sums, own_norm) in zip(without, found, strict=True):
            assert own_norm == pytest.approx(norm, rel=1e-3)
            for name, total in sums.items():
                # Without, each gradient of a micro-batch is rounded to bfloat16.
                assert (total - expected[name]).norm() <= 4e-3 * expected[name].norm(), name


def test_the_model_alone_adds_nothing_to_the_sums_of_an_engine(tiny_model_dir, rank, compile_on_cpu):
    """An engine passes its sums with each forward pass, and leaves nothing on the weights."""
    hf_model = load_model(tiny_model_dir, dtype=torch.bfloat16)
    # At the level of the test above: the same graphs.
    level = Recompute.elementwise
    packed = PackedModel(
        hf_model, "reference", recompute_language=level, compile_layers=True, gemm_backend="quack"
    ).train()
    engine = Zero(
        packed,
        torch.optim.SGD([{"name": "all", "params": list(packed.parameters()), "lr": 0.0}]),
        machine=MachineConfig(),
        optim=OptimConfig(max_grad_norm=0),
        num_micro_batches=1,
        rank=rank,
    )
    assert engine._sums
    packed(collate_samples(random_samples(hf_model.config, count=2))).loss_sum.backward()
    assert not any(total.any() for sums in engine._sums for total in sums)
    assert all(weight.grad is not None for weight in packed.parameters())
