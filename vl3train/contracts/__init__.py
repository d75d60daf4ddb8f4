"""What every layer shares: records with their shapes, geometry, tokens, published sizes, GPUs, files whole or absent."""
