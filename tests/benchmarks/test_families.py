"""The GPU rows of families, on a CPU: the same records with and without shared prefixes, and their figures."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import families
from benchmarks.curves.family_runs import measure_curve
from benchmarks.data.packs import TINY, pack_batch
from benchmarks.figures import Figures
from benchmarks.gpu.family_packs import MIXES, TINY_MIXES, apart, draw_shared
from benchmarks.gpu.model import build_model
from vl3train.config.schema import PARTS
from vl3train.model.activations.flops import flop_rates
from vl3train.model.packed_forward import PackedModel
from vl3train.model.trainable import set_trainable

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", TINY_MIXES)
def test_both_ways_have_the_same_records_and_the_same_loss(name):
    hf_model = build_model("tiny", CPU, torch.float32)
    set_trainable(hf_model, PARTS)
    packed = PackedModel(hf_model, "reference")
    shared, of_families = draw_shared(1, mix=TINY_MIXES[name], ids=TINY, max_tokens=512, seed=0)
    alone = apart(of_families, max_tokens=512, seed=0)
    assert len(alone) > len(shared)
    batches = {"shared": [*map(pack_batch, shared)], "alone": [*map(pack_batch, alone)]}
    keys = {way: sorted(key for one in found for key in one.sample_keys) for way, found in batches.items()}
    assert keys["shared"] == keys["alone"]
    with torch.no_grad():
        losses = {
            way: sum(float(packed(batch).loss_sum) for batch in found) for way, found in batches.items()
        }
    assert losses["shared"] == pytest.approx(losses["alone"], rel=1e-5)
    rates = flop_rates(hf_model)
    work = {way: sum(rates.of(batch) for batch in found) for way, found in batches.items()}
    assert work["alone"] > 1.5 * work["shared"]


def test_the_mixes_are_those_of_the_aims_and_fill_packs():
    clip, image = MIXES["clip_8"], MIXES["image_4"]
    assert {4 * 1200 <= 64 * h * w // 4 <= 5000 for h, w in clip.grids} == {True}
    assert {h * w for h, w in image.grids} == {1600}
    largest = max(64 * h * w // 4 for h, w in clip.grids) + clip.records * (clip.question + clip.answer)
    assert 0.9 * 16384 < 3 * largest <= 16384


def test_each_mix_has_its_figures_as_soon_as_they_are_taken(monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["families", "gpu", "--debug", "--steps", "1", "--mix", "image_4", "alone"]
    )
    families.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [line["figure"] for line in lines] == [
        "family_ratio_image_4",
        "family_tflops_share_image_4",
        "family_tflops_share",
        "family_ratio_alone",
    ]
    assert lines[2]["value"] == lines[1]["value"]
    assert all(line["value"] > 0 and "aim" in line for line in lines)


def test_figures_of_one_word_stay_where_the_others_are_taken(monkeypatch, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path))
    for name in ("first", "second"):
        families.figures_of(True, ("torch",)).add(name, 1.0, "", "higher")
    kept = [json.loads(line)["figure"] for line in (tmp_path / "families.jsonl").read_text().splitlines()]
    assert kept == ["first", "second"]


@pytest.mark.long
def test_runs_with_shared_prefixes_draw_the_curve_of_the_records_apart(tmp_path, capsys):
    measure_curve(tmp_path / "curve", Figures("families", keep=False, packages=("torch",)), steps=4)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    found = {line["figure"]: line for line in lines}
    assert found["family_curve_distance"]["value"] < 1e-5
    losses = found["family_curve_shared"]["more"]["losses"]
    assert len(losses) == 4
    assert losses[3] < losses[0]
