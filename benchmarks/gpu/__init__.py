"""Rows of the GPU benchmark: ours and those of others, one process each."""
