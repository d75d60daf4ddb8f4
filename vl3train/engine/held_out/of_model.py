"""The evaluation of a model that is not in training: figures on the console, generated answers in a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vl3train.config.schema import TrainConfig
from vl3train.contracts.records import Batch
from vl3train.data.loader import FailedEntry, OpenData
from vl3train.data.pipeline import evaluation_batches, open_data
from vl3train.data.recipe import Recipe, load_recipe
from vl3train.data.render.chat_tokens import ChatTokenizer
from vl3train.engine.held_out.answers import (
    PredictionsInProgress,
    answer_table,
    generate_predictions,
    name_media,
)
from vl3train.engine.held_out.losses import evaluate, table_rows
from vl3train.engine.held_out.unread import unread_remarks
from vl3train.engine.monitor.console import Console
from vl3train.engine.ranks import Rank, join
from vl3train.engine.start.data import unused_remarks
from vl3train.model.attention.backends import choose_attention
from vl3train.model.attention.qkv_op import SERVED
from vl3train.model.generation.ends import end_ids
from vl3train.model.generation.generate import Generator
from vl3train.model.packed_forward import PackedModel, head_dims
from vl3train.model.weights.hf_folder import load_trained, locate_trained
from vl3train.scoring.metrics import metric_problem
from vl3train.scoring.predictions import Prediction, score_predictions, write_predictions


def evaluate_model(
    cfg: TrainConfig,
    model_dir: Path,
    *,
    tokenizer_dir: Path,
    metrics: Sequence[str] | None,
    out: Path,
) -> dict[str, dict[str, Any]]:
    """Figures of each source: loss and accuracy of the true answers, and the scores of generated ones.

    Args:
        cfg: how samples are rendered and packed, and where they lie.
        model_dir: a run, a checkpoint or an export.
        tokenizer_dir: folder with its tokenizer.json.
        metrics: how generated answers of all sources are scored; None: each as its recipe says.
        out: file of generated answers. They are gathered beside it: an evaluation that was stopped goes on.

    Raises:
        ValueError: the recipe has no held-out samples, or a metric cannot be used.
        RunError: a shard or an index cannot be used, or a metric fails on an answer.
        OSError: ``model_dir`` cannot be read.
    """
    recipe = load_recipe(cfg.data.recipe or cfg.stage.recipe, cfg.data.root)
    folder = recipe.path.parent if metrics is None else Path()
    chosen = metrics_of_sources(recipe, metrics, folder)
    rank = join(cfg.machine)
    console = Console(str(out.parent), stage_name=cfg.stage.name, enabled=rank.is_first)
    held_out = open_held_out(cfg, tokenizer_dir, rank, console)
    if not held_out.index.num_samples:
        raise ValueError(f"the recipe {recipe.path} has no held-out samples")
    for remark in unused_remarks(held_out, "held-out samples", "evaluated"):
        console.message(remark)
    packed = load_packed(cfg, model_dir, rank)
    failed: list[FailedEntry] = []
    figures = evaluate(
        lambda batch: packed(batch.to(rank.device)),
        packs(held_out, cfg, packed, rank, failed.append),
        list(held_out.index.source_names),
        dp_size=rank.dp_size,
    )
    for remark in unread_remarks(failed, rank):
        console.message(remark)
    console.table(f"held-out samples, {model_dir}", table_rows(figures))
    if not chosen:
        return figures

    in_progress = PredictionsInProgress(out, what_is_evaluated(cfg, model_dir, held_out), rank.index)
    mine = answer_all(packed, tokenizer_dir, held_out, cfg, chosen, in_progress, rank, console)
    gathered = {one.place: one for part in rank.gather(mine) for one in part}
    answers: dict[str, dict[str, Any]] = {}
    problem = None
    if rank.is_first:
        answers, problems = score_predictions(list(gathered.values()), chosen, folder)
        if problems:
            problem = "\n".join([*problems, "The answers are kept; the same command scores them"])
    rank.agree(problem)
    if rank.is_first:
        name_media(gathered.values(), held_out.index)
        write_predictions(out, gathered.values())
        in_progress.finish()
        console.table(f"generated answers, {out}", answer_table(answers))
    return {name: {**row, **answers.get(name, {})} for name, row in figures.items()}


def load_packed(cfg: TrainConfig, model_dir: Path, rank: Rank) -> PackedModel:
    """The model of a run, checkpoint or export on the rank's device. Raises OSError where it cannot be read."""
    model, _ = load_trained(model_dir)
    model.to(rank.device)
    dtype = next(model.parameters()).dtype
    attention = choose_attention(cfg.machine.attention.value, rank.device, head_dims(model), dtype)
    return PackedModel(model, attention.name).eval()


