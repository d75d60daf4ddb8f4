"""Fits a run into the memory of its GPU and host."""
