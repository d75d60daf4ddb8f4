"""Importing large libraries without what a run does not use of them."""
