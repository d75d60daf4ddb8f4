"""What each process works on, for others to read: while it hangs, and after it was killed."""
