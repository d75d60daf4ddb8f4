"""Checkpoints that are whole or absent: written, found, checked by their digests, read."""
