"""A sample into ids and patches, in a decode sandbox: a process that a damaged file may crash."""
