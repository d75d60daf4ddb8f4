"""Scores generated answers: the field's metrics, their confidence intervals, and the file of predictions."""
