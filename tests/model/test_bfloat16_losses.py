"""What bfloat16 and a GPU's kernels make of the losses that float32 gives."""

from __future__ import annotations

import copy

import pytest
import torch

from vl3train.model import packed_forward as packed_module
from vl3train.model.packed_forward import PackedModel, head_dims


def losses_of(model, batch, backend, dtype):
    """What computes the losses of the supervised tokens, and gradients, in a copy of ``model`` of that dtype."""
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter.data = parameter.data.to(dtype)
    packed = PackedModel(copied, backend)

    def compute():
        output = packed(batch)
        output.loss_sum.backward()
        return output.token_losses.detach()

    return compute


def bfloat16_model(tiny_model):
    """One whose loss bfloat16 does not change much: matrices of make_model multiply what is rounded twenty times."""
    model = tiny_model(head_dim=128, vision_head_dim=72)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.4)
    return model


def rms(tensor):
    return tensor.square().mean().sqrt().item()


ROUNDED = 0.1
"""Nats: what bfloat16 may make of a token's loss, of 6.5 on the average; on a CPU 0.045 of root mean square."""


def test_bfloat16_rounds_no_more_than_kernels_are_allowed(tiny_model, batch_of, mixed, monkeypatch):
    model, batch = bfloat16_model(tiny_model), batch_of(mixed)
    exact = losses_of(model, batch, "reference", torch.float32)()
    rounded = losses_of(model, batch, "reference", torch.bfloat16)()
    assert rms(rounded - exact) < ROUNDED
    # One segment in place of several is what a kernel with wrong bounds would give.
    bounds = packed_module.make_segments

    def one_segment(cu_seqlens, lengths, num_rows, backend, **settings):
        return bounds(cu_seqlens[[0, -1]], (num_rows,), num_rows, backend, **settings)

    monkeypatch.setattr(packed_module, "make_segments", one_segment)
    wrong = losses_of(model, batch, "reference", torch.float32)()
    assert rms(wrong - exact) > 2 * ROUNDED


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_kernels_give_the_losses_of_the_reference_without_a_sync(tiny_model, batch_of, mixed):
    from vl3train.model.attention.backends import choose_attention

    model, batch = bfloat16_model(tiny_model).to("cuda"), batch_of(mixed).to("cuda")
    losses = {}
    for backend, dtype in (("reference", torch.float32), ("torch_varlen", torch.bfloat16)):
        name = choose_attention(backend, torch.device("cuda"), head_dims(model), dtype).name
        compute = losses_of(model, batch, name, dtype)
        compute()  # kernels load and plans are made here
        torch.cuda.set_sync_debug_mode("error")
        try:
            losses[backend] = compute()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert rms(losses["torch_varlen"] - losses["reference"]) < ROUNDED
