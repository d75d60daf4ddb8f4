"""Says what a checkpoint's folder holds, from headers and JSON files alone: no weights are read, no torch imported."""
