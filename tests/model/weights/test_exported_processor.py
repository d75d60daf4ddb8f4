"""The examples of docs/exports.md, with transformers' own processor: what an export stores must let them run."""

from __future__ import annotations

import re
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.utils import is_torchcodec_available

from vl3train.config.data_options import DataConfig
from vl3train.model.weights.processor import build_processor, keep_arguments_free, trained_fps

PAGE = Path(__file__).parents[3] / "docs" / "exports.md"


@pytest.fixture(scope="module")
def exported(tokenizer_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    build_processor(tokenizer_dir, data=DataConfig(fps=2.0, max_frames=90)).save_pretrained(folder)
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture
def media(tmp_path, monkeypatch):
    """picture.jpg, three frames, and a clip of 382 frames: transformers' sampler asks for frame 382."""
    monkeypatch.chdir(tmp_path)
    picture = Image.fromarray(np.full((40, 60, 3), 90, np.uint8))
    for name in ("picture.jpg", "0.png", "1.png", "2.png"):
        picture.save(name)
    with av.open("clip.mp4", "w") as out:
        stream = out.add_stream("mpeg4", rate=24)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for number in range(382):
            picture = np.full((32, 32, 3), number % 256, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())
    return tmp_path


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)


def times_of(processor, inputs) -> list[float]:
    return [
        float(time)
        for time in re.findall(r"Time ([\d.]+)s", processor.tokenizer.decode(inputs["input_ids"][0]))
    ]


def run(block, processor):
    names = {"processor": processor}
    exec(compile(block, "docs/exports.md", "exec"), names)
    return names["inputs"]


def test_the_examples_without_torchcodec_run(exported, media):
    picture, _, every_clip, frames = blocks()
    assert run(picture, exported)["image_grid_thw"].shape == (1, 3)
    found = times_of(exported, run(every_clip, exported))
    assert len(found) == 15
    assert found == pytest.approx([number * 382 // 15 / 24 for number in range(15)], abs=0.051)
    assert times_of(exported, run(frames, exported)) == [0.0, 0.5, 1.0]


@pytest.mark.skipif(not is_torchcodec_available(), reason="torchcodec is not installed")
def test_a_path_takes_fps_and_num_frames(exported, media):
    path = blocks()[1]
    with pytest.raises(IndexError, match="frame index"):
        run(path, exported)
    assert len(times_of(exported, run(path.replace('"fps": 1.0', '"fps": 2.0'), exported))) == 31
    assert len(times_of(exported, run(path.replace('"fps": 1.0', '"num_frames": 16'), exported))) == 16


@pytest.mark.parametrize(("asked", "count"), [({"fps": 2.0}, 8), ({"num_frames": 5}, 5), ({}, 96)])
def test_decoded_frames_take_either_argument(exported, asked, count):
    clip = torch.zeros(96, 3, 28, 28, dtype=torch.uint8)
    metadata = {"fps": 24.0, "total_num_frames": 96, "frames_indices": list(range(96))}
    messages = [{"role": "user", "content": [{"type": "video", "video": clip}]}]
    inputs = exported.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"video_metadata": [metadata], **asked},
    )
    assert inputs["video_grid_thw"].tolist()[0][0] == count


def test_pil_frames_need_no_argument(exported):
    frames = [Image.new("RGB", (32, 32), (40 * number, 0, 0)) for number in range(4)]
    messages = [{"role": "user", "content": [{"type": "video", "video": frames}]}]
    inputs = exported.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    assert times_of(exported, inputs) == [0.0, 1.0, 2.0, 3.0]


def test_the_config_has_what_the_run_had(exported):
    stored = exported.video_processor
    assert (trained_fps(exported), stored.min_frames, stored.max_frames) == (2.0, 1, 90)
    assert (stored.fps, stored.do_sample_frames) == (None, False)


def test_the_processor_of_an_earlier_build_is_freed(tokenizer_dir, tmp_path):
    old = build_processor(tokenizer_dir)
    del old.video_processor.trained_fps
    old.video_processor.fps, old.video_processor.do_sample_frames = 3.0, True
    old.save_pretrained(tmp_path)
    freed = keep_arguments_free(AutoProcessor.from_pretrained(tmp_path))
    assert trained_fps(freed) == 3.0
    assert (freed.video_processor.fps, freed.video_processor.do_sample_frames) == (None, False)
