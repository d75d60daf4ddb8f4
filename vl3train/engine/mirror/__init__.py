"""Keeps a copy of a run's folder elsewhere, in an object store or on another disk, and brings it back."""
