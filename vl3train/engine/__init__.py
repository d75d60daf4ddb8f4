"""One run: start, loop, step, checkpoint, evaluation."""
