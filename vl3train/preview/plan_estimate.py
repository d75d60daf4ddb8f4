"""Estimates of time, memory and decoding, from shapes and a few measured constants. They are not measurements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vl3train.config.choices import AdapterKind, Dtype, Memory, Recompute
from vl3train.config.rules import adapter_rates, full_rates
from vl3train.config.schema import TrainConfig
from vl3train.contracts.gpus import Gpu
from vl3train.contracts.shapes import ENCODER, LANGUAGE_MODELS, TowerShape
from vl3train.engine.memory.device import MARGIN
from vl3train.engine.optim.build import master_bytes, state_bytes
from vl3train.engine.optim.offload_schedule import SCATTERED
from vl3train.model.activations.budget import ActivationBudget, level_scale
from vl3train.model.activations.work import PackSize, RecomputeRates, TowerWork
from vl3train.model.adapter_targets import adapter_sizes, saved_in_4_bits
from vl3train.preview.plan_figures import PlanFigures

UTILISATION = 0.47
"""Share of the data sheet's TFLOP/s: 461, 475 and 478 of 989 were measured with packed steps of the 2B on three H100s
(as machine=one_h100 runs, recomputation not counted): benchmarks/log.md, round nine."""

IMAGE_PATCHES_PER_CORE_SECOND = 720_000
"""JPEG 1024 x 768 decoded, resized and patchified: 180 a second a core, 4015 patches each. This and the next two are
of benchmarks/results/decode.jsonl."""
CLIP_FRAMES_PER_CORE_SECOND = 41
"""H.264 720p at 25 frames a second, sampled at 1: 1029 source frames a second a core."""
STORED_FRAMES_PER_CORE_SECOND = 2900
"""Frames stored as JPEG in the shard (`vl3train index --store-frames`), decoded, pruned and patchified."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Estimates for one GPU model; ``None`` where a constant is missing."""

    step_seconds: float
    run_hours: float
    peak_gib: float | None  # of the fullest rank
    memory: dict[str, float]  # its parts in GiB
    recompute: str  # what machine.memory=auto recomputes of a full pack, by layers; empty where it is given
    cores: float  # that decode images, and clips from their stored frames, as fast as the GPUs train
    cores_unstored: float  # with clips decoded from 720p video


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """The two towers of a model, and the parameters of each part."""

    language: TowerShape
    encoder: TowerShape
    num_parameters: Mapping[str, int]


def published_sizes(cfg: TrainConfig) -> ModelSizes | None:
    """Those of a published model; None for any other."""
    language = LANGUAGE_MODELS.get(cfg.model.name)
    if language is None:
        return None
    return ModelSizes(language=language, encoder=ENCODER, num_parameters=cfg.model.num_parameters)


def estimate(
    cfg: TrainConfig, figures: PlanFigures, gpu: Gpu, utilisation: float, sizes: ModelSizes | None = None
) -> Estimate:
    """Time from the work of a step, memory from shapes, cores from decode rates. ``sizes``: as rank_memory takes it."""
    trained = set(full_rates(cfg))
    # The backward pass goes through the language model even when it is frozen: parts before it are trained.
    passes = (
        2 + ("language_model" in trained),
        3 if "vision_encoder" in trained else 2 if "vision_encoder" in adapter_rates(cfg) else 1,
    )
    kiloflops = passes[0] * figures.language_work + passes[1] * figures.encoder_work
    ranks = cfg.machine.dp_size
    seconds = (
        kiloflops * 1e3 * float(figures.rank_balance.mean()) / (ranks * gpu.teraflops * 1e12 * utilisation)
    )
    steps = figures.steps_in_epoch
    images = figures.image_patches / steps / IMAGE_PATCHES_PER_CORE_SECOND
    stored, unstored = (
        (images + figures.clip_frames / steps / rate) / seconds
        for rate in (STORED_FRAMES_PER_CORE_SECOND, CLIP_FRAMES_PER_CORE_SECOND)
    )
    memory, recompute = rank_memory(cfg, gpu, sizes)
    return Estimate(
        step_seconds=seconds,
        run_hours=seconds * figures.num_steps / 3600,
        peak_gib=sum(memory.values()) if memory else None,
        memory=memory,
        recompute=recompute,
        cores=stored,
        cores_unstored=unstored,
    )


def values_kept(level: Recompute, tower: TowerShape) -> int:
    """Values that one layer keeps of each row until the backward pass, as config.schema.Recompute counts them."""
    hidden, intermediate = tower.hidden_size, tower.intermediate_size
    if level is Recompute.offload:
        return 0
    if level is Recompute.layer:
        return hidden
    if level is Recompute.nothing:
        return 9 * hidden + 3 * intermediate
    # A gated MLP has two rows of intermediate_size: gate and up.
    rows, inner = (5 * hidden, 2 * intermediate) if tower.is_decoder else (6 * hidden, intermediate)
    return rows if level is Recompute.mlp else rows + inner


