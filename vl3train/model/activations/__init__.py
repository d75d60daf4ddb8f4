"""What of a layer is kept for the backward pass, and what is recomputed."""
