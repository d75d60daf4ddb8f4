"""Says what a checkpoint's folder holds, from headers, JSON files and digests: no torch is imported."""
