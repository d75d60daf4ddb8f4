"""A checkpoint of another run is refused with what differs, and reading one runs no code of it."""

from __future__ import annotations

import os
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.engine.checkpoints.made import make
from vl3train.engine.checkpoints.load import layout_of, refuse_other_identity
from vl3train.engine.checkpoints.random_state import (
    load_random_state,
    load_random_state_of,
    random_state,
    save_random_state,
)
from vl3train.engine.ranks import RunError
from vl3train.engine.zero.reshard.layouts import Layout
from vl3train.engine.zero.reshard.shards import Shards
from vl3train.engine.zero.state_files import MODEL, SAME, WEIGHTS_IN, StateFiles, read_state


def test_another_plan_is_refused_with_every_difference(tmp_path):
    rest = {"stage": 2, "adapter": {"kind": "none"}}
    identity = {"plan": {"seed": 0, "index": "abc"}, "model": {"projector": 7}, **rest}
    folder = make(tmp_path, 1, identity=identity)
    assert refuse_other_identity(folder, identity)["step"] == 1
    with pytest.raises(RunError, match="cannot be resumed") as caught:
        refuse_other_identity(
            folder, {"plan": {"seed": 1, "index": "abc"}, "model": {"projector": 8}, **rest}
        )
    text = str(caught.value)
    assert "plan.seed: the checkpoint has 0, this run has 1" in text
    assert "model.projector: the checkpoint has 7, this run has 8" in text
    assert "index" not in text.split("Either")[0].replace("plan.index", "")
    assert "stage.init_from" not in text, "there are no weights"
    with pytest.raises(RunError, match=r"or None without data\.share_prefix=true"):
        refuse_other_identity(folder, {**identity, "plan": {**identity["plan"], "max_family_records": 16}})
    (folder / "weights").mkdir()
    with pytest.raises(RunError, match=f"stage.init_from={folder / 'weights'}"):
        refuse_other_identity(folder, {"stage": 2})
    with pytest.raises(RunError) as caught:
        refuse_other_identity(folder, {"stage": 1})
    assert "stage.init_from" not in str(caught.value), "stage 1 does not take it"


def test_ranks_and_zero_stage_may_change_and_the_type_of_numbers_may_not(tmp_path):
    machine = {"machine.dp_size": 4, "machine.zero_stage": 1, "machine.dtype": "bfloat16"}
    identity = {"stage": 2, "machine": machine, "adapter": {"kind": "none"}}
    folder = make(tmp_path, 1, identity=identity)
    moved = {**machine, "machine.dp_size": 2, "machine.zero_stage": 3}
    resume = refuse_other_identity(folder, {**identity, "machine": moved})
    assert layout_of(resume) == Layout(dp_size=4, zero_stage=1)
    with pytest.raises(RunError) as caught:
        refuse_other_identity(folder, {**identity, "machine": {**moved, "machine.dtype": "float32"}})
    assert str(caught.value).count("  machine.") == 1


def test_ranks_keep_their_random_state_and_new_ones_have_their_own(tmp_path):
    for rank in range(2):
        torch.manual_seed(rank)
        save_random_state(tmp_path / f"rank_{rank}.pt", random_state())
    drawn = {}
    for rank in (3, 2, 1, 0, 4, 3):
        load_random_state_of(tmp_path, rank)
        first = draw()
        assert drawn.setdefault(rank, first) == first, "the same at each resume"
    assert len(set(drawn.values())) == 5
    torch.manual_seed(1)
    assert drawn[1][-1] == torch.rand(1).item()


def draw():
    return random.random(), np.random.rand(), np.random.randn(), torch.rand(1).item()


def test_random_state_comes_back(tmp_path):
    np.random.randn()  # numpy keeps the second of a pair
    save_random_state(tmp_path / "state.pt", random_state())
    first = draw()
    load_random_state(tmp_path / "state.pt")
    assert draw() == first


def test_random_state_as_it_was_written_before_2026_12_comes_back(tmp_path):
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": None,
    }
    torch.save(state, tmp_path / "state.pt")
    first = draw()
    load_random_state(tmp_path / "state.pt")
    assert draw() == first


class MakesFolder:
    """Its pickle makes a folder when it is read: harmless, and seen."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_weights_that_somebody_laid_beside_the_runs_own_are_not_read(tmp_path):
    state, weights = tmp_path / "engine" / "state" / "state.pt", tmp_path / "weights"
    state.parent.mkdir(parents=True)
    weights.mkdir()
    torch.save({WEIGHTS_IN: "weights", SAME: {}, "module": {}}, state)
    save_file({"w": torch.ones(2)}, weights / "model.safetensors")
    save_file({"w": torch.zeros(2)}, weights / "other.safetensors")
    assert read_state(state)["module"][f"{MODEL}w"].tolist() == [1.0, 1.0]


def read_for_another_layout(path):
    shutil.copy(path, path.with_name("mp_rank_00_model_states.pt"))
    Shards(path.parent, Layout(dp_size=2, zero_stage=1), [])


@pytest.mark.parametrize(
    "read",
    [load_random_state, StateFiles().load, read_for_another_layout],
    ids=["random", "engine", "another layout"],
)
def test_code_in_a_file_of_a_checkpoint_is_not_run(tmp_path, read):
    torch.save({"torch": MakesFolder(tmp_path / "ran")}, tmp_path / "state.pt")
    with pytest.raises(pickle.UnpicklingError):
        read(tmp_path / "state.pt")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "state.pt", weights_only=False)
    assert (tmp_path / "ran").exists(), "the file would do it"
