"""Questions to a trained model, and its answers."""
