"""Real DeepSpeed goes on from the state of any other layout: by name every bit is as it was saved."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from tests.engine.jobs import start_job
from tests.engine.zero.reshard.moves import KINDS, Trained, next_stage, saved_by
from vl3train.config.schema import MachineConfig
from vl3train.engine.ranks import RunError, join
from vl3train.engine.zero.reshard.layouts import Layout
from vl3train.engine.zero.reshard.load import load_other_layout
from vl3train.engine.zero.reshard.shards import MASTER, STEP, Shards

NEAR = {"float32": 1e-4, "frozen": 1e-4, "frozen left out": 1e-4}
"""The next step's loss and norm, relative: bfloat16 turns a last digit of a sum into a hundredth."""


@pytest.fixture(scope="module")
def rank():
    return join(MachineConfig())


def by_name(folder, kind, layout, groups):
    """All that was saved of each parameter, and its number of steps."""
    shards = Shards(saved_by(folder, kind, layout) / "state", layout, groups)
    found = {}
    for group in shards.groups:
        for name, size in group.items():
            state = shards.state_of(name)
            parts = {STEP: torch.tensor(float(state[STEP]))}
            for what in (MASTER, *(part for part in state if part != STEP)):
                parts[what] = torch.empty(size, dtype=shards.dtype_of(name, what))
                shards.read_into(parts[what], name, 0, what)
            found[name] = {**parts, "weight": shards.weight(name)}
    return found


def assert_same_state(found, wanted, about):
    assert found.keys() == wanted.keys()
    for name, parts in wanted.items():
        assert found[name].keys() == parts.keys(), about
        for what, value in parts.items():
            if what == "weight":  # float32 masters are in place of weights in files of stage 3
                assert torch.equal(found[name][what].bfloat16(), value.bfloat16()), (about, name)
            else:
                assert found[name][what].dtype == value.dtype, (about, name, what)
                assert torch.equal(found[name][what], value), (about, name, what)


@pytest.fixture(scope="module")
def straight(tiny_model_dir, rank, tmp_path_factory):
    """Of the kinds it is called with: what one rank saved after a step in each stage, the figures of its second, and
    the groups."""
    folder = tmp_path_factory.mktemp("straight")
    figures, groups, done = {}, {}, set()

    def made(*names):
        for name in names:
            if name not in done:
                done.add(name)
                make(name, KINDS[name])
        return folder, figures, groups

    def make(name, kind):
        for zero_stage in kind.stages:
            trained = Trained(tiny_model_dir, rank, kind, zero_stage)
            trained.step()
            trained.save(folder, name)
            figures[f"{name} {zero_stage}"] = trained.step()
            if zero_stage:
                layout = Layout(dp_size=1, zero_stage=zero_stage)
                groups[name] = Shards(saved_by(folder, name, layout) / "state", layout, []).groups

    return made


def assert_moved(straight, before, after, folder, figures):
    """Every state was moved, and the steps after it are those of a run that was not."""
    _, wanted, groups = straight
    for name, kind in KINDS.items():
        for zero_stage in kind.stages:
            there = Layout(dp_size=after, zero_stage=next_stage(kind, zero_stage))
            here = Layout(dp_size=before, zero_stage=zero_stage)
            found, saved = (by_name(folder, name, layout, groups[name]) for layout in (there, here))
            about = f"{name}: {here} -> {there}"
            assert_same_state(found, saved, about)
            key = f"{name} {zero_stage}"
            assert figures[key] == pytest.approx(wanted[key], rel=NEAR.get(name, 0.05)), about


@pytest.mark.parametrize(
    ("name", "before_and_now"),
    [
        ("float32", [(0, 3), (3, 1), (2, 0)]),
        *(
            pytest.param(name, list(itertools.permutations(KINDS[name].stages, 2)), marks=pytest.mark.long)
            for name in ("float32", "bfloat16")
        ),
    ],
    ids=["some", "float32", "bfloat16"],
)
def test_on_one_rank_every_stage_takes_every_state(
    tiny_model_dir, rank, straight, name, before_and_now, tmp_path
):
    folder, wanted, groups = straight(name)
    kind = KINDS[name]
    for before, now in before_and_now:
        saved = Layout(dp_size=1, zero_stage=before)
        trained = Trained(tiny_model_dir, rank, kind, now)
        load_other_layout(trained.engine, saved_by(folder, name, saved), saved)
        trained.save(tmp_path, name)
        assert_same_state(
            by_name(tmp_path, name, trained.layout, groups[name]),
            by_name(folder, name, saved, groups[name]),
            f"{name}: {before} -> {now}",
        )
        near = NEAR.get(name, 0.05)
        assert trained.step() == pytest.approx(wanted[f"{name} {before}"], rel=near), (before, now)


def test_another_model_is_refused_and_nothing_changes(tiny_model_dir, rank, straight):
    folder, *_ = straight("float32")
    trained = Trained(tiny_model_dir, rank, KINDS["frozen"], 1)
    before = {name: value.clone() for name, value in trained.engine.engine.module.state_dict().items()}
    saved = Layout(dp_size=1, zero_stage=3)
    with pytest.raises(RunError, match=r"embed_tokens\.weight: the checkpoint trains .*, this run no values"):
        load_other_layout(trained.engine, saved_by(folder, "float32", saved), saved)
    for name, value in trained.engine.engine.module.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.two_processes
@pytest.mark.long
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_more_ranks_take_the_state_of_one_and_one_takes_theirs(
    warm_python, tiny_model_dir, rank, straight, tmp_path, num_ranks
):
    straight = straight(*KINDS)
    folder, _, _ = straight
    words = [str(tiny_model_dir), str(folder), "1"]
    process, _ = start_job(warm_python, "tests.engine.zero.reshard.moves", words, num_ranks=num_ranks)
    assert process.wait(timeout=400) == 0
    figures = json.loads((folder / f"figures-{num_ranks}.json").read_text())
    assert_moved(straight, 1, num_ranks, folder, figures)
    back = {}
    for name, kind in KINDS.items():
        for zero_stage in kind.stages:
            saved = Layout(dp_size=num_ranks, zero_stage=zero_stage)
            trained = Trained(tiny_model_dir, rank, kind, next_stage(kind, zero_stage))
            load_other_layout(trained.engine, saved_by(folder, name, saved), saved)
            trained.save(tmp_path, name)
            back[name, zero_stage] = trained.step()
            assert_same_state(
                by_name(tmp_path, name, trained.layout, straight[2][name]),
                by_name(folder, name, saved, straight[2][name]),
                f"{name}: {saved} -> {trained.layout}",
            )
    assert len(back) == 18
