"""What a run would do, looked at before it is paid for."""
