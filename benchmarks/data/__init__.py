"""The data plane: decoding, planning, waiting for data."""
