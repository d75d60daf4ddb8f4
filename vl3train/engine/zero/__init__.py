"""The only door to DeepSpeed."""
