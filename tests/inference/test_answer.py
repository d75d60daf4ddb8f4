"""Questions see what training sees, and their answers are those of transformers' own generate."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoProcessor, VideoLlama3ForConditionalGeneration

from benchmarks.stock_inputs import StockInputs
from tests.config.conftest import write_run_config
from tests.inference.asked import draw_media, requests_on
from vl3train.config.load import read_config
from vl3train.config.problems import ConfigError
from vl3train.inference.answer import Asker
from vl3train.inference.rendering import trained_rendering
from vl3train.inference.requests import Request


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    return draw_media(tmp_path_factory.mktemp("media"))


@pytest.fixture(scope="module")
def asker(lively_model_dir):
    return Asker.load(lively_model_dir, device="cpu", max_new_tokens=12)


def stock_answer(folder, request, **sampling):
    """What transformers generates, greedily, of its own processor's inputs."""
    processor = AutoProcessor.from_pretrained(folder)
    model = VideoLlama3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = StockInputs(processor=processor, **sampling).inputs(request)
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_answers_are_those_of_transformers(asker, lively_model_dir, media):
    requests = requests_on(media)
    together = asker.answers(requests)
    assert together == [stock_answer(lively_model_dir, request) for request in requests]
    assert together == [asker.answers([request])[0] for request in requests]
    assert len(set(together)) == 4


def test_they_are_with_other_frames_and_a_budget_that_pictures_share(lively_model_dir, media, tmp_path):
    model = VideoLlama3ForConditionalGeneration.from_pretrained(lively_model_dir)
    processor = AutoProcessor.from_pretrained(lively_model_dir)
    processor.image_processor.max_visual_tokens = 40
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    request, plain = requests_on(media)[3], Asker.load(lively_model_dir, device="cpu", max_new_tokens=12)
    small = Asker.load(tmp_path, device="cpu", max_new_tokens=12, fps=2.0, max_frames=6)
    (answer,) = small.answers([request])
    assert answer == stock_answer(tmp_path, request, fps=2.0, max_frames=6)
    assert [answer] != plain.answers([request])


def test_the_same_picture_may_be_shown_twice(asker, lively_model_dir, media):
    request = Request(prompt="How many?", images=(media / "a.jpg", media / "b.png", media / "a.jpg"))
    assert asker.answers([request]) == [stock_answer(lively_model_dir, request)]


def test_the_pieces_of_an_answer_are_the_answer(asker, media):
    for request in requests_on(media):
        pieces = []
        (answer,) = asker.answers([request], pieces.append)
        assert "".join(pieces) == answer
        assert len(pieces) > 2


def test_answers_come_in_order_as_soon_as_they_can(asker, media):
    """Whichever ends first, and whatever could not be read after it."""
    requests = [*requests_on(media), Request(prompt="x", images=(media / "long.mp4",))]
    assert [one.text for one in asker.in_turn(requests[:4])] == asker.answers(requests[:4])
    with pytest.raises(ValueError, match=r"long.mp4|image"):
        asker.answers(requests)
    assert asker.answers(requests[:1]) == asker.answers(requests[:2])[:1]


def test_a_run_says_how_it_was_shown_things_and_so_do_its_checkpoints(lively_model_dir, tmp_path):
    words = ["stage=3", "model=debug", "data=demo", "data.frame_sampling=original", "data.grey16=scale"]
    cfg, _ = read_config([*words, "data.fps=3", f"run.output_dir={tmp_path}"])
    write_run_config(cfg, tmp_path)
    checkpoint = tmp_path / "checkpoints" / "step_000004"
    checkpoint.mkdir(parents=True)
    for folder in (tmp_path, checkpoint):
        settings = trained_rendering(folder, lively_model_dir).settings
        assert (settings.frame_sampling, settings.grey16, settings.fps) == ("original", "scale", 3)
        changed = trained_rendering(folder, lively_model_dir, ["data.fps=2"]).settings
        assert (changed.frame_sampling, changed.fps) == ("original", 2)
    assert trained_rendering(lively_model_dir, lively_model_dir).settings.frame_sampling == "transformers"
    with pytest.raises(ConfigError, match=r"(?s)data.fps=-1.*data.max_frames=0"):
        trained_rendering(tmp_path, lively_model_dir, ["data.fps=-1", "data.max_frames=0"])
