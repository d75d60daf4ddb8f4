"""Ids read from a tokenizer's files are those that transformers gives, with the tokens that training adds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from vl3train.contracts.tokens import IM_END, IMAGE_PAD, UPSTREAM_ADDED_TOKENS, VIDEO_PAD
from vl3train.model.weights.headers.vocabulary import Vocabulary, read_vocabulary, vocabulary_faults
from vl3train.model.weights.processor import prepare_tokenizer


@pytest.fixture
def folder(tokenizer_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tokenizer_dir, tmp_path / "tokenizer"))


def edit(folder: Path, change) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))


def without_placeholders(content: dict) -> None:
    pads = (IMAGE_PAD, VIDEO_PAD, *UPSTREAM_ADDED_TOKENS)
    content["added_tokens"] = [one for one in content["added_tokens"] if one["content"] not in pads]


def as_vocab_and_merges(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    merges = [one if isinstance(one, str) else " ".join(one) for one in content["model"]["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "tokenizer.json").unlink()
    decoder = {str(one["id"]): {**one} for one in content["added_tokens"]}
    for one in decoder.values():
        del one["id"]
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": decoder}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "prepare", [lambda _: None, lambda f: edit(f, without_placeholders), as_vocab_and_merges]
)
def test_ids_are_those_of_the_tokenizer_that_training_has(folder: Path, prepare):
    prepare(folder)
    vocabulary, faults = read_vocabulary(folder)
    assert faults == []
    expected = prepare_tokenizer(folder)
    assert vocabulary.ids == expected.get_vocab()
    assert vocabulary.largest == max(expected.get_vocab().values())
    assert expected.convert_tokens_to_ids(IM_END) in vocabulary.special


def test_a_folder_without_a_tokenizer_or_with_a_broken_one_says_so(folder: Path):
    (folder / "tokenizer.json").write_text('{"model": ')
    assert "tokenizer.json is damaged" in read_vocabulary(folder)[1][0].what
    (folder / "tokenizer.json").write_text('{"model": {"vocab": [["a", 0.5]]}}')
    assert "has no <|im_start|>, <|im_end|>, <|endoftext|>" in read_vocabulary(folder)[1][0].what
    (folder / "tokenizer.json").unlink()
    for file in folder.glob("vocab.json"):
        file.unlink()
    assert "has no tokenizer" in read_vocabulary(folder)[1][0].what
    (folder / "vocab.json").write_text("{}")
    assert "no merges.txt" in read_vocabulary(folder)[1][0].what


IDS = {"word": 0, IM_END: 1, "<|im_start|>": 2, "<|endoftext|>": 3, IMAGE_PAD: 4, VIDEO_PAD: 5}
VOCABULARY = Vocabulary(IDS, frozenset(range(1, 6)), 5)
FITTING = {"image_token_id": 4, "video_token_id": 5, "eos_token_id": [1, 3], "pad_token_id": 3}


@pytest.mark.parametrize(
    ("rows", "change", "says"),
    [
        (6, {}, None),
        (64, {"image_token_id": 4}, None),
        (5, {}, "embedding only 5 rows: there is none for <|video_pad|>"),
        (6, {"image_token_id": 5}, "image_token_id=5, which is '<|video_pad|>'"),
        (
            6,
            {"video_token_id": 9},
            "video_token_id=9, which is no token in the tokenizer; its <|video_pad|> is 5",
        ),
        (6, {"eos_token_id": 0}, "eos_token_id=0, which is 'word'"),
        (6, {"pad_token_id": 77}, "pad_token_id=77, which is no token"),
    ],
)
def test_a_tokenizer_of_another_model_is_told_by_what_differs(rows, change, says):
    found = [fault.what for fault in vocabulary_faults(VOCABULARY, rows, {**FITTING, **change})]
    assert len(found) == (says is not None)
    assert says is None or says in found[0]
