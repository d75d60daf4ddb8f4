"""The model as it is trained: the packed forward pass, its loss, what is trainable, adapters."""