def rank_memory(cfg: TrainConfig, gpu: Gpu, sizes: ModelSizes | None = None) -> tuple[dict[str, float], str]:
    """GiB of one rank by what holds it, for a full pack; empty for a model of unknown shapes.

    ``sizes`` are those of a model of one's own; None: the published ones of its name.
    The same sum gives 23 GiB for a pure-bfloat16 step of the 2B that took 20 on an H100: rather too much. The second
    part of the result is ``Estimate.recompute``.
    """
    sizes = sizes or published_sizes(cfg)
    if sizes is None:
        return {}, ""
    shape, encoder, num_parameters = sizes.language, sizes.encoder, sizes.num_parameters
    machine, ranks = cfg.machine, cfg.machine.dp_size
    width = 2 if machine.dtype is Dtype.bfloat16 else 4
    parameters = sum(num_parameters.values())
    towers = {"language_model": shape, "vision_encoder": encoder}
    full = sum(num_parameters[part] for part in full_rates(cfg))
    trained, frozen_bytes = full, 0
    if cfg.adapter.kind is AdapterKind.lora:
        head = shape.vocab_size * shape.hidden_size
        full += head * len({"lm_head", "embed_tokens"} & set(cfg.adapter.modules_to_save))
        trained = full + sum(adapter_sizes(cfg.adapter, towers).values())
        # peft trains copies of what trains in full beside adapters, and keeps the originals.
        parameters += trained
        frozen_bytes = -saved_in_4_bits(cfg.adapter, towers, width)
    tokens, patches = cfg.step.max_tokens, cfg.step.max_patches

    states = 0 if machine.offload_optimizer else state_bytes(cfg.optim)

    def split(size: float, from_stage: int) -> float:
        return size / ranks if machine.zero_stage >= from_stage else size

    inner = tokens * (8 * shape.hidden_size + 3 * shape.intermediate_size) * width
    encoder_inner = patches * (10 * encoder.hidden_size + 2 * encoder.intermediate_size) * width
    parts = {
        "weights": split(parameters * width + frozen_bytes, 3),
        "gradients": split(trained * 4, 2),
        "masters and AdamW": split(trained * (master_bytes(cfg.optim, machine) + states), 1),
        "activations": float(max(inner, encoder_inner)),  # of one layer at work
        "logits": machine.loss_chunk_tokens * shape.vocab_size * (width + 8),
    }
    recompute = ""
    if machine.memory is Memory.given:
        kept_token = values_kept(machine.recompute_language, shape)
        kept_patch = values_kept(machine.recompute_vision, encoder)
        kept = width * (tokens * shape.num_layers * kept_token + patches * encoder.num_layers * kept_patch)
    else:
        on_host = split(trained * state_bytes(cfg.optim), 1) if machine.offload_optimizer else 0
        room = int(gpu.gigabytes * 1e9 * (1 - MARGIN) - SCATTERED * on_host - sum(parts.values()))
        kept, recompute = chosen(cfg, sizes, room, width)
    parts["activations"] += kept
    return {name: size / 2**30 for name, size in parts.items()}, recompute


def chosen(cfg: TrainConfig, sizes: ModelSizes, room: int, width: int) -> tuple[int, str]:
    """Bytes that a full pack keeps of ``room`` with machine.memory=auto, and what it recomputes, in words.

    Recomputed attention is not counted, so a run may choose slightly differently.
    """
    in_part = cfg.machine.compile_layers or cfg.machine.zero_stage < 3
    towers: dict[str, tuple[dict[Recompute, int], TowerWork]] = {}
    for name, tower in (("vision", sizes.encoder), ("language", sizes.language)):
        kept = {level: width * values_kept(level, tower) for level in level_scale(in_part=in_part)}
        mlp = 2 * tower.hidden_size * tower.intermediate_size * (1 + tower.is_decoder)
        every = mlp + 8 * tower.hidden_size**2 + 2 * tower.hidden_size * tower.intermediate_size
        work = TowerWork(
            num_layers=tower.num_layers,
            mlp_row=mlp,
            layer_row=mlp + 8 * tower.hidden_size**2,
            projection_row=2 * tower.hidden_size**2,
            layer_pair=0,
            forward_row=every,
            backward_row=2 * every,
            has_backward=True,
        )
        towers[name] = kept, work
    budget = ActivationBudget(
        total_bytes=room,
        vision_bytes=room,
        vision_kept=towers["vision"][0],
        language_kept=towers["language"][0],
        rates=RecomputeRates(vision=towers["vision"][1], language=towers["language"][1], supervised_token=0),
    )
    size = PackSize(cfg.step.max_patches, 0, cfg.step.max_tokens, 0)
    plan = budget.plan(size)
    return sum(budget.kept_bytes(size, plan)), str(plan)
