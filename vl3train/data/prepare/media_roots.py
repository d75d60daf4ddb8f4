"""Where the media of records lie: in the folders that the person named, and nowhere else.

Records come from anywhere. One that names ``/etc/passwd`` or ``../../.ssh/id_rsa`` would put that file into a shard.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from vl3train.contracts.records import SampleError

PATH_SHOWN = 400
"""Characters of a path in an error; what a record calls a path can be a whole picture in base64."""


class MediaRoots:
    """Folders that media may lie in."""

    def __init__(self, roots: Sequence[Path], folders: Sequence[Path] = ()) -> None:
        """Relative paths start from ``roots``, in order. Files in ``folders`` are named by their whole path."""
        self.roots = tuple(roots)
        self._real = tuple(os.path.realpath(folder) for folder in (*roots, *folders))
        self._real_folder = lru_cache(maxsize=4096)(os.path.realpath)

    def find(self, path: str) -> Path:
        """Where a file or folder lies that a record names.

        Raises:
            SampleError: nowhere; outside the roots, also behind a link; in several of them.
        """
        paths = [Path(path)] if os.path.isabs(path) else [root / path for root in self.roots]
        found = [one for one in paths if _exists(one)]
        if not found:
            places = " or ".join(shown(str(one)) for one in paths)
            raise SampleError(f"no such file: {places}; paths start from --media-root")
        inside = [one for one in found if self._is_inside(one)]
        if not inside:
            real = os.path.realpath(found[0])
            raise SampleError(
                f"outside the media root: {shown(path)!r} is {shown(real)}; if it may be used, name its "
                "folder, too: --media-root FOLDER once more"
            )
        others = [one for one in inside[1:] if not os.path.samefile(one, inside[0])]
        if others:
            raise SampleError(
                f"{shown(path)!r} is in several media roots: {inside[0]} and {others[0]}; write the path so that "
                "it is in one"
            )
        return inside[0]

    def _is_inside(self, path: Path) -> bool:
        """Whether what the path leads to is in a root. Folders are looked up once for all their files."""
        if path.name in ("", "..") or stat.S_ISLNK(path.lstat().st_mode):
            real = os.path.realpath(path)
        else:
            real = os.path.join(self._real_folder(path.parent), path.name)
        return any(real == root or real.startswith(root.rstrip(os.sep) + os.sep) for root in self._real)


def shown(path: str) -> str:
    """A path for an error: a long one without its middle, since the file's name is at its end."""
    half = PATH_SHOWN // 2
    return path if len(path) <= PATH_SHOWN else f"{path[:half]}…{path[-half:]}"


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a zero byte in the path
        return False
    except OSError as error:
        raise SampleError(f"{error.strerror}: {shown(str(path))}") from error
    return True
