"""A trained model's answers to the first held-out samples, with what it sees of them, for a person to look at."""

from __future__ import annotations

from pathlib import Path

from vl3train.config.schema import TrainConfig
from vl3train.data.pipeline import evaluation_batches
from vl3train.data.render.chat_tokens import ChatTokenizer
from vl3train.engine.held_out.answers import generate_predictions
from vl3train.engine.held_out.of_model import load_packed, open_held_out
from vl3train.engine.held_out.shown import ShownSamples
from vl3train.engine.monitor.console import Console
from vl3train.engine.ranks import join
from vl3train.engine.tracking.tracker import ShownAnswer
from vl3train.model.generation.ends import end_ids
from vl3train.model.generation.generate import Generator
from vl3train.scoring.predictions import Prediction, score_predictions, write_predictions

METRIC = "exact"


def answer_first(
    cfg: TrainConfig, model_dir: Path, *, tokenizer_dir: Path, most: int, out: Path
) -> list[ShownAnswer]:
    """Answer the questions of up to ``most`` samples of each held-out source, in this process.

    Args:
        cfg: how samples are rendered and packed, and where they lie.
        model_dir: a run, a checkpoint or an export.
        tokenizer_dir: folder with its tokenizer.json.
        most: samples of each source.
        out: file of the answers, with their scores of METRIC.

    Raises:
        RunError: a shard or an index cannot be used.
        OSError: ``model_dir`` cannot be read.
    """
    rank = join(cfg.machine)
    console = Console(str(out.parent), stage_name=cfg.stage.name, enabled=True)
    held_out = open_held_out(cfg, tokenizer_dir, rank, console)
    packed = load_packed(cfg, model_dir, rank)
    tokenizer = ChatTokenizer.from_folder(tokenizer_dir)
    names, sizes = list(held_out.index.source_names), held_out.index.sizes
    shown = ShownSamples({number: min(most, size) for number, size in enumerate(sizes)})
    total = sum(min(most, size) for size in sizes)
    answered: set[str] = set()

    def tell(one: Prediction) -> None:
        answered.add(one.key)
        console.count("answers", len(answered), total, "samples")

    predictions = generate_predictions(
        Generator(
            packed,
            {tokenizer.im_end_id, *end_ids(packed.model)},
            max_new_tokens=cfg.run.evaluate_max_new_tokens,
        ),
        shown.watch(evaluation_batches(held_out, cfg, rank=0, dp_size=1), to_the_end=False),
        tokenizer,
        names,
        sources=(),
        samples=shown.pictures,
        tell=tell,
    )
    score_predictions(predictions, {name: (METRIC,) for name in names}, Path())
    write_predictions(out, predictions)
    return shown.rows(predictions, names)
