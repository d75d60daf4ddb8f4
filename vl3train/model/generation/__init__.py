"""Answers by generation: a packed prefill, then decoding of many answers at once."""
