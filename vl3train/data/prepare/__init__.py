"""Passes over a whole data set: write shards, check media, store frames, build the index."""
