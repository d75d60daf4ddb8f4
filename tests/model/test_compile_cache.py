"""Compiled layers are found on disk by a later process; what was changed since is not."""

from __future__ import annotations

import abc
import pickle
import warnings

import pytest
import torch

from vl3train.config.choices import Recompute
from vl3train.engine.monitor.compile_log import take_compiles
from vl3train.model.attention.backends import make_segments
from vl3train.model.compiling import compiled, fix_shape, sources_tag
from vl3train.model.layers.layers import decoder_layer
from vl3train.model.layers.tower import Tower, layer_runner, run_layers
from vl3train.model.packed_forward import PackedModel


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_DEBUG_COMPILE", "1")  # nothing here is about fast kernels
    yield
    torch._dynamo.reset()


def as_a_new_process():
    """Nothing compiled is left in memory."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    take_compiles()


def a_layer(model, batch):
    """One decoder layer: both halves with their own backward passes, and the ops within them."""
    text = model.model.language_model
    embedded_TH = text.embed_tokens(batch.input_ids)
    cos_1TD, sin_1TD = text.rotary_emb(embedded_TH.unsqueeze(0), batch.position_ids.unsqueeze(0))
    segments = make_segments(
        batch.cu_seqlens, batch.segment_lengths, len(embedded_TH), "reference", compiled=True
    )
    tower = Tower(
        layers=text.layers,
        body=decoder_layer,
        run_layer=layer_runner(compiled=True),
        compiled=True,
        gemm_backend="torch",
    )
    rope = cos_1TD.squeeze(0), sin_1TD.squeeze(0)
    return run_layers(tower, embedded_TH, rope, segments, [Recompute.elementwise]).sum()


def a_model(model, batch):
    packed = PackedModel(model, "reference", recompute_language=Recompute.elementwise, compile_layers=True)
    return packed.train()(batch).loss_sum


@pytest.mark.long
@pytest.mark.parametrize("loss", [a_layer, a_model])
def test_layers_are_found_on_disk_and_give_the_same_gradients(
    tiny_model, batch_of, text_only, empty_cache, loss
):
    found = []
    for _ in range(2):
        as_a_new_process()
        model = tiny_model(layers=2)
        loss(model, batch_of(text_only)).backward()
        found.append((take_compiles(), {name: p.grad for name, p in model.named_parameters()}))
    (first, expected), (second, gradients) = found
    assert first.on_disk == 0
    assert second.on_disk == second.graphs == first.graphs > 0
    for name, gradient in gradients.items():
        assert (gradient is None) == (expected[name] is None), name
        assert gradient is None or torch.equal(gradient, expected[name]), name


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows):
        return rows * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


class Wrong(Doubled):
    @staticmethod
    def backward(ctx, gradient):
        return gradient * 3


def test_another_backward_pass_is_not_taken_from_the_disk(empty_cache):
    for function, factor, on_disk in ((Doubled, 2.0, 0), (Doubled, 2.0, 1), (Wrong, 3.0, 0)):
        as_a_new_process()
        rows = torch.ones(5, 3, requires_grad=True)
        compiled(function.apply, enabled=True)(rows).sum().backward()
        assert torch.equal(rows.grad, torch.full((5, 3), factor))
        assert take_compiles().on_disk == on_disk


def test_a_process_in_which_another_module_imported_torch_first_finds_it(empty_cache, monkeypatch):
    """By itself pickle names a memory format by the first module that has torch, and so does the key of a graph."""
    for on_disk in (0, 1):
        as_a_new_process()
        rows = torch.ones(5, 3, requires_grad=True)
        fix_shape(rows)
        compiled(Doubled.apply, enabled=True)(rows).sum().backward()
        assert take_compiles().on_disk == on_disk
        monkeypatch.setattr(abc, "torch", torch, raising=False)  # a module that was there before torch
    assert pickle.loads(pickle.dumps(torch.channels_last)) is torch.channels_last


def test_an_op_whose_backward_pass_is_another_is_not_taken_from_the_disk(empty_cache):
    """A graph has an op's name, not its code: the tag has that."""
    factor = 2

    @torch.library.custom_op("test_compile_cache::doubled", mutates_args=())
    def doubled(rows: torch.Tensor) -> torch.Tensor:
        return rows * 2

    doubled.register_fake(torch.empty_like)
    doubled.register_autograd(lambda ctx, gradient: gradient * factor)

    def gradient_and_found():
        as_a_new_process()
        rows = torch.ones(5, 3, requires_grad=True)
        compiled(lambda rows: doubled(rows) + 1, enabled=True)(rows).sum().backward()
        return rows.grad[0, 0].item(), take_compiles().on_disk

    assert gradient_and_found() == (2, 0)
    assert gradient_and_found() == (2, 1)
    factor = 3
    assert gradient_and_found() == (2, 1), "torch does not see it: where this fails, the tag can go"
    with torch.compiler.config.patch(cache_key_tag="of other sources"):
        assert gradient_and_found() == (3, 0)


def test_torchs_warning_of_its_own_softmax_is_silent_and_another_is_not():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        compiled(abs, enabled=True)
        text = "\nOnline softmax is disabled on the fly since Inductor decides to\nsplit the reduction."
        for message in (text, "another"):
            warnings.warn(message, stacklevel=1)
    assert [str(one.message) for one in seen] == ["another"]


def test_the_tag_changes_with_the_sources(tmp_path):
    tags = []
    for name, text in (("ops.py", "1"), ("ops.py", "2"), ("more.py", "2"), ("notes.txt", "2")):
        (tmp_path / name).write_text(text)
        sources_tag.cache_clear()
        tags.append(sources_tag(tmp_path))
    assert len(set(tags)) == 3
    assert tags[2] == tags[3]
    compiled(abs, enabled=True)
    compiled(abs, enabled=True)
    assert torch.compiler.config.cache_key_tag.count("vl3train-") == 1
