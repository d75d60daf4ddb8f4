"""Evaluates held-out samples: loss and accuracy given the true answers, and generated answers with their scores."""
