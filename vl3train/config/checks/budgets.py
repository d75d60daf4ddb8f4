"""Budgets of packs and samples, and the costs by which packs are balanced."""

from __future__ import annotations

from vl3train.config.choices import FrameSampling
from vl3train.config.problems import Problem
from vl3train.config.schema import TrainConfig


def cost_problems(cfg: TrainConfig) -> list[Problem]:
    """Costs that the planner cannot use."""
    names = ("token", "token_pair", "patch", "patch_pair")
    found = []
    if set(cfg.model.costs) != set(names):
        way_out = f"give {', '.join(names)}"
        found.append(Problem("model.costs", cfg.model.costs, "must name exactly four costs", way_out))
    found += [
        Problem(
            f"model.costs.{name}", value, "must be 0 or more", "leave model.costs out to use the model's own"
        )
        for name, value in cfg.model.costs.items()
        if value < 0
    ]
    return found


def budget_problems(cfg: TrainConfig) -> list[Problem]:
    """Limits that contradict each other or the number of ranks."""
    data, step, stage = cfg.data, cfg.step, cfg.stage
    found = []
    if step.global_packs % cfg.machine.dp_size:
        below = step.global_packs // cfg.machine.dp_size * cfg.machine.dp_size
        near = [str(packs) for packs in (below, below + cfg.machine.dp_size) if packs]
        what = f"does not divide over machine.dp_size={cfg.machine.dp_size} ranks"
        found.append(Problem("step.global_packs", step.global_packs, what, f"take {' or '.join(near)}"))
    if data.max_visual_tokens >= step.max_tokens:
        what = f"leaves no room for text in a pack of step.max_tokens={step.max_tokens}"
        way_out = f"raise step.max_tokens, or lower this to about {step.max_tokens * 5 // 8}"
        found.append(Problem("data.max_visual_tokens", data.max_visual_tokens, what, way_out))
    merge = max(stage.image_merge_size, stage.video_merge_size)
    patches = data.max_visual_tokens * merge**2
    if patches > step.max_patches:
        what = (
            f"a sample of data.max_visual_tokens={data.max_visual_tokens} at merge size {merge} has "
            f"{patches} patches"
        )
        way_out = f"set it to {patches} or more, or lower data.max_visual_tokens"
        found.append(Problem("step.max_patches", step.max_patches, what, way_out))
    if data.max_frames > data.max_visual_tokens:
        what = f"is more than data.max_visual_tokens={data.max_visual_tokens}, and a frame has at least one token"
        found.append(Problem("data.max_frames", data.max_frames, what, "lower it"))
    if data.frame_sampling is FrameSampling.original and data.min_frames > 1:
        what = "has no meaning with data.frame_sampling=original: the original code has no fewest frames"
        found.append(Problem("data.min_frames", data.min_frames, what, "leave it out"))
    pairs = (
        ("min_frames", "max_frames"),
        ("image_min_pixels", "image_max_pixels"),
        ("video_min_pixels", "video_max_pixels"),
    )
    for low, high in pairs:
        if getattr(data, low) > getattr(data, high):
            what = f"is more than data.{high}={getattr(data, high)}"
            found.append(Problem(f"data.{low}", getattr(data, low), what, "swap or change one of them"))
    return found
