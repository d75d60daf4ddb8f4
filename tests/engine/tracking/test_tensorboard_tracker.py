"""Real event files, read back as TensorBoard reads them."""

from __future__ import annotations

import errno
import io

import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vl3train.engine.tracking.tensorboard_tracker import TensorboardTracker
from vl3train.engine.tracking.tracker import ShownAnswer


def read(folder):
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0, "images": 0})
    events.Reload()
    return events


def texts(events, name):
    return [one.tensor_proto.string_val[0].decode() for one in events.Tensors(f"{name}/text_summary")]


def test_a_resumed_run_shows_each_step_once(tmp_path, capsys):
    first = TensorboardTracker(tmp_path, {"stage": {"name": "4_video"}}, step=0)
    for step in (1, 2, 3):
        first.log({"step": step, "loss": 10.0 * step, "source_losses": {"a": 1.0}, "memory_gib": None}, step)
    first.finish(1)
    second = TensorboardTracker(tmp_path, {}, step=2)
    for step in (3, 4):
        second.log({"step": step, "loss": 1.0 * step, "source_losses": {"a": 1.0}}, step)
    second.finish()
    events = read(tmp_path)
    assert [(one.step, one.value) for one in events.Scalars("loss")] == [(1, 10), (2, 20), (3, 3), (4, 4)]
    assert set(events.Tags()["scalars"]) == {"loss", "source_losses/a"}
    assert '"name": "4_video"' in texts(events, "config")[0]
    assert f"tensorboard --logdir {tmp_path / 'tensorboard'}" in capsys.readouterr().out


def test_answers_data_and_alerts_are_shown(tmp_path):
    tracker = TensorboardTracker(tmp_path, {}, step=0)
    picture = np.zeros((28, 56, 3), np.uint8)
    picture[:, 28:] = 200
    rows = [
        ShownAnswer(
            source="count",
            key="a.tar/1",
            picture=picture,
            question="How many <b>?",
            expected="2",
            answer="3",
            scores={"exact_match": 0.0},
        )
    ]
    tracker.answers(rows, 4)
    tracker.data([], {"train": {"fingerprint": "0123"}})
    tracker.alert("step skipped", "step 4 is skipped", is_bad=True)
    tracker.finish()
    events = read(tmp_path)
    (shown,) = events.Images("held_out/count/0")
    assert shown.step == 4
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(shown.encoded_image_string))), picture)
    assert "| 0 | a.tar/1 | How many &lt;b&gt;? | 2 | 3 | 0 |" in texts(events, "held_out_answers/count")[0]
    assert "0123" in texts(events, "data")[0]
    assert texts(events, "alerts") == ["**WARNING** step skipped: step 4 is skipped"]


def test_a_disk_that_takes_no_more_does_not_end_the_run(tmp_path, capsys):
    tracker = TensorboardTracker(tmp_path, {}, step=0)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    tracker._writer.add_scalar = full
    tracker.log({"loss": 1.0}, 1)
    tracker.log({"loss": 1.0}, 2)
    tracker.finish()
    assert capsys.readouterr().out.count("TensorBoard gets no more figures of this run") == 1
