"""Finds damaged weight files before anything is built from them."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open


def refuse_damaged(*folders: Path) -> None:
    """Raise ValueError with every file in ``folders`` that is no whole safetensors file; only headers are read."""
    found = []
    for file in sorted(file for folder in folders for file in folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            found.append(f"  {file} ({file.stat().st_size:,} bytes): {error}")
    if found:
        raise ValueError(
            "\n".join(["damaged weights:", *found, "copy them again, or take an older checkpoint of the run"])
        )
