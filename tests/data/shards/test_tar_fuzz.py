"""Mutated tars end no reader, and what is found in them lies in the file."""

from __future__ import annotations

import itertools
import os
import random
import sys
import tarfile
import tempfile
from pathlib import Path

from tests.data.shards.test_tar_members import ODD, around, extension, member, record
from vl3train.data.shards.tar_headers import shard_samples
from vl3train.data.shards.tar_members import Member, read_members

FIELDS = [
    (0, 100),
    (100, 8),
    (124, 12),
    (136, 12),
    (148, 8),
    (156, 1),
    (157, 100),
    (257, 8),
    (345, 155),
    (482, 1),
]


def mutated(rng: random.Random, good: bytes, places: list[int]) -> bytes:
    """``good`` with one to four changes, most of them in headers whose checksum is then made right."""
    data = bytearray(good)
    for _ in range(rng.randint(1, 4)):
        at, (start, size) = rng.choice(places), rng.choice(FIELDS)
        match rng.randrange(5):
            case 0:
                data[at + start : at + start + size] = rng.randbytes(size)
            case 1:
                data[at + start + rng.randrange(size)] = rng.choice(b"\0\xff\x80 -079x/")
            case 2:
                data[at + 124 : at + 136] = b"%011o\0" % rng.choice([0, 1, 511, 513, 2048, 8**11 - 1])
            case 3:
                data[at + 156] = rng.choice(b"012345678xgXLKSDVMNZ\0")
            case 4:
                place = rng.randrange(len(data))
                size = min(rng.randrange(600), len(data) - place)
                data[place : place + size] = rng.randbytes(size)
        if rng.random() < 0.7:
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    return bytes(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)


def fuzz(folder, rounds: int, seed: int) -> None:
    """No mutation ends the reader; what it finds lies in the file and is UTF-8; each header is found once at most.

    Run 500 000 rounds by ``python -m tests.data.shards.test_tar_fuzz 500000``.
    """
    rng = random.Random(seed)
    body = b"".join(
        member(f"{number}.{part}", rng.randbytes(rng.randrange(900)), format)
        for number, format in enumerate([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT] * 2)
        for part in ("0.jpg", "json")
    )
    long = "a long folder/" * 20
    body += member(f"{long}x.json", b"{}", tarfile.PAX_FORMAT) + member(
        f"{long}y.json", b"{}", tarfile.GNU_FORMAT
    )
    body += extension(b"g", record(b"comment", b"x")) + ODD["a sparse member of pax"][0]
    good = around(body)
    places = [at for at in range(0, len(good) - 1024, 512) if good[at + 257 :].startswith(b"ustar")]
    shard = folder / "a.tar"
    for _ in range(rounds):
        data = mutated(rng, good, places)
        shard.write_bytes(data)
        found = read_members(shard)
        members = [one for one in found if isinstance(one, Member)]
        assert all(0 <= one.at < one.offset <= one.offset + one.size <= len(data) for one in members)
        assert all(one.offset + one.size <= next_.at for one, next_ in itertools.pairwise(members))
        assert len({one.at for one in found}) == len(found) <= len(data) // 512 + 2
        for sample in shard_samples(shard):
            "".join(
                [sample.key, str(sample.rejection), *sample.ignored, *(p.name for p in sample.parts)]
            ).encode()


def test_no_mutation_ends_the_reader(tmp_path):
    fuzz(tmp_path, 200, seed=1)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        for batch in range(int(sys.argv[1]) // 1000):
            fuzz(Path(name), 1000, seed=1000 + batch)
