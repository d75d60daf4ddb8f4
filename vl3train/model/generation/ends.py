"""Tokens that end an answer."""

from __future__ import annotations

from typing import Any


def end_ids(hf_model: Any) -> frozenset[int]:
    """The end tokens that the model's own generation settings name, as published ones name <|endoftext|> too."""
    named = hf_model.generation_config.eos_token_id
    return frozenset(() if named is None else (named,) if isinstance(named, int) else named)
