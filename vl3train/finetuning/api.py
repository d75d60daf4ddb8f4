"""Fine-tuning from Python: ``finetune`` prepares, ``train`` trains, ``load`` answers.

They take the options of the command line and check them as it does; the training runs in processes of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vl3train.config.problems import show
from vl3train.finetuning.flow import Prepared, prepare, run
from vl3train.finetuning.results import trained_folder
from vl3train.finetuning.wish import Wish
from vl3train.inference.answer import Asker
from vl3train.inference.requests import parse_request


@dataclass(frozen=True, slots=True)
class FineTuning:
    """A fine-tuning whose data are made: ``print`` shows its plan, ``train`` trains it."""

    prepared: Prepared

    def __str__(self) -> str:
        return "\n".join(self.prepared.plan)

    @property
    def folder(self) -> Path:
        """The folder of everything that is written."""
        return self.prepared.out

    @property
    def best(self) -> Path:
        """The checkpoint with the best held-out figure so far; the folder itself where nothing was held out."""
        return trained_folder(self.prepared.out)

    def train(self) -> Path:
        """Train to the end, or go on where it was stopped; returns ``best``.

        Raises RuntimeError where the training failed or was stopped: its own lines say why.
        """
        if code := run(self.prepared, print):
            raise RuntimeError(f"the training ended with exit code {code}; its lines above say why")
        return self.best


def finetune(
    *records: str | Path,
    model: str | Path,
    out: str | Path | None = None,
    held_out: str | int | None = None,
    media_root: str | Path | Sequence[str | Path] = (),
    full: bool = False,
    parts: Sequence[str] = (),
    epochs: float | None = None,
    learning_rate: float | None = None,
    **options: Any,
) -> FineTuning:
    """Check everything and make the data, as `vl3train finetune --dry-run` does.

    Args:
        records: files of records.
        model: folder of the model, or its name on the hub.
        out: folder for everything that is written.
        held_out: samples to evaluate on: "5%", a number, or a file.
        media_root: folders that paths in records start from.
        full: train all weights, without adapters.
        parts: what trains.
        epochs: passes over the data.
        learning_rate: of all that trains.
        options: any option by its full name, as ``**{"step.max_tokens": 8192}``.

    Raises:
        ValueError: something keeps it from starting; the message has all of it.
    """
    roots = [media_root] if isinstance(media_root, (str, Path)) else media_root
    wish = Wish(
        records=tuple(map(str, records)),
        model=str(model),
        out=None if out is None else str(out),
        media_roots=tuple(map(str, roots)),
        held_out=None if held_out is None else str(held_out),
        full=full,
        parts=tuple(parts),
        epochs=epochs,
        rate=learning_rate,
        overrides=tuple(f"{key}={_as_word(value)}" for key, value in options.items()),
    )
    return FineTuning(prepare(wish, print))


def _as_word(value: Any) -> str:
    """A value as the command line takes it.

    >>> _as_word([1, "a b"]), _as_word(None), _as_word({"projector": 1e-3})
    ("[1,'a b']", 'null', '{projector: 0.001}')
    """
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_as_word(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_as_word(item) for item in value) + "]"
    text = show(value)
    return text if not isinstance(value, (str, Path)) or text.replace("_", "").isalnum() else repr(text)


@dataclass(frozen=True, slots=True)
class Trained:
    """A model that answers."""

    asker: Asker

    def ask(
        self,
        prompt: str,
        *,
        image: str | Path | Sequence[str | Path] = (),
        video: str | Path | Sequence[str | Path] = (),
        system: str | None = None,
    ) -> str:
        """The answer to a question about pictures and clips. Raises ValueError for what cannot be asked."""
        fields: dict[str, Any] = {"prompt": prompt, "system": system}
        for key, media in (("image", image), ("video", video)):
            fields[key] = [str(media)] if isinstance(media, (str, Path)) else [str(one) for one in media]
        request, problems = parse_request(fields, Path("."))
        if request is not None:
            problems = self.asker.problems(request)
        if request is None or problems:
            raise ValueError("\n".join(problems))
        return self.asker.answers([request])[0]


def load(folder: str | Path, **settings: Any) -> Trained:
    """A run, a checkpoint, an export or a published model, ready to answer.

    ``settings`` are those of ``inference.answer.Asker.load``: device, fps, max_new_tokens, temperature, ...
    """
    return Trained(Asker.load(folder, **settings))
