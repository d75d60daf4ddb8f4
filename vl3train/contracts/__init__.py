"""Records that pass between layers, with their shapes; integer geometry; token names."""
