"""Images from bytes: RGB from every mode, odd JPEGs, and clips that are made of pictures."""