def packs(
    held_out: OpenData,
    cfg: TrainConfig,
    packed: PackedModel,
    rank: Rank,
    tell: Callable[[FailedEntry], object] = lambda _: None,
) -> Iterator[Batch]:
    """This rank's packs. Samples of the same media share a prefix where the attention backend can. ``tell`` gets
    those that failed."""
    can_share = packed.attention in SERVED
    return evaluation_batches(
        held_out, cfg, rank=rank.index, dp_size=rank.dp_size, share_prefix=can_share, tell=tell
    )


def metrics_of_sources(
    recipe: Recipe, metrics: Sequence[str] | None, folder: Path
) -> dict[str, tuple[str, ...]]:
    """The metrics of each held-out source that has any. Raises ValueError naming all that cannot be used."""
    chosen = {
        source.name: names
        for source in recipe.sources
        if source.held_out is not None and (names := tuple(metrics or source.metrics))
    }
    every = dict.fromkeys(name for names in chosen.values() for name in names)
    if wrong := [problem for name in every if (problem := metric_problem(name, folder)) is not None]:
        raise ValueError("\n".join(wrong))
    return chosen


def open_held_out(cfg: TrainConfig, tokenizer_dir: Path, rank: Rank, console: Console) -> OpenData:
    """The held-out samples; the first rank indexes what is not indexed yet. Raises RunError on every rank."""
    problem = None
    if rank.is_first:
        try:
            open_data(cfg, tokenizer_dir=tokenizer_dir, held_out=True, build=True, progress=console.progress)
        except (OSError, ValueError) as error:
            problem = str(error)
    rank.agree(problem)
    return open_data(cfg, tokenizer_dir=tokenizer_dir, held_out=True, build=False)


def what_is_evaluated(cfg: TrainConfig, model_dir: Path, held_out: OpenData) -> dict[str, Any]:
    """What answers depend on: those of a stopped evaluation are used only where all of it is the same."""
    weights = [folder for folder in locate_trained(model_dir) if folder is not None]
    files = [file for folder in weights for file in sorted(folder.glob("*.safetensors"))]
    return {
        "weights": [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "sources": list(held_out.index.source_names),
        "samples": held_out.plan.table.fingerprint,
        "rendering": held_out.settings.fingerprint(),
        "max_new_tokens": cfg.run.evaluate_max_new_tokens,
    }


def answer_all(
    packed: PackedModel,
    tokenizer_dir: Path,
    held_out: OpenData,
    cfg: TrainConfig,
    chosen: Mapping[str, Sequence[str]],
    in_progress: PredictionsInProgress,
    rank: Rank,
    console: Console,
) -> list[Prediction]:
    """This rank's answers, and those that an evaluation which was stopped has left."""
    tokenizer = ChatTokenizer.from_folder(tokenizer_dir)
    known = [one for one in in_progress.known if one.source in chosen]
    if known:
        console.message(f"{len(known)} answers are there already, from an evaluation that was stopped")
    names = list(held_out.index.source_names)
    sizes = dict(zip(names, held_out.index.sizes, strict=True))
    total = -(-sum(sizes[name] for name in chosen if name in sizes) // rank.dp_size)
    answered: set[str] = {one.key for one in known}

    def tell(one: Prediction) -> None:
        in_progress.add(one)
        answered.add(one.key)
        console.count("answers", min(len(answered), total), total, "samples")

    generator = Generator(
        packed,
        {tokenizer.im_end_id, *end_ids(packed.model)},
        max_new_tokens=cfg.run.evaluate_max_new_tokens,
    )
    batches = packs(held_out, cfg, packed, rank)
    places = {one.place for one in known}
    mine = generate_predictions(generator, batches, tokenizer, names, sources=chosen, known=places, tell=tell)
    return [*known, *mine]
