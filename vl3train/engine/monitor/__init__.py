"""What people see of a run: console and metrics."""
