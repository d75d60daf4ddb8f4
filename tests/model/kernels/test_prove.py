"""Kernels are proven by processes beside a run: on a CPU the reference, which is right until its source is another."""

from __future__ import annotations

import json

import pytest

from vl3train.contracts.kept import FOLDER
from vl3train.contracts.shapes import TowerShape
from vl3train.model.attention.check import ERRORS
from vl3train.model.kernels.prove import Wanted, start_proving

SHAPE = TowerShape(
    num_layers=1,
    hidden_size=32,
    intermediate_size=64,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    is_decoder=True,
)


def wanted(attention):
    return Wanted(
        shapes=(SHAPE,), device="cpu", dtype="float32", attention=attention, gemms=False, shares_prefix=False
    )


@pytest.mark.two_processes
def test_what_was_right_is_kept_and_no_process_is_started_for_it_again(monkeypatch, tmp_path):
    monkeypatch.setenv(FOLDER, str(tmp_path))
    proving, failing = start_proving(wanted("reference")), start_proving(wanted("flash_attn_4"))
    assert [len(proving.processes), len(failing.processes)] == [1, 1]
    failing.wait()  # it needs a GPU: the run says so
    proving.wait()
    kept = [json.loads(file.read_text()) for file in (tmp_path / "kept").iterdir()]
    (errors,) = [one["value"] for one in kept if "attention" in one["key"] and one["value"] is not True]
    assert errors.keys() == {*ERRORS}
    assert start_proving(wanted("reference")).processes == []


def test_each_share_is_proven_once():
    gemms = Wanted(
        shapes=(SHAPE, SHAPE),
        device="cuda",
        dtype="bfloat16",
        attention="auto",
        gemms=True,
        shares_prefix=False,
    )
    shares = gemms.shares()
    assert len(shares) == len(set(shares)) == 8
