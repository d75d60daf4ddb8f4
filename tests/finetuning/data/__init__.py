"""Tests of its data."""
