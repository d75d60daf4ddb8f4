"""A checkpoint's state in another layout: with another number of ranks, or another ZeRO stage."""
