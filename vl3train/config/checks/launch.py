"""The number of ranks of a launch, from the environment variables that torchrun sets. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

from vl3train.config.problems import ConfigError, Problem

COUNTS = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
PLACE = ("MASTER_ADDR", "MASTER_PORT")


def launched_ranks(environ: Mapping[str, str]) -> int:
    """Number of ranks of this launch; 1 when this process was not launched together with others.

    Raises ConfigError when the variables contradict each other, or do not say where the ranks meet: otherwise each
    process would train alone and write into the same folder.

    >>> launched_ranks({})
    1
    """
    found = [
        Problem(
            name, environ[name], "is not a whole number of 0 or more", f"unset {name}, or start with torchrun"
        )
        for name in COUNTS
        if not environ.get(name, "0").isdecimal()
    ]
    if found:
        raise ConfigError(found)
    ranks, rank = int(environ.get("WORLD_SIZE", "1")), int(environ.get("RANK", "0"))
    if rank >= ranks:
        what = f"must be less than the number of ranks, WORLD_SIZE={environ.get('WORLD_SIZE', 'unset, so 1')}"
        found.append(Problem("RANK", rank, what, "start with torchrun, which sets both, or unset both"))
    if ranks > 1 and (lacking := [name for name in (*COUNTS, *PLACE) if name not in environ]):
        what = f"{ranks} ranks cannot connect without {', '.join(lacking)}"
        found.append(Problem("WORLD_SIZE", ranks, what, "start with torchrun, which sets all, or unset it"))
    if found:
        raise ConfigError(found)
    return ranks
