"""One thin file a command: arguments in, exit code out."""
