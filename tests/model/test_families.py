"""Loss and every gradient of a family are the sums over its separate samples, through transformers' own forward."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from tests.model.conftest import IMAGE, Conversation, make_conversation, make_item
from tests.model.test_adapters import adapted, lora
from tests.model.test_packed_forward import assert_same_gradients, gradients
from vl3train.config.choices import Recompute
from vl3train.contracts.records import Pack, RenderedSample
from vl3train.contracts.tokens import IGNORE_INDEX, PATCH_VALUES
from vl3train.data.collate import collate
from vl3train.model.activations.flops import flop_rates
from vl3train.model.packed_forward import PackedModel

MEDIA = {
    "image": lambda: [make_item((1, 4, 6), 1)],
    "pruned clip": lambda: [make_item((3, 4, 4), 2, video=True, drop=(4, 6, 7, 9))],
    "several": lambda: [
        make_item((1, 2, 2), 1),
        make_item((2, 4, 4), 2, video=True, drop=(5,)),
        make_item((1, 6, 4), 2),
    ],
}
ANSWERS = ((5, 2), (1, 1), (9, 6))
"""Tokens behind the media, and how many of the last are supervised, of each record."""


def make_family(items, answers=ANSWERS) -> list[Conversation]:
    """Records of the same media with the same tokens up to the last placeholder, each with its own behind it."""
    first = make_conversation(items, text=0, answer=0)
    found = []
    for text, answer in answers:
        own = make_conversation([], text=text + answer, answer=answer)
        ids, labels = torch.cat([first.ids, own.ids]), torch.cat([first.labels, own.labels])
        found.append(Conversation(ids, labels, items))
    return found


def rendered(conversation: Conversation, **cut) -> RenderedSample:
    items, ids = conversation.items, conversation.ids.numpy()
    return RenderedSample(
        input_ids=ids,
        labels=conversation.labels.numpy(),
        patches=np.concatenate(
            [np.zeros((0, PATCH_VALUES), np.uint8), *(item.pixels.numpy() for item in items)]
        ),
        grids=np.array([item.grid for item in items], np.int64).reshape(-1, 3),
        merge_sizes=np.array([item.merge for item in items], np.int64),
        keep_mask=np.concatenate([np.zeros(0, bool), *(item.keep.numpy() for item in items)]),
        placeholder_positions=np.flatnonzero(ids >= IMAGE),
        **{"key": "alone", "source": 0, **cut},
    )


def family_samples(members: list[Conversation]) -> list[RenderedSample]:
    """A prefix up to the last placeholder, and a branch for each record."""
    length = int(torch.nonzero(members[0].ids >= IMAGE).max()) + 1
    prefix = Conversation(members[0].ids[:length], torch.full((length,), IGNORE_INDEX), members[0].items)
    samples = [rendered(prefix, key="prefix", source=-1)]
    for member in members:
        branch = Conversation(member.ids[length:], member.labels[length:], [])
        samples.append(rendered(branch, num_shared_tokens=length))
    return samples


def pack_of(samples: list[RenderedSample]):
    pack = Pack(samples=(), num_tokens=0, num_patches=0, num_supervised_tokens=0, cost=0)
    return collate(samples, pack, num_loss_chunks=2)


@pytest.mark.parametrize(
    "recompute", [Recompute.nothing, Recompute.elementwise, Recompute.mlp, Recompute.layer]
)
@pytest.mark.parametrize("media", MEDIA)
def test_a_family_equals_its_separate_samples(tiny_model, stock_gradients, media, recompute):
    torch.manual_seed(0)
    model, members = tiny_model(), make_family(MEDIA[media]())
    stock_loss, stock = stock_gradients(model, members)
    packed = PackedModel(model, "reference", recompute_vision=recompute, recompute_language=recompute).train()
    output = packed(pack_of(family_samples(members)))
    output.loss_sum.backward()
    assert output.loss_sum.item() == pytest.approx(stock_loss, rel=1e-5)
    assert len(stock) == len(list(model.parameters()))
    assert_same_gradients(gradients(model), stock)


@pytest.fixture
def crowd(mixed):
    """Two families, and samples that share nothing before, between and behind them."""
    families = [make_family(make()) for make in (MEDIA["image"], MEDIA["pruned clip"])]
    samples = [rendered(mixed[1]), *family_samples(families[0]), rendered(mixed[3]), rendered(mixed[4])]
    samples += [*family_samples(families[1]), rendered(mixed[2])]
    return samples, [*families[0], *families[1], *mixed[1:5]]


def test_families_beside_samples_that_share_nothing(tiny_model, stock_gradients, crowd):
    samples, members = crowd
    model, batch = tiny_model(), pack_of(samples)
    _, stock = stock_gradients(model, members)
    PackedModel(model, "reference").train()(batch).loss_sum.backward()
    assert_same_gradients(gradients(model), stock)
    assert batch.num_branches == (0, 3, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0)
    assert len(batch.sample_keys) == 10
    assert batch.position_ids[batch.branch_rows[0]] == batch.prefix_bounds[1]


def test_with_adapters(tiny_model, stock_gradients, crowd):
    samples, members = crowd
    model = tiny_model()
    adapted(model, lora("language_model"), ["projector", "language_model"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    plain = copy.deepcopy(model).eval()
    _, stock = stock_gradients(plain, members)
    PackedModel(model, "reference").train()(pack_of(samples)).loss_sum.backward()
    assert_same_gradients(gradients(model), stock)


@pytest.mark.parametrize("gemm_backend", [pytest.param("torch", marks=pytest.mark.long), "quack"])
def test_compiled_layers_give_the_same(tiny_model, stock_gradients, crowd, gemm_backend):
    samples, members = crowd
    model = tiny_model(layers=1, head_dim=16, vision_head_dim=16)
    _, stock = stock_gradients(model, members)
    packed = PackedModel(model, "reference", compile_layers=True, gemm_backend=gemm_backend).train()
    packed(pack_of(samples)).loss_sum.backward()
    assert_same_gradients(gradients(model), stock)


def test_useful_work_counts_the_prefix_once(tiny_model):
    model, members = tiny_model(), make_family(MEDIA["image"]())
    rates = flop_rates(model)
    together, apart = (pack_of(s) for s in (family_samples(members), [rendered(one) for one in members]))
    length = together.segment_lengths[0]
    supervised = together.supervised_positions.shape[0]
    assert supervised == apart.supervised_positions.shape[0]
    own = [len(one.ids) - length for one in members]
    pairs = length**2 + sum(b**2 + 2 * b * length for b in own)
    expected = (
        rates.patch * 24
        + rates.patch_pair * 24**2
        + rates.visual_token * 24
        + rates.token * (length + sum(own))
        + rates.token_pair * pairs // 2
        + rates.supervised_token * supervised
    )
    assert rates.of(together) == expected < rates.of(apart)
