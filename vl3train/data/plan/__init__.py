"""Samples into packs: pure functions of index, recipe, seed and step."""
