"""Tests of the start of a run."""
