"""Trains a small tokenizer in Qwen2's form, so that the demo needs nothing from a hub."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from vl3train.contracts.tokens import END_OF_TEXT, IM_END, IM_START, IMAGE_PAD, VIDEO_PAD

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""How Qwen2 splits text before BPE (transformers, models/qwen2/tokenization_qwen2.py)."""

SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END, IMAGE_PAD, VIDEO_PAD)


def train_tokenizer(texts: Iterable[str], folder: Path, vocab_size: int) -> None:
    """Train byte-level BPE on ``texts`` and save it so that ``AutoTokenizer`` gives a fast Qwen2 tokenizer.

    ``vocab_size`` includes the 256 bytes and the special tokens; a small corpus may fill less of it. The same texts in
    the same order give the same bytes on disk. Raises ValueError where ``vocab_size`` is too small.
    """
    floor = 256 + len(SPECIAL_TOKENS)
    if vocab_size < floor:
        raise ValueError(
            f"vocab_size={vocab_size} has no room for 256 bytes and the special tokens: >= {floor}"
        )
    tokenizer = Tokenizer(models.BPE(fuse_unk=False, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Added last, as in Qwen2: ids of words first, special tokens after them.
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    save(tokenizer, folder)


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer`` as a Hugging Face folder whose class is Qwen2's."""
    folder.mkdir(parents=True, exist_ok=True)
    # The library's Qwen2Tokenizer would rebuild the pre-tokenizer from vocab and merges. This class keeps exactly what
    # was trained; the name of the class is set afterwards, in the file.
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=32768,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(folder)
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "Qwen2Tokenizer"
    config.pop("backend", None)
    config_file.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
