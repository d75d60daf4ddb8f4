"""The command that asks a model: its answers, and what it says of wrong calls."""

from __future__ import annotations

import io
import json
import shutil

import pytest
from PIL import Image

from tests.inference.asked import draw_media, requests_on
from vl3train.cli.main import main
from vl3train.contracts.tokens import IMAGE_PAD
from vl3train.inference.answer import Asker
from vl3train.inference.requests import Request


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    return draw_media(tmp_path_factory.mktemp("media"))


@pytest.fixture(scope="module")
def asker(lively_model_dir):
    return Asker.load(lively_model_dir, device="cpu", max_new_tokens=12)


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
    vocabulary = json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"]
    settings["eos_token_id"] = list(range(vocabulary))  # so that the first token ends the answer
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
    words += ["--max-new-tokens", 12, "--device", "cpu"]
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
        '{"prompt": "one line\u2028more"}\n'
        '{"prompt": "half \\ud83d"}\n' + "[" * 100_000 + "\n",
        encoding="utf-8",
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
        "line 9: 'half \\ud83d' holds half a character",
        "line 10: is not JSON",
    ):
        assert text in told
    assert "line 1:" not in told
    assert "line 8:" not in told
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
