"""Inference must see what training sees, and a batch must answer as each request alone."""

from __future__ import annotations

import io
import json
import shutil

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from vl3train.cli.main import main
from vl3train.contracts.tokens import IMAGE_PAD, VIDEO_PAD
from vl3train.data.media.clips import DecodeLimits, decode_clip
from vl3train.inference.answer import Asker
from vl3train.inference.requests import Request


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Two pictures and two H.264 clips, 2 s at 10 frames/s and 5 s at 8 frames/s."""
    folder = tmp_path_factory.mktemp("media")
    draw = np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 255, (61, 90, 3), dtype=np.uint8)).save(folder / "a.jpg")
    Image.fromarray(draw.integers(0, 255, (120, 60, 3), dtype=np.uint8)).save(folder / "b.png")
    for name, num_frames, fps in (("short.mp4", 20, 10), ("long.mp4", 40, 8)):
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream("libx264", rate=fps)
            stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
            for i in range(num_frames):
                picture = np.full((64, 96, 3), 40, np.uint8)
                picture[10:40, 4 * (i % 16) : 4 * (i % 16) + 20] = 220
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    return folder


@pytest.fixture(scope="module")
def asker(lively_model_dir):
    return Asker.load(lively_model_dir, device="cpu", max_new_tokens=12)


def requests_on(media):
    return [
        Request(prompt="What is the capital of France?"),
        Request(prompt="How many?", images=(media / "a.jpg",)),
        Request(prompt="Describe the video.", videos=(media / "short.mp4",), system="user system"),
        Request(
            prompt="How many red circles?",
            images=(media / "a.jpg", media / "b.png"),
            videos=(media / "short.mp4", media / "long.mp4"),
        ),
    ]


def test_inputs_equal_the_processors(asker, media):
    """One image and one clip: no budget is shared, so the stock processor makes the same tensors."""
    request = Request(prompt="How many?", images=(media / "a.jpg",), videos=(media / "long.mp4",))
    ours = asker.inputs(request)
    data = (media / "long.mp4").read_bytes()
    limits = DecodeLimits(max_pixels=10**8, max_seconds=1e4)
    clip = decode_clip(data, fps=1.0, min_frames=1, max_frames=180, limits=limits)
    assert len(clip.times) == 5
    content = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "How many?"}]
    text = asker.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    theirs = asker.processor(
        text=[text],
        images=[Image.open(media / "a.jpg")],
        videos=[torch.from_numpy(clip.frames).permute(0, 3, 1, 2)],
        videos_kwargs={
            "do_sample_frames": False,
            "video_metadata": [
                {
                    "fps": 8.0,
                    "total_num_frames": 40,
                    "frames_indices": [round(8 * time) for time in clip.times],
                }
            ],
        },
        return_tensors="pt",
    )
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    assert "pixel_values_videos" in ours


def test_time_stamps_are_the_clips_own(asker, media):
    asker = Asker(**{**asker_fields(asker), "fps": 2.0, "max_frames": 6})
    ids = asker.inputs(Request(prompt="x", videos=(media / "long.mp4",)))["input_ids"][0]
    text = asker.processor.tokenizer.decode(ids).replace(VIDEO_PAD, "")
    clip = decode_clip(
        (media / "long.mp4").read_bytes(),
        fps=2.0,
        min_frames=1,
        max_frames=6,
        limits=DecodeLimits(max_pixels=10**8, max_seconds=1e4),
    )
    assert len(clip.times) == 6
    stamps = ",".join(f"Time {time:.1f}s:" for time in clip.times)
    assert text == f"<|im_start|>user\n{stamps}\nx<|im_end|>\n<|im_start|>assistant\n"


def asker_fields(asker):
    return {name: getattr(asker, name) for name in Asker.__dataclass_fields__}


def test_the_token_budget_is_shared_among_all_pictures(asker, lively_model_dir, media, monkeypatch):
    processor = AutoProcessor.from_pretrained(lively_model_dir)
    processor.image_processor.max_visual_tokens = 40
    small = Asker(**{**asker_fields(asker), "processor": processor})
    request = Request(prompt="x", images=(media / "a.jpg", media / "b.png"), videos=(media / "short.mp4",))
    inputs = small.inputs(request)
    for grid in inputs["image_grid_thw"]:
        assert 5 <= grid.prod() <= 10  # 40 tokens for 2 images and 2 frames
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(processor.image_token_id) == int(inputs["image_grid_thw"].prod(1).sum())
    assert ids.count(processor.video_token_id) == int(inputs["video_compression_mask"].sum())
    alone = small.inputs(Request(prompt="x", images=(media / "a.jpg",)))
    assert alone["image_grid_thw"].prod() == 24  # 4 x 6 patches; 40 would fit


def test_a_mixed_batch_answers_as_each_request_alone(asker, media):
    requests = requests_on(media)
    together = asker.answers(requests)
    assert together == [asker.answers([request])[0] for request in requests]
    assert len(set(together)) == 4


def test_the_command_line_prints_one_answer(asker, lively_model_dir, media, capsys):
    words = [
        "--image",
        media / "a.jpg",
        "--image",
        media / "b.png",
        "--prompt",
        "How many?",
        "--device",
        "cpu",
    ]
    assert (
        main(["generate", "--model", str(lively_model_dir), "--max-new-tokens", "12", *map(str, words)]) == 0
    )
    images = (media / "a.jpg", media / "b.png")
    assert capsys.readouterr().out.strip() == asker.answers([Request(prompt="How many?", images=images)])[0]


def test_an_empty_answer_is_said_to_be_one(lively_model_dir, tmp_path, capsys):
    folder = shutil.copytree(lively_model_dir, tmp_path / "silent")
    settings = json.loads((folder / "generation_config.json").read_text())
    settings["forced_eos_token_id"] = settings["eos_token_id"]  # so that the first token ends the answer
    (folder / "generation_config.json").write_text(json.dumps(settings))
    words = ["--max-new-tokens", "1", "--prompt", "How many?", "--device", "cpu"]
    assert main(["generate", "--model", str(folder), *words]) == 0
    assert capsys.readouterr().out == "(empty answer)\n"


def test_a_batch_file_is_answered_in_order(asker, lively_model_dir, media, tmp_path):
    lines = [
        {"prompt": "How many?", "image": "a.jpg"},
        {"prompt": "Describe the video.", "video": ["short.mp4"], "system": "user system"},
        {"prompt": "What is the capital of France?"},
    ]
    batch = tmp_path / "requests.jsonl"
    batch.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    out = tmp_path / "answers.jsonl"
    words = ["generate", "--model", lively_model_dir, "--batch", batch, "--out", out, "--media-root", media]
    words += ["--max-new-tokens", 12, "--batch-size", 2, "--device", "cpu"]
    assert main([str(word) for word in words]) == 0
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [answer["prompt"] for answer in answers] == [line["prompt"] for line in lines]
    requests = requests_on(media)
    assert answers[0]["answer"] == asker.answers([requests[1]])[0]
    assert answers[1]["answer"] == asker.answers([requests[2]])[0]
    assert main([str(word) for word in words]) == 1  # never written over
    assert len(out.read_text().splitlines()) == 3


def test_every_bad_line_is_told_at_once(lively_model_dir, media, tmp_path, capsys):
    batch = tmp_path / "requests.jsonl"
    batch.write_text(
        '{"prompt": "fine"}\n'
        "{not json\n"
        '{"image": "a.jpg"}\n'
        '{"prompt": "x", "image": "none.jpg", "picture": 3}\n'
        f'{{"prompt": "see {IMAGE_PAD}"}}\n'
        "[1]\n"
        '{"prompt": "x", "video": 7}\n'
    )
    words = ["--model", lively_model_dir, "--batch", batch, "--out", tmp_path / "out", "--media-root", media]
    assert main(["generate", *map(str, words)]) == 1
    told = capsys.readouterr().err
    for text in (
        "line 2: is not JSON",
        "line 3: prompt is missing",
        "line 4: unknown key 'picture'",
        "none.jpg does not exist",
        f"line 5: prompt holds {IMAGE_PAD}",
        "line 6: is a list",
        "line 7: video is neither a path nor a list",
    ):
        assert text in told
    assert "line 1:" not in told
    assert not (tmp_path / "out").exists()


def test_unreadable_media_are_told_before_anything_is_answered(lively_model_dir, media, tmp_path, capsys):
    good = io.BytesIO()
    Image.open(media / "a.jpg").save(good, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(good.getvalue()[:-200])
    (tmp_path / "no.mp4").write_bytes(b"no video at all")
    batch = tmp_path / "requests.jsonl"
    batch.write_text('{"prompt": "x", "image": "cut.jpg"}\n{"prompt": "y", "video": "no.mp4"}\n')
    words = [
        "--model",
        lively_model_dir,
        "--batch",
        batch,
        "--out",
        tmp_path / "out",
        "--media-root",
        tmp_path,
    ]
    assert main(["generate", *map(str, words)]) == 1
    told = capsys.readouterr().err
    assert "line 1:" in told
    assert "cut.jpg: image of" in told
    assert "line 2:" in told
    assert "no.mp4: clip of" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--prompt", "x", "--image", "gone.jpg"], "gone.jpg does not exist"),
        ([], "give --prompt, or --batch"),
        (["--batch", "r.jsonl"], "--batch needs --out"),
        (["--batch", "r.jsonl", "--prompt", "x"], "has its own prompts"),
    ],
)
def test_a_wrong_call_says_the_way_out(lively_model_dir, capsys, words, told):
    assert main(["generate", "--model", str(lively_model_dir), *words]) == 1
    assert told in capsys.readouterr().err


def test_a_folder_that_is_no_model_is_named(tmp_path, capsys):
    assert main(["generate", "--model", str(tmp_path / "gone"), "--prompt", "x"]) == 1
    assert "there is no folder" in capsys.readouterr().err
    assert main(["generate", "--model", str(tmp_path), "--prompt", "x"]) == 1
    assert "neither a run nor a checkpoint" in capsys.readouterr().err
