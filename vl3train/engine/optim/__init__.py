"""AdamW and its variants."""
