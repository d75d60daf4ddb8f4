"""A sound recipe passes; each planted fault fails its own check, with the sample's key and the reason."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from tests.cli.indexed import words
from vl3train.cli.main import main
from vl3train.contracts.tokens import IGNORE_INDEX
from vl3train.data.render.chat_tokens import ChatTokenizer
from vl3train.preview.check_config import opened
from vl3train.preview.step_samples import decoding
from vl3train.preview.verify_data import check_decoding, check_labels, check_splits
from vl3train.preview.verify_model import (
    check_family,
    check_packed,
    check_stock,
    fitting,
    packed_model,
)

__all__ = ["words"]


def test_a_sound_run_may_start(words, capsys):
    assert main(["verify", *words, "--samples", "40"]) == 0
    out = capsys.readouterr().out
    assert out.count("passed") == 5
    assert re.search(r"gradients of 6 weights by \d\.\de-\d\d", out)
    assert "equals transformers: " in out
    assert "37 of 37 samples" in out
    assert "this run may start" in out


@pytest.fixture(scope="module")
def made(words):
    """Data, tokenizer, all samples and the model."""
    from argparse import Namespace

    with opened(Namespace(overrides=words, config=None, config_dir=None)) as (cfg, data):
        tokenizer = ChatTokenizer.from_folder(data.tokenizer_dir)
        with decoding(data) as decoder:
            _, samples = check_decoding(data, range(data.index.num_samples), decoder)
        yield data, tokenizer, samples, packed_model(cfg, data.tokenizer_dir)


def test_a_label_on_the_question_is_found(made):
    data, tokenizer, samples, _ = made
    sample = samples[0]
    labels = sample.labels.copy()
    labels[1] = sample.input_ids[2]
    verdict = check_labels(data, {**samples, 0: dataclasses.replace(sample, labels=labels)}, tokenizer)
    assert not verdict.passed
    assert verdict.reasons[0].startswith(data.index.key(0))
    nothing = dataclasses.replace(sample, labels=np.full_like(labels, IGNORE_INDEX))
    assert any("no token is supervised" in why for why in check_labels(data, {0: nothing}, tokenizer).reasons)
    assert check_labels(data, samples, tokenizer).passed


def test_a_damaged_sample_is_found(made, tmp_path):
    data, *_ = made
    shard = tmp_path / "shard.tar"
    content = bytearray(data.index.shards[0].read_bytes())
    offset = data.index.rows["part_offsets"][0].as_py()[-1]
    content[offset + 20] ^= 1
    shard.write_bytes(content)
    damaged = dataclasses.replace(data.index, shards=(shard, *data.index.shards[1:]))
    with decoding(data) as decoder:
        verdict, good = check_decoding(dataclasses.replace(data, index=damaged), [0, 1], decoder)
    assert not verdict.passed
    assert "crc32" in verdict.reasons[0]
    assert list(good) == [1]


def test_a_sample_that_comes_twice_is_found(made):
    data, *_ = made
    assert check_splits(data).passed
    plan = dataclasses.replace(data.plan)
    plan.step_packs(plan.cursor_at(0))
    order = plan.epoch_rows(0)
    order[-1] = order[-2]
    verdict = check_splits(dataclasses.replace(data, plan=plan))
    assert verdict.reasons == ["1 samples are twice in an epoch, 1 never"]


def test_a_sample_that_hangs_is_ended_at_the_limit(made):
    """Behind the firewall: the limit is so short here that every sample hangs."""
    data, *_ = made
    with decoding(dataclasses.replace(data, decode_seconds=1e-6)) as decoder:
        verdict, good = check_decoding(data, [0, 1], decoder)
    assert not good
    assert all("took longer than data.decode_seconds=1e-06 and was ended" in why for why in verdict.reasons)


def shown(samples):
    """One sample of each kind: images, a clip, text."""
    kinds = {(len(one.grids), int(one.grids[0][0]) if len(one.grids) else 0): one for one in samples.values()}
    return list(kinds.values())


def test_attention_across_samples_is_found_by_losses_and_by_gradients(made, monkeypatch):
    """One segment for the whole row: the model then sees the samples before."""
    from vl3train.contracts.records import Batch
    from vl3train.data import collate as data_collate

    *_, samples, model = made
    chosen = fitting([*shown(samples), *list(samples.values())[:6]], (4000, 9000))
    assert {int(one.grids[0][0]) > 1 if len(one.grids) else None for one in chosen} == {True, False, None}
    before = {name: weight.requires_grad for name, weight in model.named_parameters()}
    assert check_packed(model, chosen).passed
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == before
    assert not model.training
    assert len(fitting(chosen, (len(chosen[0].input_ids), 9000))) == 1
    alone = check_packed(model, chosen[:1])
    assert alone.reasons == ["fewer than two samples fit into one pack: nothing to compare"]

    def one_segment(*args, **kwargs) -> Batch:
        batch = real(*args, **kwargs)
        bounds = batch.cu_seqlens[[0, -1]]
        return dataclasses.replace(batch, cu_seqlens=bounds, segment_lengths=(sum(batch.segment_lengths),))

    real = data_collate.collate
    monkeypatch.setattr(data_collate, "collate", one_segment)
    verdict = check_packed(model, chosen)
    assert not verdict.passed
    assert any(re.search(r"loss \S+ packed, \S+ alone", why) for why in verdict.reasons)
    assert any("gradient of model.model.language_model" in why for why in verdict.reasons)


def test_a_branch_that_forgets_its_prefix_is_found(made, monkeypatch):
    from vl3train.data import collate as data_collate

    *_, samples, model = made
    first = next(one for one in shown(samples) if len(one.grids))
    other = dataclasses.replace(first, key="other", input_ids=first.input_ids.copy())
    other.input_ids[-3:-1] = first.input_ids[-3:-1][::-1]
    assert check_family(model, [first, other]).passed
    real = data_collate.collate

    def without_branches(*args, **kwargs):
        batch = real(*args, **kwargs)
        return dataclasses.replace(batch, num_branches=(0,) * len(batch.num_branches))

    monkeypatch.setattr(data_collate, "collate", without_branches)
    verdict = check_family(model, [first, other])
    assert verdict.name == "behind a shared prefix equals alone"
    assert any(why.startswith("other: loss") for why in verdict.reasons)


def test_a_forward_that_is_not_transformers_is_found(made, monkeypatch):
    """Patches of a clip are merged as if they were of an image, which packed and alone do alike."""
    from vl3train.model import packed_forward

    *_, samples, model = made
    chosen = shown(samples)
    assert check_stock(model, chosen).passed
    real = packed_forward.merge_patches
    monkeypatch.setattr(
        packed_forward, "merge_patches", lambda hidden, by_merge: real(hidden.flip(0), by_merge)
    )
    assert check_packed(model, chosen[:1]).reasons[:-1] == []
    verdict = check_stock(model, chosen)
    assert not verdict.passed
    assert "by transformers" in verdict.reasons[0]
