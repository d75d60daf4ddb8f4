"""Variable-length attention backends, and the check of each against float64."""
