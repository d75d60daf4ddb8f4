"""The data of a fine-tuning: what is wrong with the records, their shards, and the index of those."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vl3train.config.paths import tokenizer_source
from vl3train.config.schema import TrainConfig
from vl3train.contracts.files import write_whole
from vl3train.data.prepare.rejections import Rejection, describe_rejected
from vl3train.finetuning.data.shards import (
    RECIPE_MARK,
    Split,
    is_somebodys,
    made_from,
    make_data,
    recipe_text,
    split_records,
)
from vl3train.finetuning.plan import steps_of

Tell = Callable[[str], None]

SECONDS_BETWEEN_LINES = 5.0
"""Progress is told at most so often."""


class Progress:
    """Tells how far something is, at most every 5 s: what ends sooner says nothing."""

    def __init__(self, tell: Tell) -> None:
        self._tell, self._last = tell, time.monotonic()

    def told(self, line: str) -> None:
        """Tell the line, unless one was told just now."""
        now = time.monotonic()
        if now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            self._tell(line)


class CannotFinetuneError(ValueError):
    """Everything that keeps a fine-tuning from starting; nothing was written."""

    def __init__(self, found: Sequence[object]) -> None:
        lines = [f"{number}. {one}" for number, one in enumerate(found, start=1)]
        super().__init__("\n".join([f"{len(found)} problem{'s' * (len(found) > 1)}:", *lines]))


def split_or_note(
    files: Sequence[str], media_roots: Sequence[str], held_out: str, found: list[object]
) -> Split | None:
    """The records in two parts; None where they cannot be read, with the reason added to ``found``."""
    try:
        return split_records(files, media_roots, held_out)
    except ValueError as error:
        found.append(error)
        return None


def split_problems(split: Split, *, skip: bool) -> list[object]:
    """Rejected records, unless the others shall be trained on, and a split without samples."""
    found: list[object] = list(split.problems)
    if split.rejected and not skip:
        found.append(rejected_text(split.rejected, "records"))
    return found


def rejected_text(rejected: Sequence[Rejection], what: str) -> str:
    """How many ``what`` cannot be used, the reasons with examples, and the way out."""
    lines = [f"{len(rejected)} {what} cannot be used (--skip-rejected trains on the others):"]
    return "\n".join([*lines, *describe_rejected(rejected)])


def changed_data(split: Split, out: Path) -> list[object]:
    """Records that are other ones than those that a training has begun with."""
    recipe = out / "recipe.yaml"
    if recipe.is_file() and RECIPE_MARK not in recipe.read_text(encoding="utf-8", errors="replace"):
        return [f"{recipe} is a recipe that this command did not write; give another --out"]
    if is_somebodys(out / "data"):
        return [f"{out / 'data'} has files that were not made from records; give another --out"]
    before = made_from(out / "data")
    if before in (None, split.digest) or not (out / "checkpoints" / "latest").is_file():
        return []
    return [
        f"{out} has a training of other records: files, media or --held-out changed since it began. Put back what "
        "changed to go on with it, or give another --out"
    ]


def make(cfg: TrainConfig, split: Split, out: Path, tell: Tell) -> None:
    """Shards and recipe."""
    out.mkdir(parents=True, exist_ok=True)
    progress = Progress(tell)
    written = make_data(split, out / "data", lambda what, count: progress.told(f"{what}: {count:,}"))
    write_whole(out / "recipe.yaml", recipe_text(out.name, split, cfg.finetune.records))
    how = "made" if written else "there already, from the same records"
    tell(f"data: {split.num_training:,} samples to train on, {split.num_held_out:,} held out; {how}")
    if split.rejected:
        tell(rejected_text(split.rejected, "records"))
    for line in split.remarks:
        tell(f"data: {line}")


def index_data(cfg: TrainConfig, split: Split, tell: Tell) -> int:
    """Measure every sample; how many can be trained on. Raises CannotFinetuneError for samples that cannot be used."""
    from vl3train.data.pipeline import open_data

    rejected: list[Rejection] = []
    num_samples = 0
    progress = Progress(tell)
    with tokenizer_folder(cfg) as folder:
        for held_out in (False, True) if split.held_out is not None else (False,):
            data = open_data(
                cfg,
                tokenizer_dir=folder,
                held_out=held_out,
                build=True,
                progress=lambda source, done, total: progress.told(
                    f"index of {source}: {done:,} of {total:,}"
                ),
            )
            rejected += [Rejection(*one) for one in data.index.rejected]
            too_large = [data.index.key(row) for row in data.plan.oversized_samples]
            why = (
                f"larger than a pack (step.max_tokens={cfg.step.max_tokens}, step.max_patches={cfg.step.max_patches}); "
                "raise them, or lower data.max_visual_tokens"
            )
            rejected += [Rejection(key, why) for key in too_large]
            if not held_out:
                num_samples = data.index.num_samples - len(too_large)
    if rejected and not cfg.finetune.skip_rejected:
        raise CannotFinetuneError([rejected_text(rejected, "samples")])
    if rejected:
        tell(rejected_text(rejected, "samples"))
    return num_samples


def count_steps(cfg: TrainConfig) -> int:
    """Optimizer steps of the training, whose data are indexed."""
    from vl3train.data.pipeline import open_data

    with tokenizer_folder(cfg) as folder:
        return steps_of(cfg, open_data(cfg, tokenizer_dir=folder, held_out=False, build=False))


@contextmanager
def tokenizer_folder(cfg: TrainConfig) -> Iterator[Path]:
    """A folder with the tokenizer exactly as a run writes it: the index holds its checksum."""
    from vl3train.model.weights.processor import build_processor

    with tempfile.TemporaryDirectory() as folder:
        build_processor(tokenizer_source(cfg)).save_pretrained(folder)
        yield Path(folder)
