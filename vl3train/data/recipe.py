"""A recipe is a data mixture: sources with weights, one YAML file in data_recipes/. Imports no torch."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from vl3train.config.paths import shipped_folder
from vl3train.scoring.metrics import metric_problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One data set of a recipe."""

    name: str
    shards: Path | None = None
    """Folder with the training samples' .tar shards. Unset: the source is only evaluated, on ``held_out``."""
    held_out: Path | None = None
    """Folder with samples that are never trained on, for evaluation."""
    weight: float = 1.0
    """How often each sample comes in a virtual epoch: 1 once, 0.5 every other epoch, 2 twice."""
    group: str | None = None
    """Which of the recipe's published groups it belongs to."""
    published_samples: int | None = None
    """Samples the paper, or the data set's own page, gives."""
    origin: str | None = None
    """Where the data come from."""
    metrics: tuple[str, ...] = ()
    """How generated answers to the held-out samples are scored (docs/evaluation.md). Empty: none are generated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A data mixture. ``path`` is the file it was read from."""

    name: str
    about: str
    sources: tuple[Source, ...]
    path: Path
    published_groups: dict[str, int]
    """Samples of each group of sources, as the paper's table gives them."""


def find_recipe(name_or_path: str) -> Path:
    """The file of a recipe named like ``stage1``, or given as a path.

    Raises:
        ValueError: there is none; the message lists the recipes that ship.
    """
    path = Path(name_or_path).expanduser()
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        if path.is_file():
            return path
        raise ValueError(f"data.recipe={name_or_path}: there is no such file")
    shipped = shipped_folder("data_recipes") / f"{name_or_path}.yaml"
    if shipped.is_file():
        return shipped
    names = sorted(file.stem for file in shipped_folder("data_recipes").glob("*.yaml"))
    near = difflib.get_close_matches(name_or_path, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(
        f"data.recipe={name_or_path}: no recipe of that name{hint} "
        f"(there are {', '.join(names)}; or give the path of a .yaml file)"
    )


def load_recipe(name_or_path: str, root: str | Path) -> Recipe:
    """Read a recipe; relative shard folders start from ``root`` (data.root).

    Raises:
        ValueError: not found, or not a recipe; every problem of its form is in the message.
    """
    path = find_recipe(name_or_path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {error}") from error
    problems: list[str] = []
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a recipe has the keys name, about and sources")
    _check_keys(content, "recipe", {"name": str, "about": str, "sources": list}, {"groups": dict}, problems)
    entries = content.get("sources")
    sources = [
        source
        for number, entry in enumerate(entries if isinstance(entries, list) else [])
        if (source := _read_source(entry, number, Path(root).expanduser(), problems)) is not None
    ]
    groups = content.get("groups") or {}
    problems += [
        f"source {source.name}: group {source.group!r} is not among the recipe's groups {sorted(groups)}"
        for source in sources
        if source.group is not None and source.group not in groups
    ]
    if problems:
        raise ValueError(f"{path}: " + "\n  ".join(["not a valid recipe:", *problems]))
    return Recipe(
        name=content["name"],
        about=content["about"].strip(),
        sources=tuple(sources),
        path=path,
        published_groups=dict(groups),
    )


def recipe_problems(recipe: Recipe, root: str | Path) -> list[str]:
    """Why a run on this recipe cannot start; empty when it can. Each problem names the way out."""
    problems = []
    if not recipe.sources:
        problems.append(f"{recipe.path}: the recipe names no source")
    names = [source.name for source in recipe.sources]
    problems += [
        f"{recipe.path}: {names.count(name)} sources are named {name}; names must differ"
        for name in sorted(set(names))
        if names.count(name) > 1
    ]
    problems += [
        f"{recipe.path}: source {source.name}: weight={source.weight} must be above 0 and finite; "
        "delete the source to leave it out"
        for source in recipe.sources
        if not 0 < source.weight < float("inf")
    ]
    problems += [
        f"{recipe.path}: source {source.name}: {problem}"
        for source in recipe.sources
        for name in source.metrics
        if (problem := metric_problem(name, recipe.path.parent)) is not None
    ]
    missing = [
        (source.name, folder, source.origin)
        for source in recipe.sources
        for folder in (source.shards, source.held_out)
        if folder is not None and not (any(folder.glob("*.tar")) or (folder / "shards.txt").is_file())
    ]
    if missing:
        lines = [
            f"{name}: {folder}" + (f"  (from {origin})" if origin else "") for name, folder, origin in missing
        ]
        problems.append(
            "\n    ".join([f"{recipe.path}: no .tar shards (data.root={root}) of", *lines])
            + "\n  Make each with `vl3train shards ANNOTATIONS --media-root MEDIA --out FOLDER`. To train "
            "without some, copy the recipe, delete their lines and set data.recipe=COPY.yaml."
        )
    return problems


def _read_source(entry: Any, number: int, root: Path, problems: list[str]) -> Source | None:
    """One entry of ``sources``, or None with its problems noted."""
    where = f"source {number + 1}"
    if not isinstance(entry, dict):
        problems.append(f"{where}: is {type(entry).__name__}, expected name, shards, ...")
        return None
    if isinstance(entry.get("name"), str):
        where = f"source {entry['name']}"
    if type(entry.get("weight")) is int:  # true and false are no weights
        entry = {**entry, "weight": float(entry["weight"])}
    optional = {
        "shards": str,
        "held_out": str,
        "weight": float,
        "group": str,
        "published_samples": int,
        "origin": str,
        "metrics": list,
    }
    assert {"name", *optional} == {field.name for field in fields(Source)}
    before = len(problems)
    _check_keys(entry, where, {"name": str}, optional, problems)
    if not entry.get("shards") and not entry.get("held_out"):
        problems.append(f"{where}: shards is missing (or held_out, for a source that is only evaluated)")
    if len(problems) > before:
        return None
    if not all(isinstance(name, str) for name in entry.get("metrics") or ()):
        problems.append(f"{where}: metrics={entry['metrics']!r} must be a list of names")
        return None
    entry = {**entry, "metrics": tuple(entry.get("metrics") or ())}
    folders = {key: root / entry[key] for key in ("shards", "held_out") if entry.get(key)}
    return Source(**{**{key: value for key, value in entry.items() if value is not None}, **folders})


def _check_keys(
    entry: dict[Any, Any],
    where: str,
    required: dict[str, type],
    optional: dict[str, type],
    problems: list[str],
) -> None:
    """Note unknown keys, missing keys and values of a wrong type."""
    known = required | optional
    for key in entry:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
            problems.append(f"{where}: unknown key {key}{hint}")
    for key, kind in known.items():
        value = entry.get(key)
        if value is None:
            if key in required:
                problems.append(f"{where}: {key} is missing")
        elif not isinstance(value, kind) or isinstance(value, bool):
            problems.append(f"{where}: {key}={value!r} must be {kind.__name__}")
