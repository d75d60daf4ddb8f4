"""Every shipped config composes and may start, holds the published numbers, and says nothing twice."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from PIL import Image as PillowImage

from tests.config.conftest import workplace
from tests.long import first_of
from vl3train.config.input.groups import group_choices
from vl3train.config.input.options import SECTIONS
from vl3train.config.load import read_config
from vl3train.config.paths import shipped_folder
from vl3train.config.plain import as_plain
from vl3train.config.rules import effective_learning_rates, problems
from vl3train.config.schema import TrainConfig
from vl3train.contracts.geometry import picture_grid, token_budget_pixels
from vl3train.contracts.shapes import ENCODER, LANGUAGE_MODELS, TowerShape, tower_shapes
from vl3train.data.recipe import load_recipe
from vl3train.model.weights.processor import build_processor

__all__ = ["workplace"]

CONFIGS = shipped_folder("configs")
OF_FINETUNE = {"finetuning", "finetuning_full", "own", "one_cpu"}
"""What `vl3train finetune` chooses, tried together and not with everything."""
CHOICES = [
    choice
    for choice in itertools.product(*(group_choices(group) for group in ("stage", "model", "machine")))
    if not OF_FINETUNE.intersection(choice)
]
CHOICES += [
    ("finetuning", "own", "one_cpu"),
    ("finetuning", "2b", "one_gpu"),
    ("finetuning_full", "7b", "one_gpu"),
]


def compose(stage: str, model: str = "2b", machine: str = "one_node", *others: str) -> TrainConfig:
    start = [] if stage.startswith("1") else ["stage.init_from=checkpoint"]
    cfg, found = read_config([f"stage={stage}", f"model={model}", f"machine={machine}", *others, *start])
    assert found == []
    assert cfg is not None
    return cfg


@pytest.mark.parametrize("choices", first_of(CHOICES[::4], CHOICES), ids=["some", "all"])
def test_every_combination_may_start(workplace: Path, choices: list[tuple[str, ...]]):
    for choice in choices:
        assert [str(problem) for problem in problems(compose(*choice))] == [], choice


@pytest.mark.parametrize("machine", ["cpu", "one_gpu"])
@pytest.mark.parametrize("stage", group_choices("stage"))
def test_the_demo_may_start(workplace: Path, stage: str, machine: str):
    assert problems(compose(stage, "debug", machine, "data=demo")) == []


@pytest.mark.parametrize("other", ["tracking=wandb", "adapter=lora"])
def test_the_other_groups_may_start(workplace: Path, other: str):
    assert problems(compose("2_alignment", "2b", "one_node", other)) == []


def test_the_stages_are_the_published_ones():
    """arXiv:2501.13106, section 3, and scripts/train/stage*_2b.sh of the original code."""
    later = {"vision_encoder": 2e-6, "projector": 1e-5, "language_model": 1e-5}
    published = {
        "1_encoder_adaptation": ({"vision_encoder": 1e-5, "projector": 1e-3}, (1, 2), False),
        "2_alignment": (later, (1, 2), False),
        "3_multitask_finetuning": (later, (1, 2), True),
        "4_video_finetuning": (later, (2, 2), True),
    }
    assert [name for name in group_choices("stage") if name[0].isdigit()] == sorted(published)
    for name, (rates, merge_sizes, prune_frames) in published.items():
        cfg = compose(name)
        assert cfg.stage.name == name
        assert effective_learning_rates(cfg) == rates
        assert (cfg.stage.image_merge_size, cfg.stage.video_merge_size) == merge_sizes
        assert cfg.stage.prune_frames is prune_frames
        assert (cfg.data.fps, cfg.data.max_frames, cfg.data.max_visual_tokens) == (1, 180, 10240)
        assert (cfg.step.max_tokens, cfg.step.max_samples) == (16384, 128)
        assert (cfg.optim.schedule.value, cfg.optim.warmup_fraction, cfg.optim.weight_decay) == (
            "cosine",
            0.03,
            0,
        )
        assert (cfg.optim.beta1, cfg.optim.beta2, cfg.optim.eps) == (0.9, 0.999, 1e-8)
        assert (cfg.run.num_epochs, cfg.run.save_steps, cfg.run.keep_checkpoints) == (1, 1000, 2)


def original_size(height: int, width: int, *, factor: int, max_tokens: int) -> tuple[int, int]:
    """Of one picture, as simple_batched_resize of the original's image_processing_videollama3.py computes it."""
    min_pixels, max_pixels = 16 * factor * factor, max_tokens * factor * factor
    h_bar, w_bar = round(height / factor) * factor, round(width / factor) * factor
    if h_bar * w_bar > max_pixels:
        beta = math.sqrt((height * width) / max_pixels)
        h_bar = math.floor(height / beta / factor) * factor
        w_bar = math.floor(width / beta / factor) * factor
    if h_bar * w_bar < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        h_bar = math.ceil(height * beta / factor) * factor
        w_bar = math.ceil(width * beta / factor) * factor
    return h_bar, w_bar


