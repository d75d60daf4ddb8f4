"""The planner's benchmark measures what it says, on a small mixture; the table is made from the kept results."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from benchmarks import one_gpu, table
from benchmarks.data.mixture import MAX_TOKENS, mixture
from benchmarks.data.plan import (
    balance_figures,
    first_fit_per_rank,
    in_child,
    measured,
    next_fit,
    planned,
    step_config,
)
from benchmarks.figures import Figures
from vl3train.data.plan.plan import Plan


def test_figures_are_json_lines_with_their_machine(capsys, monkeypatch):
    balance_figures(Figures("test", keep=False, packages=("numpy",)), 60_000, 4)
    lines = {line["figure"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
    assert {"fill", "plan_step_seconds_p99", "balance_p99_k8", "balance_p99_k64", "balance_p99_k512"} <= set(
        lines
    )
    for line in lines.values():
        assert {"figure", "value", "unit", "better", "machine", "versions", "command"} <= set(line)
    assert lines["fill"]["value"] > 0.98
    assert lines["balance_p99_k8"]["value"] < lines["balance_p99_k8_next_fit"]["value"]


def test_a_child_process_measures_itself():
    found = in_child("cold", 20_000, 8)
    assert found["steps"] > 10
    assert 0 < found["gib"] < 2


@pytest.fixture(scope="module")
def usual():
    """20 steps of 8 packs on one mixture, packed in the usual ways and by the planner."""
    data = mixture(30_000)
    plan = planned(Plan(data, 0, step_config(8)), 20)
    return {"plan": plan, "next_fit": next_fit(data, 8, 20), "first_fit": first_fit_per_rank(data, 8, 20)}


@pytest.mark.parametrize("name", ["plan", "next_fit", "first_fit"])
def test_a_packer_fills_real_packs_under_the_cap(usual, name):
    found = usual[name]
    assert len(found["fill"]) == len(found["balance"]) >= 19
    assert 0.8 < np.mean(found["fill"]) <= 1
    assert np.max(found["fill"]) <= 1


def test_the_planner_balances_packs_and_the_usual_packers_do_not(usual):
    """Balance is the work of the costliest pack over the mean pack's: 1 is even."""
    assert np.max(usual["plan"]["balance"]) < 1.01
    for name in ("next_fit", "first_fit"):
        assert np.min(usual[name]["balance"]) > 1.05
    assert np.mean(usual["plan"]["fill"]) > np.mean(usual["next_fit"]["fill"])


def test_balance_and_fill_are_those_of_the_packs():
    sizes, costs = [8192, 8192, 4096], np.array([3, 1, 2])
    found = measured([[[0], [1, 2]]], sizes, costs)
    assert found["balance"] == [1.0]
    assert found["fill"] == [20480 / (2 * MAX_TOKENS)]
    assert measured([[[0, 2], [1]]], sizes, costs)["balance"] == [5 / 3]


def test_the_table_is_that_of_the_kept_results():
    """Run `python benchmarks/table.py` where this fails."""
    assert (table.FOLDER / "README.md").read_text(encoding="utf-8") == table.table()


def test_rows_of_the_gpu_are_lines_of_one_table():
    lines = [json.loads(line) for line in (table.FOLDER / "results/one_gpu.jsonl").read_text().splitlines()]
    page = table.table()
    for line in lines:
        if line["figure"] == "useful_tflops_7b":
            more = line["more"]
            cells = [f"{line['value']:.4g}", "500", f"{more['seconds_a_pack'] * 1e3:,.0f}"]
            assert f"| 7b_one_gpu | {' | '.join(cells)} | " in page
            steps = len(more["step_seconds"])
            assert f"| {more['peak_gib']:.1f} | 0 | {steps} | H200 |" in page
        if line["figure"] == "tflops_7b_two_gpus":
            assert f"| 7b_two_gpus | {line['value']:.4g} |" in page
            assert "| 4 | 2 x H200 |" in page
    assert "| peak_gib_7b |" not in page, "said once"
    assert "| longest_pack_2b |" in page
    assert "| recompiles |" in page


def test_without_a_gpu_no_row_is_run_and_no_line_is_kept(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["one_gpu", "--rows", "2b"])
    with pytest.raises(SystemExit):
        one_gpu.main()
    assert "--tiny runs them small on the CPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
