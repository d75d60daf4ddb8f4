"""From shards to batches: the order of acts, the loader, the recipe."""