SIDES = (5, 14, 27, 28, 56, 57, 112, 113, 336, 512, 720, 1080, 1920, 2833, 3000, 4000, 6000)


@pytest.mark.parametrize("stage", group_choices("stage"))
def test_images_have_the_originals_sizes(stage: str):
    cfg = compose(stage)
    merge, tokens = cfg.stage.image_merge_size, cfg.data.max_visual_tokens
    most = token_budget_pixels(max_visual_tokens=tokens, num_pictures=1, merge_size=merge)
    for height, width in itertools.product(SIDES, SIDES):
        if max(height, width) > 200 * min(height, width):
            continue
        grid = picture_grid(
            height,
            width,
            merge_size=merge,
            min_pixels=cfg.data.image_min_pixels,
            max_pixels=min(cfg.data.image_max_pixels, most),
        )
        expected = original_size(height, width, factor=14 * merge, max_tokens=tokens)
        assert (grid[0] * 14, grid[1] * 14) == expected, (height, width)


@pytest.mark.parametrize("stage", ["3_multitask_finetuning", "4_video_finetuning"])
def test_an_exports_processor_has_the_limits_of_its_stage(tokenizer_dir: Path, stage: str):
    cfg = compose(stage)
    merge = cfg.stage.image_merge_size
    processor = build_processor(tokenizer_dir, data=cfg.data, image_merge_size=merge)
    assert dict(processor.image_processor.size) == {
        "shortest_edge": 16 * (14 * merge) ** 2,
        "longest_edge": 10240 * (14 * merge) ** 2,
    }
    for (width, height), count in (((4000, 3000), 10092), ((56, 56), 16)):
        grid = processor.image_processor(PillowImage.new("RGB", (width, height)), return_tensors="pt")[
            "image_grid_thw"
        ]
        assert int(grid.prod()) // merge**2 == count


def values_of(file: Path) -> Iterator[tuple[str, Any]]:
    """Options that a group's file sets, by full name, unresolved."""
    content = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    assert isinstance(content, dict)
    content.pop("defaults", None)
    whole = file.parent == CONFIGS or file.read_text().startswith("# @package _global_")
    for section, options in content.items() if whole else [(file.parent.name, content)]:
        yield from ((f"{section}.{option}", value) for option, value in options.items())


@pytest.mark.parametrize(
    "file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda file: f"{file.parent.name}/{file.stem}"
)
def test_no_file_restates_a_default(file: Path):
    defaults = as_plain(TrainConfig())
    restated = []
    for key, value in values_of(file):
        section, option = key.split(".")
        assert option in {field.name for field in dataclasses.fields(SECTIONS[section])}, key
        if defaults[section][option] == value:
            restated.append(key)
    assert restated == []


def test_every_recipe_parses_and_every_stage_has_its_own():
    names = {file.stem for file in shipped_folder("data_recipes").glob("*.yaml")}
    for name in names:
        assert load_recipe(name, "data").sources
    for stage in group_choices("stage"):
        for data in group_choices("data"):
            cfg = compose(stage, "2b", "one_node", f"data={data}")
            assert (cfg.data.recipe or cfg.stage.recipe) in names


@pytest.mark.parametrize("name", ["2b", "7b"])
def test_parameter_counts_are_those_of_the_published_shapes(name: str):
    import torch
    from transformers import VideoLlama3Config, VideoLlama3ForConditionalGeneration

    from vl3train.model.trainable import count_parameters

    def sizes(tower: TowerShape) -> dict[str, int]:
        return {
            "hidden_size": tower.hidden_size,
            "intermediate_size": tower.intermediate_size,
            "num_attention_heads": tower.num_heads,
            "num_hidden_layers": tower.num_layers,
        }

    tied, shape = name == "2b", LANGUAGE_MODELS[name]
    config = VideoLlama3Config(
        text_config={
            "model_type": "qwen2",
            "num_key_value_heads": shape.num_kv_heads,
            "vocab_size": shape.vocab_size,
            "tie_word_embeddings": tied,
            **sizes(shape),
        },
        vision_config={"patch_size": 14, **sizes(ENCODER)},
        tie_word_embeddings=tied,
    )
    assert tower_shapes(config) == (ENCODER, shape)
    with torch.device("meta"):
        model = VideoLlama3ForConditionalGeneration(config)
    counted = {part: total for part, (_, total) in count_parameters(model).items()}
    assert counted == compose("1_encoder_adaptation", name).model.num_parameters
