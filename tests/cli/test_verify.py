"""A sound recipe passes; each planted fault fails its own check, with the sample's key and the reason."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.cli.indexed import words
from vl3train.cli.main import main
from vl3train.cli.opened import opened
from vl3train.cli.verify import packed_model
from vl3train.cli.verifying import check_decoding, check_labels, check_packed, check_splits
from vl3train.contracts.tokens import IGNORE_INDEX
from vl3train.data.tokens import ChatTokenizer

__all__ = ["words"]


def test_a_sound_run_may_start(words, capsys):
    assert main(["verify", *words, "--samples", "40"]) == 0
    out = capsys.readouterr().out
    assert out.count("passed") == 4
    assert "37 of 37 samples" in out
    assert "this run may start" in out


@pytest.fixture(scope="module")
def made(words):
    """Data, tokenizer, all samples and the model."""
    from argparse import Namespace

    with opened(Namespace(overrides=words, config=None, config_dir=None)) as (cfg, data):
        tokenizer = ChatTokenizer.from_folder(data.tokenizer_dir)
        _, samples = check_decoding(data, range(data.index.num_samples), tokenizer)
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
    data, tokenizer, _, _ = made
    shard = tmp_path / "shard.tar"
    content = bytearray(data.index.shards[0].read_bytes())
    offset = data.index.rows["part_offsets"][0].as_py()[-1]
    content[offset + 20] ^= 1
    shard.write_bytes(content)
    damaged = dataclasses.replace(data.index, shards=(shard, *data.index.shards[1:]))
    verdict, good = check_decoding(dataclasses.replace(data, index=damaged), [0, 1], tokenizer)
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
    assert verdict.reasons == ["1 samples come twice in an epoch, 1 never"]


def test_attention_across_samples_is_found(made, monkeypatch):
    """One segment for the whole row: the model then sees the samples before."""
    from vl3train.contracts.records import Batch
    from vl3train.data import batches

    _, _, samples, model = made
    chosen = list(samples.values())[:6]
    assert check_packed(model, chosen, (4000, 9000)).passed

    def one_segment(*args, **kwargs) -> Batch:
        batch = real(*args, **kwargs)
        bounds = batch.cu_seqlens[[0, -1]]
        return dataclasses.replace(batch, cu_seqlens=bounds, segment_lengths=(sum(batch.segment_lengths),))

    real = batches.collate
    monkeypatch.setattr(batches, "collate", one_segment)
    verdict = check_packed(model, chosen, (4000, 9000))
    assert not verdict.passed
    assert "packed" in verdict.reasons[0]
