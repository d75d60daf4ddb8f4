"""Runs that are killed or damaged on purpose, and what became of them."""
