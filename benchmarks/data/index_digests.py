"""What it costs to check the digests of an index at the start of a run: ``python -m benchmarks.data.index_digests``.

The rows are those of the tests, a million samples in 100 shards. Files were just written, so that a disk that is slower
than a sha256 (1 to 2 GB/s on one core) adds its own time.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from tests.data.plan.test_sample_table import place_of, write_index
from vl3train.data.plan.sample_table import is_whole
from vl3train.data.shards.index import open_index
from vl3train.data.shards.manifest import check_rows, read_manifest

NUM_SAMPLES, NUM_SHARDS = 1_000_000, 100


def main() -> None:
    """Print seconds and sizes."""
    with tempfile.TemporaryDirectory() as name:
        shards, cache = Path(name, "shards"), Path(name, "cache")
        write_index(shards, NUM_SAMPLES, num_shards=NUM_SHARDS)
        place = place_of(shards)
        start = time.perf_counter()
        entries = read_manifest(place)["shards"]
        told = time.perf_counter()
        for entry in entries:
            check_rows(place.folder, entry)
        checked = time.perf_counter()
        size = sum(file.stat().st_size for file in place.folder.glob("*.parquet"))
        print(f"manifest {told - start:.3f} s; digests of {size / 1e6:.0f} MB of rows {checked - told:.3f} s")
        start = time.perf_counter()
        index = open_index([("some", 1.0, place)], folder=cache)
        print(f"first opening, which writes the mapped rows: {time.perf_counter() - start:.2f} s")
        assert index.file is not None
        start = time.perf_counter()
        assert is_whole(index.file)
        checked = time.perf_counter()
        size = index.file.stat().st_size
        print(f"digest of {size / 1e6:.0f} MB of mapped rows, at each further start: {checked - start:.3f} s")
        start = time.perf_counter()
        open_index([("some", 1.0, place)], folder=cache)
        print(f"further opening, with that digest: {time.perf_counter() - start:.3f} s")


if __name__ == "__main__":
    main()
