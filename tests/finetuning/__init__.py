"""Tests of fine-tuning in one command."""
