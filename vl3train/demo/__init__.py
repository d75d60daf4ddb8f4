"""A drawn data set and a debug model, to see everything run without a download."""
