"""Loss curves side by side."""
