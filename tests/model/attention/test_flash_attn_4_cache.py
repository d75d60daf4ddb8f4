from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from getpass import getuser
from pathlib import Path

import pytest

from vl3train.model.attention import flash_attn_4_cache
from vl3train.model.attention.flash_attn_4_cache import ENABLED, FOLDER, cache_kernels


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Both variables are restored, also where the code under test sets them."""
    for name in (ENABLED, FOLDER):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def folder_for(file: Path, monkeypatch) -> str:
    monkeypatch.delenv(FOLDER, raising=False)
    cache_kernels(str(file))
    return os.environ[FOLDER]


def test_kernels_of_another_mending_are_not_found(tmp_path, monkeypatch):
    monkeypatch.setenv(ENABLED, "1")
    file = tmp_path / "patched.py"
    file.write_text("round to 16")
    first = folder_for(file, monkeypatch)
    assert folder_for(file, monkeypatch) == first
    file.write_text("round to 32")
    assert folder_for(file, monkeypatch) != first


def test_what_the_user_has_set_stands(tmp_path, monkeypatch):
    monkeypatch.setenv(ENABLED, "0")
    monkeypatch.setenv(FOLDER, str(tmp_path))
    cache_kernels(__file__)
    assert (os.environ[ENABLED], os.environ[FOLDER]) == ("0", str(tmp_path))


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o775, 0o777])
def test_kernels_are_cached_only_where_nobody_else_can_write(tmp_path, monkeypatch, mode):
    """What lies there is run, and whoever was first may have made the folder of our name."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv(FOLDER, raising=False)
    (tmp_path / f"vl3train-{getuser()}").mkdir()
    (tmp_path / f"vl3train-{getuser()}").chmod(mode)
    cache_kernels(__file__)
    assert (FOLDER in os.environ) == (mode in (0o700, 0o755))
    assert (ENABLED in os.environ) == (FOLDER in os.environ)


def test_a_link_of_somebody_elses_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.delenv(FOLDER, raising=False)
    for name in ("temporary", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "temporary" / f"vl3train-{getuser()}").symlink_to(tmp_path / "elsewhere")
    cache_kernels(__file__)
    assert FOLDER not in os.environ
    assert not any((tmp_path / "elsewhere").iterdir())


def test_the_cache_of_a_free_umask_is_private(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv(ENABLED, "1")
    before = os.umask(0)
    try:
        folder = Path(folder_for(Path(__file__), monkeypatch))
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert folder.parent.stat().st_mode & 0o777 == 0o700


@pytest.fixture
def fake_library(tmp_path):
    """flash-attn-4 needs a GPU: a package of its name, which prints the settings it finds when it is imported.

    Returns a function that runs code in a process of its own, with that package.
    """
    cute = tmp_path / "flash_attn" / "cute"
    cute.mkdir(parents=True)
    (tmp_path / "flash_attn" / "__init__.py").touch()
    (cute / "__init__.py").write_text(
        f"import os\nprint(os.environ.get({ENABLED!r}), os.environ.get({FOLDER!r}))"
    )
    (cute / "interface.py").touch()
    (cute / "flash_bwd_sm90.py").write_text("class FlashAttentionBackwardSm90: ...")
    root = Path(flash_attn_4_cache.__file__).parents[3]
    environment = {name: value for name, value in os.environ.items() if name not in (ENABLED, FOLDER)}
    environment |= {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}", "TMPDIR": str(tmp_path)}

    def run(code):
        command = [sys.executable, "-c", f"import vl3train.model.attention.flash_attn_4\n{code}"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True)

    return run


def test_the_cache_is_set_before_the_library_reads_it(fake_library, tmp_path):
    enabled, folder = fake_library("").stdout.split()
    assert enabled == "1"
    assert Path(folder).is_relative_to(tmp_path)


def test_the_librarys_warning_of_its_own_argument_is_silent_and_another_is_not(fake_library):
    """The text is that of nvidia-cutlass-dsl 4.8 (base_dsl/diagnostics.py)."""
    text = "Argument {} (position 17) cannot be converted to a JitArgument for function 'f'."
    warn = "".join(f"\nwarnings.warn({text.format(name)!r})" for name in ("aux_data", "rows"))
    shown = fake_library(f"import warnings{warn}").stderr
    assert "Argument rows" in shown
    assert "aux_data" not in shown
