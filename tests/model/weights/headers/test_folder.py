"""Each way in which a copied or downloaded checkpoint is broken is found from headers, and told by name."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import VideoLlama3ForConditionalGeneration

from vl3train.model.weights.headers.folder import Kind, inspect_folder
from vl3train.model.weights.headers.pickled import read_pickled


@pytest.fixture(scope="module")
def sharded(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint in several files with an index."""
    folder = tmp_path_factory.mktemp("sharded")
    model = VideoLlama3ForConditionalGeneration.from_pretrained(tiny_model_dir)
    model.save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def one(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "one"))


@pytest.fixture
def several(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "several"))


def faults(folder: Path, kind: Kind = Kind.whole) -> list[str]:
    return [fault.what for fault in inspect_folder(folder, kind).faults]


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_whole_folders_have_no_faults(tiny_model_dir: Path, sharded: Path):
    assert faults(tiny_model_dir) == faults(sharded) == []


def test_a_missing_shard_is_named_and_its_tensors_are_not_listed_again(several: Path):
    shard = sorted(several.glob("*.safetensors"))[1]
    shard.unlink()
    (found,) = faults(several)
    assert "1 of" in found
    assert shard.name in found


def cut(file: Path, keep: Callable[[int], int]) -> None:
    file.write_bytes(file.read_bytes()[: keep(file.stat().st_size)])


@pytest.mark.parametrize(
    ("keep", "says"),
    [
        (lambda size: size - 1, "is cut off: it has"),
        (lambda size: 50, "its header alone has"),
        (lambda size: 5, "is no safetensors file"),
        (lambda size: 0, "is no safetensors file"),
    ],
)
def test_a_file_that_was_cut_off_is_told_by_its_bytes(one: Path, several: Path, keep, says: str):
    cut(one / "model.safetensors", keep)
    cut(sorted(several.glob("*.safetensors"))[0], keep)
    for folder in (one, several):
        (found,) = faults(folder)
        assert says in found


@pytest.mark.parametrize("name", ["../{}", "/{}", "sub/{}"])
def test_an_index_names_no_file_outside_its_folder(several: Path, name: str):
    index = several / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    first = sorted(places)[0]
    shutil.copy(several / places[first], several.parent)
    index.write_text(json.dumps({"weight_map": {**places, first: name.format(places[first])}}))
    (found,) = faults(several)
    assert "names files outside its folder" in found


def test_every_fault_is_told_at_once(several: Path):
    first, second, third, *_ = sorted(several.glob("*.safetensors"))
    first.unlink()
    cut(second, lambda size: size // 2)
    third.write_bytes(third.read_bytes() + b"\0")
    found = faults(several)
    assert len(found) == 3
    assert all(any(file.name in what for what in found) for file in (first, second, third))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "Git LFS pointer"),
        ((2).to_bytes(8, "little") + b"[]", "damaged"),
        ((9).to_bytes(8, "little") + b"not json!", "damaged"),
        ((40).to_bytes(8, "little") + b'{"a":{"shape":[2],"dtype":"F32"}}       ', "damaged"),
        (
            (70).to_bytes(8, "little")
            + b'{"a":{"shape":[9],"dtype":"F32","data_offsets":[0,4]}}'.ljust(70)
            + b"abcd",
            "damaged",
        ),
    ],
)
def test_a_file_with_other_content_is_a_fault(one: Path, content: bytes, says: str):
    (one / "model.safetensors").write_bytes(content)
    (found,) = faults(one)
    assert says in found


def test_a_folder_without_weights_says_what_it_has(one: Path, tmp_path: Path):
    (one / "model.safetensors").rename(one / "weights.pt")
    assert "holds no weights, only weights.pt" in faults(one)[0]
    (one / "weights.pt").unlink()
    (one / "model.safetensors").symlink_to(tmp_path / "gone")
    assert "a link to a file that does not exist" in faults(one)[0]


