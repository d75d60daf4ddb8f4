"""From the container of a clip to the times of its frames, and which of them are taken."""
