"""The debug model's parts: plain transformers loads them, and stage 1 can start from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen2ForCausalLM, SiglipVisionModel

from vl3train.contracts.tokens import IGNORE_INDEX, IMAGE_PAD, VIDEO_PAD
from vl3train.demo.build import draw_questions
from vl3train.demo.parts import PartSizes, answer_loss, make_debug_parts, tokenize
from vl3train.model.weights.from_parts import init_from_parts

SIZES = PartSizes(vision_hidden=64, vision_layers=1, text_hidden=64, text_layers=2, steps=60, batch_samples=8)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    folder = tmp_path_factory.mktemp("parts")
    losses: list[float] = []
    questions = [q for source in ("count", "position") for q in draw_questions(source, 0, 0.2)[0]]
    make_debug_parts(folder, questions, 0, SIZES, lambda step, loss: losses.append(loss))
    return folder, losses


def test_the_language_model_learns_from_pictures_in_words(made: tuple[Path, list[float]]) -> None:
    folder, losses = made
    assert len(losses) == SIZES.steps
    assert sum(losses[-10:]) / 10 < 0.5 * sum(losses[:10]) / 10
    model = Qwen2ForCausalLM.from_pretrained(folder / "language_model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "language_model")
    assert model.config.vocab_size >= len(tokenizer) + 3, "rows for the tokens that stage 1 may add"
    assert model.config.eos_token_id == tokenizer.eos_token_id


def test_the_padded_loss_is_transformers_own(made: tuple[Path, list[float]]) -> None:
    model = Qwen2ForCausalLM.from_pretrained(made[0] / "language_model")
    tokenizer = AutoTokenizer.from_pretrained(made[0] / "language_model")
    samples = [tokenize(tokenizer, draw_questions(source, 0, 0.1)[0][0]) for source in ("count", "when")]
    assert len(samples[0][0]) < len(samples[1][0])
    expected = 0.0
    for ids, num_answer in samples:
        labels = torch.tensor([[IGNORE_INDEX] * (len(ids) - num_answer) + ids[-num_answer:]])
        loss = model(input_ids=torch.tensor([ids]), labels=labels).loss
        expected += float(loss.detach()) * num_answer
    assert float(answer_loss(model, samples).detach()) == pytest.approx(expected, rel=1e-4)


def test_stage_1_starts_from_them(made: tuple[Path, list[float]]) -> None:
    folder, _ = made
    tokenizer = AutoTokenizer.from_pretrained(folder / "language_model")
    model = init_from_parts(
        str(folder / "vision_encoder"),
        str(folder / "language_model"),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_PAD),
        video_token_id=tokenizer.convert_tokens_to_ids(VIDEO_PAD),
        initializer_range=0.1,
        seed=0,
        dtype=torch.float32,
    )
    language = Qwen2ForCausalLM.from_pretrained(folder / "language_model").state_dict()
    encoder = SiglipVisionModel.from_pretrained(folder / "vision_encoder").state_dict()
    ours = model.state_dict()
    assert torch.equal(
        ours["model.language_model.embed_tokens.weight"], language["model.embed_tokens.weight"]
    )
    name = "encoder.layers.0.mlp.fc1.weight"
    assert torch.equal(ours[f"model.vision_model.{name}"], encoder[name])
