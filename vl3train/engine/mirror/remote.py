"""A run's folder in a file system of fsspec: what is copied there, in which order, and how it comes back whole.

A checkpoint there is whole when it has its MANIFEST.json, which is copied last.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from vl3train.contracts.files import sync, sync_tree, write_whole
from vl3train.contracts.redaction import shown_address, without_secrets
from vl3train.data.shards.addresses import SCHEMES
from vl3train.engine.monitor.metrics_file import METRICS
from vl3train.model.weights.headers.manifest import MANIFEST, damage, step_of

CHECKPOINTS = "checkpoints"
STAY = ("run.lock", CHECKPOINTS)
"""Of a run's folder, what is not copied with the rest."""


class MirrorError(Exception):
    """What kept a copy from being made, in words that hold no secret."""


class Mirror:
    """A folder elsewhere that holds what a run's folder holds."""

    def __init__(self, address: str) -> None:
        """``address`` as fsspec takes it: ``s3://bucket/runs/mine``, or a path.

        Raises MirrorError where no file system is known or installed for it.
        """
        import fsspec

        self.address, self.shown = address, shown_address(address) if "://" in address else address
        scheme = address.partition("://")[0] if "://" in address else "file"
        if scheme.lower() not in (*SCHEMES, "file") or "::" in address:
            raise MirrorError(
                f"{scheme}:// is no place for a copy of a run; there are {', '.join(sorted(SCHEMES))}"
            )
        try:
            self._system, root = fsspec.core.url_to_fs(address)
        except (ImportError, ValueError) as error:
            raise MirrorError(f"{self.shown}: {without_secrets(str(error), address)}") from None
        self._root = root.rstrip("/")
        self._copied: dict[str, tuple[int, int]] = {}  # size and time of what this object has copied

    def put(self, run: Path, checkpoint: str) -> int:
        """Copy one checkpoint, and what else is in the run's folder; delete those there that the run has deleted.

        Returns the bytes copied. Raises MirrorError where that cannot be done; what was there before still is.
        """
        try:
            num_bytes = sum(self._put_file(run, path) for path in _others(run))
            folder = run / CHECKPOINTS / checkpoint
            self._unname(checkpoint)
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            for path in sorted(files, key=lambda path: path.name == MANIFEST):
                num_bytes += self._put_file(run, path)
            self._system.pipe_file(f"{self._root}/{CHECKPOINTS}/latest", checkpoint.encode())
            names = [*self.names(), checkpoint]
            for name in names[: names.index(checkpoint)]:  # those before it
                if not (run / CHECKPOINTS / name).exists():
                    self._system.rm(f"{self._root}/{CHECKPOINTS}/{name}", recursive=True)
        except Exception as error:  # each store has errors of its own
            if not (run / CHECKPOINTS / checkpoint).is_dir():
                raise MirrorError("a newer one has taken its place before all of it was copied") from None
            raise MirrorError(self._said(error)) from None
        return num_bytes

    def other_run(self, run: Path, *, has_begun: bool) -> str | None:
        """Why a run may not be copied there: another one was, or this one before its folder was lost. None where it
        may, or where its own figures are lost.

        ``has_begun``: the run's folder has a checkpoint. The first line of metrics.jsonl tells runs apart: it holds
        measured seconds. Raises MirrorError where the place does not say.
        """
        try:
            if not (names := self._whole()):
                return None
            first = b""
            if has_begun and self._system.exists(f"{self._root}/{METRICS}"):
                with self._system.open(f"{self._root}/{METRICS}", "rb") as file:
                    first = file.readline()
        except Exception as error:
            raise MirrorError(self._said(error)) from None
        own = run / METRICS
        if has_begun and (not first or not own.is_file() or own.read_bytes().startswith(first)):
            return None
        return (
            f"{self.shown} has {names[-1]} of another run, or of this one before its folder was lost; its files would "
            f"be replaced. Go on from it (vl3train checkpoint {self.shown} --fetch {run}), or name another place"
        )

    def names(self) -> list[str]:
        """The checkpoints there, oldest first, whole or not."""
        if not self._system.exists(f"{self._root}/{CHECKPOINTS}"):
            return []
        listed = self._system.ls(f"{self._root}/{CHECKPOINTS}", detail=False)
        names = (path.rstrip("/").rpartition("/")[2] for path in listed)
        found = {step: name for name in names if (step := step_of(name)) is not None}
        return [found[step] for step in sorted(found)]

    def get(self, run: Path, say: Callable[[str], object]) -> str:
        """Bring the newest whole checkpoint, and what else is there, into a folder that has no checkpoint.

        ``say`` gets the name of each file, and why a newer checkpoint is not taken. Returns the checkpoint's name.
        Raises MirrorError where none is whole.
        """
        if list(run.glob(f"{CHECKPOINTS}/step_*")):
            raise MirrorError(f"{run} has checkpoints already; name another folder")
        faults: list[str] = []
        try:
            if not (names := self._whole()):
                raise MirrorError(f"{self.shown} holds no whole checkpoint")
            files = {path[len(self._root) :].lstrip("/"): path for path in self._system.find(self._root)}
            for name in reversed(names):
                partial = run / CHECKPOINTS / f"{name}.partial"
                shutil.rmtree(partial, ignore_errors=True)
                of_it = f"{CHECKPOINTS}/{name}/"
                self._get_files(
                    {file: path for file, path in files.items() if file.startswith(of_it)}, run, say
                )
                if not (found := damage(partial)):
                    break
                faults.append(f"{self.shown}: {name} did not come whole: {'; '.join(found[:5])}")
                say(faults[-1])
                shutil.rmtree(partial)
            else:
                raise MirrorError("\n".join(faults))
            beside = {file: path for file, path in files.items() if not file.startswith(f"{CHECKPOINTS}/")}
            self._get_files(beside, run, say)
        except MirrorError:
            raise
        except Exception as error:
            raise MirrorError(self._said(error)) from None
        sync_tree(partial)
        partial.rename(partial.with_suffix(""))
        sync(run / CHECKPOINTS)
        write_whole(run / CHECKPOINTS / "latest", name)
        return name

    def _get_files(self, files: Mapping[str, str], run: Path, say: Callable[[str], object]) -> None:
        """Copy files, by their names in the run's folder; those of a checkpoint go into its ``.partial``."""
        for name, path in files.items():
            first, _, rest = name.partition("/")
            checkpoint, _, inner = rest.partition("/")
            target = run / first / f"{checkpoint}.partial" / inner if first == CHECKPOINTS else run / name
            if run.resolve() not in target.resolve().parents:
                raise MirrorError(f"{self.shown} holds a file that lies outside of it: {name!r}")
            target.parent.mkdir(parents=True, exist_ok=True)
            say(name)
            self._system.get_file(path, str(target))

    def _whole(self) -> list[str]:
        return [name for name in self.names() if self._system.exists(self._manifest(name))]

    def _manifest(self, checkpoint: str) -> str:
        return f"{self._root}/{CHECKPOINTS}/{checkpoint}/{MANIFEST}"

    def _unname(self, checkpoint: str) -> None:
        """Take away the manifest of a checkpoint there that this object did not copy: of the same step, from before a
        resume. It is not whole until all its files are new."""
        manifest = self._manifest(checkpoint)
        if f"{CHECKPOINTS}/{checkpoint}/{MANIFEST}" not in self._copied and self._system.exists(manifest):
            self._system.rm_file(manifest)

    def _put_file(self, run: Path, path: Path) -> int:
        """Copy one file where it has changed since this object copied it; returns its bytes, else 0."""
        name, stat = path.relative_to(run).as_posix(), path.stat()
        state = (stat.st_size, stat.st_mtime_ns)
        if self._copied.get(name) == state:
            return 0
        target = f"{self._root}/{name}"
        self._system.makedirs(target.rpartition("/")[0], exist_ok=True)
        self._system.put_file(str(path), target)
        self._copied[name] = state
        return stat.st_size

    def _said(self, error: Exception) -> str:
        text = f"{type(error).__name__}: {error}"
        return f"{self.shown}: {without_secrets(text, self.address) if '://' in self.address else text}"


def _others(run: Path) -> list[Path]:
    """The files of a run's folder beside its checkpoints."""
    found = []
    for folder, folders, files in os.walk(run):
        here = Path(folder)

        def copied(name: str, here: Path = here) -> bool:
            return not name.endswith(".partial") and not (here == run and name in STAY)

        folders[:] = filter(copied, sorted(folders))
        found += [here / name for name in filter(copied, sorted(files))]
    return found
