"""A run that is asked to stop while it waits for data for ever saves what is done, and goes on from there."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from tests.engine.runs import figures, run
from vl3train.data.loader import PackDataset
from vl3train.engine import stop


@pytest.fixture(scope="module")
def words(demo_words):
    own = ["adapter=lora", "adapter.parts=[vision_encoder]", "adapter.rank=2", "adapter.dropout=0.5"]
    own += ["run.num_steps=4", "run.save_steps=100", "run.evaluate_steps=2", "run.evaluate_at_end=false"]
    return [*demo_words, "stage=1", *own]


@pytest.fixture(scope="module")
def straight(words, tmp_path_factory):
    return run([*words, f"run.output_dir={tmp_path_factory.mktemp('straight')}"])


def outcome(folder):
    (adapter,) = folder.glob("checkpoints/step_00000004/adapter/*.safetensors")
    return figures(folder), adapter.read_bytes(), (folder / "evaluations.jsonl").read_text()


def hang_at(pack, monkeypatch, *, held_out):
    """This pack never comes, and while it is waited for the run is asked to stop."""
    monkeypatch.setattr(stop, "SECONDS_FOR_DATA", 0.1)
    get = PackDataset.__getitem__

    def hang(self, number):
        is_held_out = self.data.plan.step.global_packs == 1
        if number == pack and is_held_out == held_out:
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
            time.sleep(600)
        return get(self, number)

    monkeypatch.setattr(PackDataset, "__getitem__", hang)


@pytest.mark.parametrize("held_out", [False, True])
def test_the_step_or_evaluation_is_given_up_and_made_again(
    words, straight, tmp_path, monkeypatch, capsys, held_out
):
    words = [*words, f"run.output_dir={tmp_path}"]
    with monkeypatch.context() as patch:
        hang_at(1 if held_out else 5, patch, held_out=held_out)
        run(words)
    what = "the evaluation" if held_out else "step 3"
    told = f"{what} waited in vain for its data and is given up; stopped on request after step 2"
    assert told in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000002"
    assert not (tmp_path / "finished.json").exists()
    assert (tmp_path / "evaluations.jsonl").exists() is not held_out
    run(words)
    assert outcome(tmp_path) == outcome(straight)
    assert (tmp_path / "finished.json").exists()
