"""Tasks with known answers, and the runs that show whether a model learns them (benchmarks/learning.py)."""
