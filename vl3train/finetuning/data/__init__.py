"""From records to shards: read them, hold some out by their media, write both sides once."""
