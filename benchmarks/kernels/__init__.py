"""Single kernels, each beside its alternative."""
