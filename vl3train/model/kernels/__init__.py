"""Optional fused operations, each with a plain reference and a check beside it."""
