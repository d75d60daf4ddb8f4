from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from vl3train.model.attention import flash_attn_4_cache
from vl3train.model.attention.flash_attn_4_cache import ENABLED, FOLDER, keep_kernels


def folder_for(file: Path, monkeypatch) -> str:
    monkeypatch.delenv(FOLDER, raising=False)
    keep_kernels(str(file))
    return os.environ[FOLDER]


def test_kernels_of_another_mending_are_not_found(tmp_path, monkeypatch):
    monkeypatch.setenv(ENABLED, "1")
    file = tmp_path / "mended.py"
    file.write_text("round to 16")
    first = folder_for(file, monkeypatch)
    assert folder_for(file, monkeypatch) == first
    file.write_text("round to 32")
    assert folder_for(file, monkeypatch) != first


def test_what_the_user_has_set_stands(tmp_path, monkeypatch):
    monkeypatch.setenv(ENABLED, "0")
    monkeypatch.setenv(FOLDER, str(tmp_path))
    keep_kernels(__file__)
    assert (os.environ[ENABLED], os.environ[FOLDER]) == ("0", str(tmp_path))


def test_it_is_said_before_the_library_reads_it(tmp_path):
    """flash-attn-4 needs a GPU: a package of its name here says what it finds when it is imported."""
    cute = tmp_path / "flash_attn" / "cute"
    cute.mkdir(parents=True)
    (tmp_path / "flash_attn" / "__init__.py").touch()
    (cute / "__init__.py").write_text(
        f"import os\nprint(os.environ.get({ENABLED!r}), os.environ.get({FOLDER!r}))"
    )
    (cute / "interface.py").touch()
    (cute / "flash_bwd_sm90.py").write_text("class FlashAttentionBackwardSm90: ...")
    root = Path(flash_attn_4_cache.__file__).parents[2]
    found = {name: value for name, value in os.environ.items() if name not in (ENABLED, FOLDER)}
    found |= {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", "import vl3train.model.attention.flash_attn_4"],
        env=found,
        capture_output=True,
        text=True,
        check=True,
    )
    enabled, folder = done.stdout.split()
    assert enabled == "1"
    assert Path(folder).is_relative_to(tmp_path)
