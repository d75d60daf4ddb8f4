"""Weights in Hugging Face folders, in and out."""
