"""Small checkpoints as ``save_checkpoint`` leaves them."""

from __future__ import annotations

import json

from vl3train.model.weights.headers.manifest import MANIFEST, digests_of, list_files, manifest_text


def make(checkpoints, step, identity=None, config=None):
    folder = checkpoints / f"step_{step:08d}"
    (folder / "engine").mkdir(parents=True)
    (folder / "engine" / "weights.bin").write_bytes(b"x" * 100)
    (folder / "resume.json").write_text(
        json.dumps({"identity": identity or {"plan": {"seed": 0}}, "step": step, "config": config})
    )
    sizes = list_files(folder)
    (folder / MANIFEST).write_text(manifest_text(sizes, digests_of(folder, sizes)))
    return folder
