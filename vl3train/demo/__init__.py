"""A drawn data set and a debug model: they show the whole training without a download."""