def test_an_index_that_says_nothing_or_something_wrong_is_a_fault(several: Path):
    index = several / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first, *_ = names = list(content["weight_map"])
    other = next(
        content["weight_map"][n] for n in names if content["weight_map"][n] != content["weight_map"][first]
    )
    index.write_text(json.dumps({"weight_map": {**content["weight_map"], first: other}}))
    assert any(f"not in the files it says: {first}" in what for what in faults(several))
    index.write_text("{")
    assert "not JSON" in faults(several)[0]
    index.write_text("{}")
    assert "has no weight_map" in faults(several)[0]
    index.unlink()
    assert faults(several) == ["the index of the weight files (*.index.json) is missing"]


def test_missing_extra_and_reshaped_tensors_are_named(one: Path):
    weights = load_file(one / "model.safetensors")
    weights["stranger"] = weights.pop("model.projector.readout.2.bias")
    weights["model.projector.readout.0.bias"] = torch.zeros(7)
    save_file(weights, one / "model.safetensors")
    found = faults(one)
    assert "tensors are missing: model.projector.readout.2.bias" in found[0]
    assert "no place in the model: stranger" in found[1]
    assert "model.projector.readout.0.bias is [7] in model.safetensors, [64] by config.json" in found[2]


def test_another_vocabulary_size_is_a_shape_with_both_numbers(one: Path):
    config = json.loads((one / "config.json").read_text())
    rows = config["text_config"]["vocab_size"]
    edit_config(one, text_config={**config["text_config"], "vocab_size": rows + 64})
    (found,) = faults(one)
    assert (
        f"embed_tokens.weight is [{rows}, 64] in model.safetensors, [{rows + 64}, 64] by config.json" in found
    )


def test_weights_of_whole_numbers_are_a_fault(one: Path):
    weights = load_file(one / "model.safetensors")
    save_file({name: tensor.to(torch.int8) for name, tensor in weights.items()}, one / "model.safetensors")
    assert "weights are I8" in faults(one)[0]


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff"])
def test_a_config_that_is_none_is_a_fault(one: Path, text: str):
    (one / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in faults(one)[0]
    (one / "config.json").unlink()
    assert faults(one) == ["there is no config.json"]


def test_another_kind_is_said_and_its_broken_files_too(one: Path):
    cut(one / "model.safetensors", lambda size: 5)
    found = faults(one, Kind.language_model)
    assert found[0] == "holds a video_llama_3 model, not a Qwen2 or Qwen2.5 (model_type qwen2)"
    assert len(found) == 2


def as_pickle(folder: Path) -> Path:
    file = folder / "pytorch_model.bin"
    torch.save(load_file(folder / "model.safetensors"), file)
    (folder / "model.safetensors").unlink()
    return file


def test_a_pickle_is_read_by_its_shapes(one: Path):
    expected = {name: tuple(tensor.shape) for name, tensor in load_file(one / "model.safetensors").items()}
    file = as_pickle(one)
    tensors, fault = read_pickled(file)
    assert fault is None
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected
    assert {tensor.dtype for tensor in tensors.values()} == {"F32"}
    assert faults(one) == []


class Touch:
    """Leaves a file when it is unpickled, as code in a checkpoint could."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_with_code_is_refused_and_not_run(one: Path, tmp_path: Path):
    torch.save({"a": torch.zeros(2), "b": Touch(tmp_path / "ran")}, as_pickle(one))
    (found,) = faults(one)
    assert "holds more than weights (it asks for" in found
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("save", "says"),
    [
        (lambda file: torch.save({"model": {"a": torch.zeros(2)}}, file), "no tensors by name"),
        (lambda file: torch.save({"a": 1}, file), "no tensors by name"),
        (
            lambda file: torch.save({"a": torch.zeros(1)}, file, _use_new_zipfile_serialization=False),
            "no whole file",
        ),
        (lambda file: file.write_bytes(pickle.dumps({"a": 1})), "no whole file"),
        (lambda file: cut(file, lambda size: size - 100), "no whole file"),
    ],
)
def test_a_pickle_of_something_else_is_a_fault(one: Path, save, says: str):
    save(as_pickle(one))
    (found,) = faults(one)
    assert says in found
