"""How long a start takes, and where the seconds go: the parts of benchmarks/start.py."""
