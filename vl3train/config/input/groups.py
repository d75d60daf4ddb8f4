"""Groups of config files (``configs/stage``, ``configs/model``, ...), and the file that a choice names."""

from __future__ import annotations

import difflib
from pathlib import Path

from vl3train.config.paths import shipped_folder
from vl3train.config.problems import Problem

GROUPS = ("stage", "model", "data", "machine", "adapter", "tracking")


def group_choices(group: str, config_dir: Path | None = None) -> list[str]:
    """Names that ``group=...`` accepts: files that ship with vl3train, and those of the user's ``config_dir``."""
    folders = [shipped_folder("configs") / group, *([config_dir / group] if config_dir else [])]
    return sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})


def resolve_choice(group: str, choice: str, config_dir: Path | None) -> tuple[str, Problem | None]:
    """The full name of a choice, and what is wrong with it. ``stage=1`` is the file whose name begins with ``1_``."""
    names = group_choices(group, config_dir)
    if choice in names:
        own = config_dir is not None and (config_dir / group / f"{choice}.yaml").is_file()
        if own and (shipped_folder("configs") / group / f"{choice}.yaml").is_file():
            what = f"{config_dir}/{group}/{choice}.yaml has the name of a file that ships with vl3train"
            return choice, Problem(group, choice, what, "give yours another name")
        return choice, None
    begun = [name for name in names if name.startswith(f"{choice}_")]
    if len(begun) == 1:
        return begun[0], None
    likely = difflib.get_close_matches(choice, names, n=1, cutoff=0.5)
    way_out = f"did you mean {likely[0]}? " if likely else ""
    return choice, Problem(group, choice, "no such choice", f"{way_out}the choices are {', '.join(names)}")
