"""What every layer shares: records with their shapes, integer geometry, token names, files that are whole or absent."""
