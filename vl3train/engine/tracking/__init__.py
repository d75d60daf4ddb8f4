"""Figures, answers and alerts of a run, sent to W&B or TensorBoard."""
