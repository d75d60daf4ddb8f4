"""The demo's tokenizer against what AutoTokenizer makes of its folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from vl3train.contracts.tokens import END_OF_TEXT, IM_END, IM_START, IMAGE_PAD, VIDEO_PAD
from vl3train.demo.tokenizer import train_tokenizer

TEXTS = ["How many red circles are there?", "Time 0.0s:,Time 1.5s:", "user\nassistant\n"]


def test_a_fast_qwen2_tokenizer_comes_back(tokenizer_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    assert tokenizer.is_fast
    assert type(tokenizer).__name__ == "Qwen2Tokenizer"
    assert (tokenizer.eos_token, tokenizer.pad_token) == (IM_END, END_OF_TEXT)


def test_any_text_survives(tokenizer_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    text = f"{IM_START}user\n{IMAGE_PAD}\nHow many dogs'll jump? Ünïcodé 漢字 12.5s: 🙂{IM_END}\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_structure_is_one_token_each_and_digits_stand_alone(tokenizer_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    specials = (END_OF_TEXT, IM_START, IM_END, IMAGE_PAD, VIDEO_PAD)
    ids = [tokenizer(token).input_ids for token in specials]
    assert all(len(one) == 1 for one in ids)
    assert len({one[0] for one in ids}) == len(specials)
    assert tokenizer.tokenize("0123456789") == list("0123456789")


def test_the_same_texts_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        train_tokenizer(TEXTS, tmp_path / name, vocab_size=300)
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes(), file.name


def test_a_vocabulary_without_room_for_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vocab_size=200.*261"):
        train_tokenizer(TEXTS, tmp_path, vocab_size=200)
