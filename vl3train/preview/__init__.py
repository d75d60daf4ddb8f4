"""What a run would do, shown before it starts."""
