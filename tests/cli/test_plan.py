"""The command's figures are those of the plan and the index; the picture is one; estimates say so."""

from __future__ import annotations

import dataclasses
import doctest
import io

import numpy as np
import pytest
from PIL import Image

from tests.cli.indexed import words
from vl3train.cli import arguments
from vl3train.cli.main import main
from vl3train.config.load import load_config
from vl3train.contracts.gpus import GPUS
from vl3train.data.pipeline import open_data
from vl3train.preview import plan_picture
from vl3train.preview.plan_estimate import estimate, rank_memory
from vl3train.preview.plan_figures import plan_figures

__all__ = ["words"]


def test_doctests():
    for module in (arguments, plan_picture):
        assert doctest.testmod(module).failed == 0


@pytest.fixture(scope="module")
def made(words, tmp_path_factory, tiny_model_dir):
    """The config, its data and the plan's figures."""
    from vl3train.config.paths import tokenizer_source
    from vl3train.model.weights.processor import build_processor

    cfg, folder = load_config(words), tmp_path_factory.mktemp("processor")
    build_processor(tokenizer_source(cfg)).save_pretrained(folder)
    data = open_data(cfg, tokenizer_dir=folder, held_out=False, build=False)
    return cfg, data, plan_figures(cfg, data)


def test_check_tells_the_steps_of_the_plan(made, words, capsys):
    _, data, figures = made
    assert main(["check", *words, "run.num_epochs=1.5"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    steps = data.plan.total_steps(1.5)
    assert f"schedule {steps} steps, 1.5 virtual epochs ({figures.steps_in_epoch} steps an epoch)" in told
    assert main(["check", *words, "run.num_steps=7"]) == 0
    assert "schedule 7 steps (" in " ".join(capsys.readouterr().out.split())
    assert main(["check", *words, "data.max_frames=7"]) == 0
    assert "schedule 1 virtual epoch," in " ".join(capsys.readouterr().out.split()), (
        "no index of these settings"
    )


def test_figures_add_up_to_the_index_and_to_all_steps(made):
    _, data, figures = made
    table, plan = data.plan.table, data.plan
    assert figures.epoch.samples == 37
    for groups in (figures.sources, figures.modalities):
        for name in ("samples", "tokens", "patches", "supervised_tokens"):
            assert sum(getattr(group, name) for group in groups) == getattr(figures.epoch, name)
    assert {group.name: group.samples for group in figures.sources} == {
        "pictures": 9,
        "clips": 8,
        "words": 20,
    }
    assert {group.name: group.samples for group in figures.modalities} == {"text": 23, "image": 9, "video": 5}
    assert figures.epoch.tokens == table.num_tokens.sum()
    steps = [plan.step_packs(plan.cursor_at(step)) for step in range(plan.steps_in_epoch(0) - 1)]
    balance = [max(p.cost for p in packs) * len(packs) / sum(p.cost for p in packs) for packs in steps]
    assert figures.balance == pytest.approx(balance)
    assert figures.token_fill == pytest.approx([sum(p.num_tokens for p in packs) / 1600 for packs in steps])
    assert (figures.rank_balance <= figures.balance + 1e-9).all()
    clips = [row for row in range(37) if data.index.lengths(row).modality == "video"]
    assert figures.clip_frames == sum(t for row in clips for t, _, _ in data.index.lengths(row).grids)
    work = (figures.language_work + figures.encoder_work) * figures.steps_in_epoch
    assert work == pytest.approx(float(plan.entry_costs(np.arange(37)).sum()))


def test_the_command_prints_and_draws(words, tmp_path, capsys):
    assert main(["plan", *words, "--picture", str(tmp_path / "plan.png"), "--gpu", "4090"]) == 0
    out = capsys.readouterr().out
    for text in (
        "steps in the run" if False else "in a virtual epoch",
        "p99",
        "37",
        "words",
        "video",
        "tokens of a sample, text",
    ):
        assert text in out
    assert "not measured there" in out
    assert "no sample is rejected" in out
    with Image.open(io.BytesIO((tmp_path / "plan.png").read_bytes())) as picture:
        assert picture.format == "PNG"
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 20


def test_what_does_not_fit_is_counted_by_reason(made):
    cfg, data, _ = made
    plan = dataclasses.replace(data.plan, step=dataclasses.replace(cfg.step, max_tokens=60))
    index = dataclasses.replace(
        data.index, rejected=(("a/0", "0.jpg: cut off at 12"), ("b/1", "0.jpg: cut off at 9"))
    )
    figures = plan_figures(cfg, dataclasses.replace(data, plan=plan, index=index))
    too_long = int((data.plan.table.num_tokens > 60).sum())
    assert 2 < too_long < 37
    assert [(count, key) for _, count, key in figures.rejected] == [
        (too_long, data.index.key(plan.oversized_samples[0])),
        (2, "a/0"),
    ]
    assert figures.rejected[0][0].startswith("larger than a pack (step.max_tokens=60")
    assert figures.epoch.samples == 37 - too_long


def test_without_an_index_it_says_how_to_make_one(words, tmp_path, capsys):
    assert main(["plan", *words, "data.fps=1.5"]) == 1
    assert "vl3train index" in capsys.readouterr().err


def test_estimates_follow_their_constants(made):
    cfg, _, figures = made
    h100, h200 = (estimate(cfg, figures, GPUS[gpu], 0.2) for gpu in ("h100", "h200"))
    assert h100.step_seconds == h200.step_seconds  # the same arithmetic, more memory
    assert estimate(cfg, figures, GPUS["h100"], 0.4).step_seconds == pytest.approx(h100.step_seconds / 2)
    assert h100.cores_unstored > h100.cores > 0
    assert h100.peak_gib is None  # nothing is known of the debug model's shapes


def test_memory_is_near_what_was_measured(workplace):
    """20 GiB on one H100: 2B, 16 384 tokens and 48 000 patches, all of it recomputed, pure bfloat16 (8 bytes a
    parameter). The estimate is a little above: gradients and the largest activations are not there at once."""
    stage = ["stage=3", "model=2b", "stage.init_from=checkpoint", "step.max_patches=48000"]
    cfg = load_config([*stage, "machine.dp_size=1"])
    parts, levels = rank_memory(cfg, GPUS["h100"])
    assert levels == ""
    pure_bfloat16 = parts["weights"] * 4 + parts["activations"] + parts["logits"]
    assert 20 < pure_bfloat16 < 24
    split = load_config([*stage, "machine.dp_size=8"])
    assert rank_memory(split, GPUS["h100"])[0]["masters and AdamW"] == pytest.approx(
        parts["masters and AdamW"] / 8
    )


def test_states_on_the_host_take_no_memory_of_the_gpu(workplace):
    words = ["stage=3", "model=2b", "stage.init_from=checkpoint", "machine.dp_size=2"]
    there, away = (
        rank_memory(load_config([*words, f"machine.offload_optimizer={on_host}"]), GPUS["h100"])[0]
        for on_host in ("false", "true")
    )
    masters = away.pop("masters and AdamW")
    assert masters == pytest.approx(there.pop("masters and AdamW") / 3)
    assert away == there
    words += ["machine.offload_optimizer=true", "optim.master_dtype=split"]
    split = rank_memory(load_config(words), GPUS["h100"])[0]
    assert split.pop("masters and AdamW") == pytest.approx(masters / 2)
    assert split == there


def test_what_stays_free_between_means_on_their_way_is_nobody_elses(workplace):
    """5 % of their bytes, in which memory=auto lets nothing be kept."""
    words = ["stage=3", "model=2b", "stage.init_from=checkpoint", "machine=one_h100", "machine.dp_size=1"]
    parts, _ = rank_memory(load_config(words), GPUS["h100"])
    trained = sum(load_config(words).model.num_parameters.values())
    free = GPUS["h100"].gigabytes * 1e9 * 0.97 / 2**30 - sum(parts.values())
    a_layer = 65536 * 2 * 4304 / 2**30  # of the encoder, the least by which levels differ
    assert 0.05 * 8 * trained / 2**30 <= free < 0.05 * 8 * trained / 2**30 + a_layer


@pytest.mark.parametrize(
    ("gpu", "words"),
    [
        ("h100", []),
        ("h100", ["machine.zero_stage=3"]),
        ("h200", []),
        ("4090", ["machine.zero_stage=3", "step.max_tokens=40960", "step.max_patches=163840"]),
    ],
)
def test_memory_auto_fills_the_gpu_it_is_told_and_says_how(workplace, gpu, words):
    start = ["stage=3", "model=2b", "stage.init_from=checkpoint", "machine.dp_size=8", "machine.memory=auto"]
    parts, levels = rank_memory(load_config([*start, *words]), GPUS[gpu])
    has = GPUS[gpu].gigabytes * 1e9 / 2**30
    assert sum(parts.values()) < has
    everything_kept = "encoder 27 x elementwise, language model 28 x elementwise"
    assert (levels == everything_kept) == (gpu == "h200")
    assert ("offload" in levels) == (gpu == "4090")
    if gpu != "h200":
        assert sum(parts.values()) > 0.9 * has
