"""A sample into ids and patches, in a process that a bad file cannot hurt."""
