"""What is kept of a skipped step is read back as it was, and is JSON."""

from __future__ import annotations

import dataclasses
import doctest
import json
import math

import pytest

from vl3train.contracts import bad_step
from vl3train.contracts.bad_step import BadStep, SampleLoss, read_bad_step, write_bad_step

SAMPLE = SampleLoss(key="s/0", source="captions", rank=1, micro_batch=0, supervised_tokens=3, loss=-math.inf)
BAD = BadStep(
    step=3,
    epoch=0,
    reason="loss nan",
    loss=math.inf,
    grad_norm=2.5,
    part_grad_norms={"projector": math.inf},
    most_loss=None,
    most_grad_norm=7.0,
    source_losses={"captions": math.inf, "ocr": 1.0},
    samples=(SAMPLE, dataclasses.replace(SAMPLE, loss=None, supervised_tokens=0)),
)


def test_doctests():
    assert doctest.testmod(bad_step).failed == 0


def test_it_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "bad_steps" / "step.json"
    write_bad_step(path, BAD)
    assert read_bad_step(path) == BAD
    assert [sample.is_finite for sample in BAD.samples] == [False, True]

    def refuse(text):
        raise AssertionError(text)

    json.loads(path.read_text(), parse_constant=refuse)


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"samples": [{"key": 3}]}', "\udcff"])
def test_another_file_is_named(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"other\.json is not the file of a skipped step"):
        read_bad_step(path)


def test_a_file_of_a_build_that_counted_from_0_is_about_the_same_step(tmp_path):
    path = tmp_path / "step.json"
    write_bad_step(path, BAD)
    earlier = json.loads(path.read_text())
    del earlier["part_grad_norms"]
    path.write_text(json.dumps(earlier))
    found = read_bad_step(path)
    assert (found.step, found.part_grad_norms) == (BAD.step + 1, {})
