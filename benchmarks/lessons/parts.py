"""The parts that stage 1 starts from: an encoder of random weights for each seed, a language model that knows words."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from benchmarks.lessons.tasks import TASKS, lesson
from vl3train.demo.parts import PartSizes, make_vision_encoder, new_language_model, pretrain, tokenize
from vl3train.demo.questions import Question
from vl3train.demo.tokenizer import train_tokenizer

SIZES = {
    "small": PartSizes(
        vision_hidden=384,
        vision_layers=12,
        text_hidden=512,
        text_layers=8,
        head_dim=64,
        steps=300,
        batch_samples=32,
        learning_rate=1e-3,
    ),
    "tiny": PartSizes(steps=250),
    "debug": PartSizes(vision_hidden=64, vision_layers=1, text_hidden=64, text_layers=1, steps=2),
}
"""``small`` has 36 million parameters and is the one that figures are about; ``tiny`` has 1.5 million."""
VOCAB_SIZE = 1024
TEXTS = 400
"""Of each task, for the tokenizer."""


def make_parts(folder: Path, sizes: PartSizes, seeds: int, device: str) -> None:
    """Write ``folder/language_model`` and ``folder/vision_encoder-SEED`` of each seed.

    The language model is trained on the answers, with words in place of what is shown; it has seen no picture. Its
    texts come from the training split, but not from the samples that the stages train on (another seed).
    """
    disable_progress_bar()
    for seed in range(seeds):
        make_vision_encoder(folder / f"vision_encoder-{seed}", seed, sizes)
    asked = [
        in_words(task, number)
        for number in range(max(TEXTS, sizes.steps * sizes.batch_samples // 60))
        for task in TASKS
    ]
    language = folder / "language_model"
    texts = [text for one in asked[: TEXTS * len(TASKS)] for text in (one.question, one.answer)]
    train_tokenizer([f"user\nassistant\n{text}" for text in texts], language, VOCAB_SIZE)
    tokenizer = AutoTokenizer.from_pretrained(language, trust_remote_code=False)
    random.Random(0).shuffle(asked)
    with torch.device(device):  # also where `pretrain` makes its batches
        model = new_language_model(tokenizer, 0, sizes)

        def tell(step: int, loss: float) -> None:
            if step % 100 == 0:
                print(f"language model on words: step {step}, loss {loss:.3f}", flush=True)

        pretrain(model, [tokenize(tokenizer, one) for one in asked], 0, sizes, tell)
    model.cpu().save_pretrained(language)


def in_words(task: str, number: int) -> Question:
    """A question behind the words that say what is shown."""
    one = lesson(task, "train", -1, number)
    return Question(task=task, question=one.in_words, answer=one.answer)
