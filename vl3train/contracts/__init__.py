"""What every layer shares: records with their shapes, geometry, tokens, published sizes, GPUs, whole files."""
