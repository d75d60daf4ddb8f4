"""Weights that a run wrote are compared with what it wrote; a manifest that is gone is damage where there was one."""

from __future__ import annotations

import json
import shutil

import pytest

from vl3train.model.weights.headers.manifest import write_manifest
from vl3train.model.weights.headers.run_files import (
    base_remark,
    faults_of_start,
    manifest_digest,
)


@pytest.fixture
def lora(tmp_path):
    """Base and adapters as a run leaves them: folder, checkpoint."""
    base, checkpoint = tmp_path / "base", tmp_path / "checkpoints" / "step_00000002"
    for folder, name in ((base, "model.safetensors"), (checkpoint / "adapter", "adapter_model.safetensors")):
        folder.mkdir(parents=True)
        (folder / name).write_bytes(b"x" * 50)
    write_manifest(base)
    record(base, checkpoint)
    return base, checkpoint


def record(base, checkpoint):
    (checkpoint / "resume.json").write_text(json.dumps({"base": manifest_digest(base)}))
    write_manifest(checkpoint)


def flip(file):
    file.write_bytes(b"y" + file.read_bytes()[1:])


def told(base, checkpoint):
    found = faults_of_start(base, checkpoint / "adapter")
    return {folder.name: "; ".join(lines) for folder, lines in found.items()}


def test_what_is_whole_passes_and_each_damage_is_that_of_its_folder(lora):
    base, checkpoint = lora
    assert told(base, checkpoint) == {}
    flip(base / "model.safetensors")
    flip(checkpoint / "adapter" / "adapter_model.safetensors")
    found = told(base, checkpoint)
    assert found.keys() == {"base", "adapter"}
    assert all("its digest differs" in text for text in found.values())


@pytest.mark.parametrize("flipped", [False, True])
def test_a_manifest_that_is_gone_is_damage(lora, flipped):
    base, checkpoint = lora
    (base / "MANIFEST.json").unlink()
    (checkpoint / "MANIFEST.json").unlink()
    if flipped:
        flip(base / "model.safetensors")
    assert told(base, checkpoint) == {
        "adapter": "it has no MANIFEST.json",
        "base": f"it has no MANIFEST.json, and had one when {checkpoint} was saved",
    }
    assert base_remark(base, checkpoint) is None
    weights = checkpoint.with_name("step_00000004") / "weights"
    shutil.copytree(checkpoint / "adapter", weights)
    assert faults_of_start(weights, None) == {}, "a folder of others"
    (weights.parent / "resume.json").write_text("{}")
    assert faults_of_start(weights, None) == {weights: ["it has no MANIFEST.json"]}


def test_the_base_of_another_run_is_told(lora):
    base, checkpoint = lora
    flip(base / "model.safetensors")
    write_manifest(base)
    assert "is not that of the base that" in told(base, checkpoint)["base"]


def test_the_base_of_an_earlier_build_passes_and_is_said_to_be_unknown(lora):
    base, checkpoint = lora
    (checkpoint / "resume.json").write_text("{}")
    write_manifest(checkpoint)
    assert told(base, checkpoint) == {}
    assert base_remark(base, checkpoint) is None, "it has a manifest"
    flip(base / "model.safetensors")
    assert "its digest differs" in told(base, checkpoint)["base"]
    (base / "MANIFEST.json").unlink()
    assert told(base, checkpoint) == {}
    assert f"{base} has no MANIFEST.json, as builds before 2026-12 left it" in base_remark(base, checkpoint)
