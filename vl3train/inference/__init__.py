"""A trained model is asked questions."""
