"""Mutated pictures and clips raise nothing but rejected samples; what ends a worker is counted and named."""

from __future__ import annotations

import os
import signal

from benchmarks.data.fuzz import clips, decode_as_clip, decode_as_image, mutated, pictures, run


def test_no_mutated_picture_or_clip_raises_anything_but_a_rejected_sample():
    for sources, decode, total in ((pictures(), decode_as_image, 150), (clips(), decode_as_clip, 40)):
        counts, odd = run(sources, decode, range(total), seed=1)
        assert odd == []
        assert counts["read"] + counts["rejected"] == total
        assert counts["read"] >= total / 10
        assert counts["rejected"] >= total / 10


def test_every_file_is_read_as_it_is():
    for sources, decode in ((pictures(), decode_as_image), (clips(), decode_as_clip)):
        for number, (_, data) in enumerate(sources):
            decode(data, number)


def test_a_crash_and_a_bug_are_counted_and_named_and_the_others_go_on():
    def decode(data: bytes, number: int) -> None:
        if number == 3:
            os.kill(os.getpid(), signal.SIGSEGV)
        if number == 5:
            raise KeyError("a bug")

    counts, odd = run([("some", b"bytes")], decode, range(8), seed=0)
    assert counts == {"read": 6, "rejected": 0, "bugs": 1, "crashes": 1}
    assert len(odd) == 2
    assert "input 3 (some): SIGSEGV" in odd
    assert any(line.startswith("input 5 (some): ") and "a bug" in line for line in odd)


def test_a_mutation_is_a_function_of_the_seed():
    import random

    data = pictures()[0][1]
    assert mutated(data, random.Random("0 7")) == mutated(data, random.Random("0 7"))
    assert len({mutated(data, random.Random(f"0 {number}")) for number in range(20)}) > 15
