"""What a person asks for, as options: the values of run.yaml, before the steps are counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vl3train.config.choices import AdapterKind
from vl3train.config.paths import shipped_folder
from vl3train.config.problems import Problem
from vl3train.config.rules import adapter_rates, full_rates
from vl3train.config.schema import PARTS, TrainConfig
from vl3train.finetuning.start_model import StartModel

ADAPTER_PARTS = ("language_model", "vision_encoder")
"""Parts that can have adapters; the projector is trained in full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """The words of `vl3train finetune`, or the arguments of ``vl3train.finetune``."""

    records: tuple[str, ...]
    model: str
    out: str | None = None
    media_roots: tuple[str, ...] = ()
    held_out: str | None = None
    full: bool = False
    qlora: bool = False
    parts: tuple[str, ...] = ()
    epochs: float | None = None
    rate: float | None = None
    overrides: tuple[str, ...] = ()
    skip_rejected: bool = False


def output_folder(wish: Wish) -> Path:
    """Where everything is written: ``runs/NAME`` of the first file of records, unless the person says where."""
    name = Path(wish.records[0].rpartition(":")[2]).name.partition(".")[0] or "records"
    return Path(wish.out or f"runs/{name}").expanduser().absolute()


def wish_problems(wish: Wish) -> list[Problem]:
    """What is wrong with the words themselves."""
    unknown = [part for part in wish.parts if part not in PARTS]
    return [
        Problem("--parts", part, "the model has no such part", f"parts are {', '.join(PARTS)}")
        for part in unknown
    ]


def run_options(wish: Wish, start: StartModel, *, on_gpu: bool) -> dict[str, Any]:
    """Choices of groups and options by their full names, in the order in which run.yaml lists them."""
    out = output_folder(wish)
    options: dict[str, Any] = {
        "stage": "finetuning_full" if wish.full else "finetuning",
        "model": start.size,
        "adapter": "none" if wish.full else "lora",
        "machine": "one_gpu" if on_gpu else "one_cpu",
        "stage.init_from": str(start.folder),
        **start.options,
        "finetune.records": [as_absolute(source) for source in wish.records],
    }
    if wish.media_roots:
        options["finetune.media_roots"] = [as_absolute(root) for root in wish.media_roots]
    if wish.held_out is not None:
        options["finetune.held_out"] = as_absolute(wish.held_out)
    if wish.skip_rejected:
        options["finetune.skip_rejected"] = True
    options |= {"data.root": str(out), "data.recipe": str(out / "recipe.yaml"), "run.output_dir": str(out)}
    if wish.qlora:
        options["adapter.base_4bit"] = "nf4"
    if on_gpu:
        options["machine.memory"] = "auto"
    if wish.parts:
        options |= trained_parts(wish)
    if wish.epochs is not None:
        options["run.num_epochs"] = wish.epochs
    if wish.rate is not None:
        options["optim.learning_rate"] = wish.rate
    return options


def trained_parts(wish: Wish) -> dict[str, Any]:
    """The options that train the parts of ``--parts``: by adapters where they can have them, unless ``--full``."""
    full = _stage_rates("finetuning_full")
    if wish.full:
        return {
            "stage.learning_rates": {part: wish.rate or full[part] for part in PARTS if part in wish.parts}
        }
    adapted = [part for part in ADAPTER_PARTS if part in wish.parts]
    rate = _stage_rates("finetuning")["language_model"]
    rates = {
        part: wish.rate or (rate if part in adapted else full[part]) for part in PARTS if part in wish.parts
    }
    found: dict[str, Any] = {"stage.learning_rates": rates, "adapter.parts": adapted}
    return found if adapted else {"adapter": "none", "stage.learning_rates": rates}


def _stage_rates(name: str) -> Mapping[str, float]:
    content = yaml.safe_load(
        (shipped_folder("configs") / "stage" / f"{name}.yaml").read_text(encoding="utf-8")
    )
    return {part: float(rate) for part, rate in content["stage"]["learning_rates"].items()}


def as_absolute(source: str) -> str:
    """A path from the root, so that run.yaml means the same from every folder; other words as they are.

    >>> as_absolute("5%"), as_absolute("hf:org/name:train")
    ('5%', 'hf:org/name:train')
    """
    importer, colon, path = source.rpartition(":")
    if source.startswith("hf:") or not Path(path).expanduser().exists():
        return source
    return f"{importer}{colon}{Path(path).expanduser().absolute()}"


def said(wish: Wish) -> list[str]:
    """The command line that makes the same file again, for its first line."""
    words = [*wish.records, "--model", wish.model]
    for name, value in (("--out", wish.out), ("--held-out", wish.held_out)):
        words += [name, value] if value is not None else []
    for root in wish.media_roots:
        words += ["--media-root", root]
    for name, number in (("--epochs", wish.epochs), ("--lr", wish.rate)):
        words += [name, f"{number:g}"] if number is not None else []
    words += ["--full"] if wish.full else []
    words += ["--qlora"] if wish.qlora else []
    words += ["--parts", *wish.parts] if wish.parts else []
    return [*words, *(["--skip-rejected"] if wish.skip_rejected else []), *wish.overrides]


RATES = ("optim.learning_rate", "stage.learning_rates", "adapter.learning_rate", "model.learning_rates")
"""Options, or their dicts, that decide the rates."""


def shown_options(options: Mapping[str, Any], cfg: TrainConfig) -> dict[str, Any]:
    """Options with what a person looks for first in run.yaml, as ``cfg`` has it: epochs, rank, and the rates.

    Rates that were written in several places are put into one: in one file a part's own rate would win over one for
    all, which may have been written closer.
    """
    rates = {**full_rates(cfg), **adapter_rates(cfg)}
    found = {key: value for key, value in options.items() if not key.startswith(RATES)}
    found["run.num_epochs"] = cfg.run.num_epochs
    if len(set(rates.values())) == 1 and rates.keys() == _own_parts(options["stage"]):
        found["optim.learning_rate"] = next(iter(rates.values()))
    else:
        found["stage.learning_rates"] = rates
    if cfg.adapter.kind is not AdapterKind.none:
        found["adapter.rank"] = cfg.adapter.rank
    return found


def _own_parts(stage: str) -> set[str]:
    """The parts that a fine-tuning trains without being told; none for stages of other names."""
    return set(_stage_rates(stage)) if stage in ("finetuning", "finetuning_full") else set()
