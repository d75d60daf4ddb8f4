"""A save is written while training goes on, and holds what was there when it began."""

from __future__ import annotations

import shutil
import threading
import time

import pytest
import torch

from tests.engine.runs import figures, run
from tests.engine.zero.reshard.moves import KINDS, Trained
from vl3train.engine import loop
from vl3train.engine.checkpoints import cost, saver
from vl3train.engine.checkpoints.cost import can_copy
from vl3train.engine.zero.engine_state import FOLDER
from vl3train.engine.zero.host_copies import HostCopies
from vl3train.engine.zero.state_files import read_state
from vl3train.model.weights.headers.manifest import list_files, read_manifest


@pytest.fixture(scope="module")
def words(demo_words):
    return [*demo_words, "stage=1", "run.num_steps=5", "run.evaluate_at_end=false", "run.keep_checkpoints=9"]


@pytest.fixture(scope="module")
def at_once(words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("at once")
    return run([*words, f"run.output_dir={folder}", "run.save_in_background=false"])


def late_until(done, folder, monkeypatch):
    """The first save is written when the step ``done`` is done; returns what lay in the folder then."""
    go, seen = threading.Event(), []
    write, log = saver.write_checkpoint, loop.log_step

    def write_late(checkpoints, snapshot, **settings):
        assert go.wait(60)
        return write(checkpoints, snapshot, **settings)

    def log_step(run, step_batches, *more):
        log(run, step_batches, *more)
        if step_batches.cursor.step + 1 == done:
            seen.extend(folder.glob("checkpoints/step_????????"))
            go.set()

    monkeypatch.setattr(saver, "write_checkpoint", write_late)
    monkeypatch.setattr(loop, "log_step", log_step)
    return seen


def test_a_checkpoint_holds_the_state_of_its_step_although_training_went_on(
    words, at_once, tmp_path, monkeypatch
):
    seen = late_until(4, tmp_path, monkeypatch)
    run([*words, f"run.output_dir={tmp_path}"])
    assert seen == [], "steps 3 and 4 were done before the save of step 2 was written"
    assert figures(tmp_path) == figures(at_once)
    for step in (2, 4, 5):
        name = f"checkpoints/step_0000000{step}"
        one, other = (read_manifest(folder / name)[1] for folder in (tmp_path, at_once))
        assert one.keys() == other.keys()
        for file in one:
            if file.startswith("engine/"):
                # Tensors that are views are saved with all of their storage, copies are not.
                assert_same_state(*(read_state(folder / name / file) for folder in (tmp_path, at_once)))
            elif file != "resume.json":  # it names the output folder
                assert one[file] == other[file], file


def assert_same_state(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same_state(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for mine, its in zip(one, other, strict=True):
            assert_same_state(mine, its)
    elif type(one).__module__ == "builtins":
        assert one == other


def test_a_save_waits_for_the_one_before_and_says_so(words, at_once, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(saver, "LONG_WAIT", 0.01)
    write, wait, next_save = saver.write_checkpoint, saver.Saver.wait, threading.Event()

    def write_slowly(checkpoints, snapshot, **settings):
        if snapshot.step == 2:
            assert next_save.wait(60)
            time.sleep(0.5)
        return write(checkpoints, snapshot, **settings)

    def wait_for_it(self):
        if self.step == 2:
            next_save.set()
        return wait(self)

    monkeypatch.setattr(saver, "write_checkpoint", write_slowly)
    monkeypatch.setattr(saver.Saver, "wait", wait_for_it)
    monkeypatch.setattr(HostCopies, "problem", "no memory to lock")
    run([*words, f"run.output_dir={tmp_path}"])
    said = capsys.readouterr().out
    assert "the checkpoint of step 2 is still being written; training waits for it" in said
    assert said.count("did not page-lock the host's memory for a copy of the state (no memory to lock)") == 1
    assert figures(tmp_path) == figures(at_once)
    [waited] = [line for line in figures(tmp_path, "save_seconds") if line[0] == "5"]
    assert float(waited[-1]) > 0.01


def test_a_fault_of_the_program_while_it_is_written_ends_the_run(words, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise IndexError("planted here")

    monkeypatch.setattr(saver, "write_checkpoint", fail)
    with pytest.raises(IndexError, match="planted here"):
        run([*words, f"run.output_dir={tmp_path}"])


def test_a_run_that_fails_meanwhile_still_has_its_save(words, tmp_path, monkeypatch):
    write, begun = saver.write_checkpoint, threading.Event()

    def write_late(checkpoints, snapshot, **settings):
        begun.set()
        threading.Event().wait(1)
        return write(checkpoints, snapshot, **settings)

    def fail(*_):
        assert not begun.is_set(), "planted here"

    monkeypatch.setattr(saver, "write_checkpoint", write_late)
    monkeypatch.setattr(loop, "log_step", fail)
    with pytest.raises(AssertionError, match="planted here"):
        run([*words, f"run.output_dir={tmp_path}"])
    assert (tmp_path / "checkpoints" / "step_00000002" / "MANIFEST.json").exists()


def test_where_the_host_has_no_memory_for_a_copy_training_waits(
    words, at_once, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(cost, "free_of_machine", lambda: 3 * 2**20)
    run([*words, f"run.output_dir={tmp_path}"])
    assert "a host has only 3 MiB of 11 MiB" in capsys.readouterr().out
    assert figures(tmp_path) == figures(at_once)
    monkeypatch.undo()
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize(("kind", "zero_stage"), [(name, kind.stages[0]) for name, kind in KINDS.items()])
def test_what_a_checkpoint_takes_is_known_before_the_first_step(
    tiny_model_dir, one_rank, tmp_path, kind, zero_stage
):
    trained = Trained(tiny_model_dir, one_rank, KINDS[kind], zero_stage)
    told = trained.engine.bytes_to_save()
    trained.step()
    state = trained.engine.take_state()
    (tmp_path / FOLDER).mkdir()
    state.write(tmp_path)
    torch.save(state.weights, tmp_path / "weights")
    assert told == pytest.approx(sum(list_files(tmp_path).values()), rel=0.05)
    assert told == pytest.approx(trained.engine.bytes_to_save(), rel=0.01)
    assert can_copy(trained.engine, one_rank, tmp_path, is_wanted=True, say=print)


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = [torch.device("cpu"), pytest.param(torch.device("cuda", 0), marks=[pytest.mark.gpu, NEEDS_GPU])]


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_copies_are_of_the_moment_and_their_memory_is_used_again(device, tmp_path):
    copies = HostCopies(device)
    copies.reserve(3 * 2**20)
    weight = torch.arange(6.0, device=device).view(2, 3)
    large = torch.arange(2.0**18, device=device)
    state = {"a": weight.t(), "again": [weight, (weight, 3)], "none": torch.empty(0), "half": weight.half()}
    copies.begin()
    first = copies.copy(
        {**state, "large": [large, large + 1, large + 2, large + 3]}
    )  # more than is set aside
    copies.finish()
    weight.zero_()
    assert first["a"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert first["again"][0] is first["again"][1][0]
    assert first["again"][1][1] == 3
    assert first["half"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert [one[-1].item() - 2**18 for one in first["large"]] == [-1, 0, 1, 2]
    assert copies.problem is None
    torch.save(first, tmp_path / "first")
    assert (tmp_path / "first").stat().st_size < 4.1 * 2**20  # of each tensor what is its own
    copies.begin()
    second = copies.copy({**state, "again": [weight + 1]})
    copies.finish()
    assert second["again"][0].tolist() == [[1, 1, 1], [1, 1, 1]]
    assert second["a"].data_ptr() == first["a"].data_ptr()
    assert first["a"].is_pinned() == (device.type == "cuda")
    del copies
    assert not first["a"].is_pinned()


@pytest.mark.gpu
@NEEDS_GPU
def test_small_copies_share_no_locked_page_with_what_comes_after_them():
    for _ in range(3):
        copies = HostCopies(torch.device("cuda", 0))
        copies.reserve(1000)
        copies.begin()
        kept = [copies.copy(torch.full((3,), number, device="cuda")) for number in range(100)]
        copies.finish()
        assert [int(one[0]) for one in kept] == list(range(100))
        del copies, kept
        assert torch.arange(100_000).cuda().sum().item() == 4999950000
