"""The tokens of a folder's tokenizer with their ids, from its files alone, and whether they fit a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vl3train.contracts.tokens import (
    END_OF_TEXT,
    IM_END,
    IM_START,
    IMAGE_PAD,
    UPSTREAM_ADDED_TOKENS,
    VIDEO_PAD,
)
from vl3train.model.weights.headers.faults import Fault, listed, read_object

TAKE_QWEN = "take a Qwen2 or Qwen2.5 tokenizer (model.tokenizer_from)"
PLACEHOLDERS = {"image_token_id": IMAGE_PAD, "video_token_id": VIDEO_PAD}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Ids by token, as training has them: with the tokens that ``prepare_tokenizer`` adds."""

    ids: Mapping[str, int]
    special: frozenset[int]  # ids of tokens that no text is split into
    largest: int

    def token(self, number: int) -> str:
        """The token of an id, in words."""
        found = next((token for token, its in self.ids.items() if its == number), None)
        return "no token" if found is None else repr(found)


def read_vocabulary(folder: Path) -> tuple[Vocabulary | None, list[Fault]]:
    """The vocabulary of a folder's tokenizer; None with the reasons where it cannot be used."""
    words, added, faults = _read_files(folder)
    if faults:
        return None, faults
    known = words | added
    if lacking := [token for token in (IM_START, IM_END, END_OF_TEXT) if token not in known]:
        return None, [Fault(f"the tokenizer has no {', '.join(lacking)}", TAKE_QWEN)]
    for token in (IMAGE_PAD, VIDEO_PAD, *UPSTREAM_ADDED_TOKENS):
        if (
            token not in known
        ):  # the tokenizers library takes the first id behind the words and the added tokens
            known[token] = added[token] = max(len(words), max(added.values(), default=-1) + 1)
        else:
            added[token] = known[token]
    return Vocabulary(known, frozenset(added.values()), max(known.values())), []


def _read_files(folder: Path) -> tuple[dict[str, int], dict[str, int], list[Fault]]:
    """Words and added tokens with their ids."""
    words: Any = {}
    added: Any = {}
    faults: list[Fault] = []

    def read(name: str) -> dict[str, Any]:
        content, fault = read_object(folder / name)
        faults.extend([fault] if fault is not None else [])
        return content

    if (folder / "tokenizer.json").is_file():
        content = read("tokenizer.json")
        model = content.get("model")
        words = model.get("vocab") if isinstance(model, dict) else None
        tokens = content.get("added_tokens") or []
        if not isinstance(words, dict):
            words = {}  # of another kind than byte-level BPE: a list
        added = {
            one["content"]: one["id"]
            for one in tokens
            if isinstance(one, dict) and {"content", "id"} <= one.keys()
        }
    elif (folder / "vocab.json").is_file():
        words = read("vocab.json")
        if not (folder / "merges.txt").is_file():
            faults.append(
                Fault("the tokenizer has a vocab.json, but no merges.txt", "copy or download it as well")
            )
        added = read("added_tokens.json") if (folder / "added_tokens.json").is_file() else {}
    else:
        way_out = "copy the tokenizer's files into it, or name a folder that has them in model.tokenizer_from"
        return {}, {}, [Fault("has no tokenizer: neither tokenizer.json nor vocab.json", way_out)]
    if (folder / "tokenizer_config.json").is_file():
        declared = read("tokenizer_config.json").get("added_tokens_decoder")
        for number, one in declared.items() if isinstance(declared, dict) else ():
            if number.isdecimal() and isinstance(one, dict) and isinstance(one.get("content"), str):
                added.setdefault(one["content"], int(number))
    if not faults and not all(type(number) is int for number in (*words.values(), *added.values())):
        faults.append(Fault("the tokenizer's ids are not whole numbers", "copy or download it again"))
    return dict(words), dict(added), faults


def vocabulary_faults(
    vocabulary: Vocabulary, rows: int, token_ids: Mapping[str, int | list[int]]
) -> list[Fault]:
    """Where a tokenizer does not belong to a model.

    Args:
        vocabulary: of the tokenizer.
        rows: of the model's embedding.
        token_ids: of its config.json; placeholders are missing where the model form has none.
    """
    faults = []
    if vocabulary.largest >= rows:
        beyond = [token for token, number in vocabulary.ids.items() if number >= rows]
        what = (
            f"the tokenizer has ids up to {vocabulary.largest}, the language model's embedding only {rows} rows: "
            f"there is none for {listed(beyond)}"
        )
        way_out = (
            "take the tokenizer that belongs to the model (model.tokenizer_from), or enlarge the model first: "
            f"resize_token_embeddings({-(-(vocabulary.largest + 1) // 64) * 64}) and save_pretrained"
        )
        faults.append(Fault(what, way_out))
    for name, token in PLACEHOLDERS.items():
        if name in token_ids and token_ids[name] != vocabulary.ids[token]:
            number = token_ids[name]
            held = vocabulary.token(number) if isinstance(number, int) else "no token"
            what = (
                f"config.json says {name}={number}, which is {held} in the tokenizer; its {token} is "
                f"{vocabulary.ids[token]}"
            )
            way_out = (
                "name the tokenizer that belongs to the model in model.tokenizer_from, or, if this is the one, "
                f'write "{name}": {vocabulary.ids[token]} in config.json'
            )
            faults.append(Fault(what, way_out))
    for name in ("eos_token_id", "pad_token_id"):
        value = token_ids.get(name, [])
        numbers = value if isinstance(value, list) else [value]
        if odd := [number for number in numbers if number not in vocabulary.special]:
            what = f"config.json says {name}={odd[0]}, which is {vocabulary.token(odd[0])} in the tokenizer, a word"
            way_out = (
                "name the tokenizer that belongs to the model in model.tokenizer_from, or correct "
                f"{name} in config.json ({IM_END} is {vocabulary.ids[IM_END]}, {END_OF_TEXT} "
                f"{vocabulary.ids[END_OF_TEXT]})"
            )
            faults.append(Fault(what, way_out))
    return faults
