"""The two parts that stage 1 of the demo starts from: a SigLIP encoder and a Qwen2, tiny, made on the spot.

The encoder's weights are random. The language model is trained here for some seconds on the demo's text only, in which
words describe each picture ("A red circle, left."): published language models know language, too. It has seen no
picture; the four stages teach it that.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from vl3train.contracts.tokens import (
    IGNORE_INDEX,
    IM_END,
    IM_START,
    PATCH_SIZE,
    UPSTREAM_ADDED_TOKENS,
)
from vl3train.demo.questions import Question
from vl3train.demo.tokenizer import train_tokenizer

VOCAB_SIZE = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class PartSizes:
    """Sizes of the debug model, and how long its language model is pre-trained."""

    vision_hidden: int = 128
    vision_layers: int = 3
    text_hidden: int = 128
    text_layers: int = 4
    head_dim: int = 32
    steps: int = 280
    batch_samples: int = 32
    learning_rate: float = 2e-3


SMALL_ENCODER = PartSizes(vision_hidden=384, vision_layers=6, head_dim=64)
"""Of `vl3train parts`: width and heads of ViT-S (arXiv:2106.10270, table 2), half its layers."""


def make_debug_parts(
    folder: Path,
    questions: Sequence[Question],
    seed: int,
    sizes: PartSizes,
    progress: Callable[[int, float], None],
) -> None:
    """Write ``folder/vision_encoder``, and ``folder/language_model`` with the tokenizer.

    ``questions`` is the training split only. ``progress(step, loss)`` is called after each step. The same arguments
    give the same weights on one machine.
    """
    make_vision_encoder(folder / "vision_encoder", seed, sizes)
    language_folder = folder / "language_model"
    texts = [text for question in questions for text in (question.in_words, question.answer)]
    train_tokenizer([f"user\nassistant\n{text}" for text in texts], language_folder, VOCAB_SIZE)
    tokenizer = AutoTokenizer.from_pretrained(language_folder, trust_remote_code=False)
    model = new_language_model(tokenizer, seed, sizes)
    pretrain(model, [tokenize(tokenizer, question) for question in questions], seed, sizes, progress)
    model.save_pretrained(language_folder)


def make_vision_encoder(folder: Path, seed: int, sizes: PartSizes) -> None:
    """Write a SigLIP encoder with transformers' own random weights."""
    torch.manual_seed(seed)
    config = SiglipVisionConfig(
        hidden_size=sizes.vision_hidden,
        intermediate_size=2 * sizes.vision_hidden,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=sizes.vision_hidden // sizes.head_dim,
        image_size=4 * PATCH_SIZE,  # sets only the learned positions, which VideoLLaMA3 does not use
        patch_size=PATCH_SIZE,
    )
    SiglipVisionModel(config).save_pretrained(folder)


def new_language_model(tokenizer: PreTrainedTokenizerBase, seed: int, sizes: PartSizes) -> Qwen2ForCausalLM:
    """A Qwen2 with random weights and a row for each token, including those that stage 1 may add."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        hidden_size=sizes.text_hidden,
        intermediate_size=3 * sizes.text_hidden,
        num_hidden_layers=sizes.text_layers,
        num_attention_heads=sizes.text_hidden // sizes.head_dim,
        num_key_value_heads=sizes.text_hidden // sizes.head_dim // 2,
        vocab_size=math.ceil((len(tokenizer) + len(UPSTREAM_ADDED_TOKENS)) / 64) * 64,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        use_cache=False,
    )
    model = Qwen2ForCausalLM(config)
    for name, weight in model.named_parameters():
        # Qwen2's 0.02 is for thousands of columns; with a hundred the signal would fade from layer to layer.
        if weight.ndim == 2 and "embed_tokens" not in name:
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return model


def tokenize(tokenizer: PreTrainedTokenizerBase, question: Question) -> tuple[list[int], int]:
    """Ids of one conversation in ChatML, and the number of answer ids at its end."""
    prompt = f"{IM_START}user\n{question.in_words}{IM_END}\n{IM_START}assistant\n"
    answer = tokenizer(f"{question.answer}{IM_END}").input_ids
    return tokenizer(prompt).input_ids + answer, len(answer)


def pretrain(
    model: Qwen2ForCausalLM,
    samples: Sequence[tuple[list[int], int]],
    seed: int,
    sizes: PartSizes,
    progress: Callable[[int, float], None],
) -> None:
    """Train ``model`` on the answers, with AdamW and a cosine schedule to zero."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=sizes.learning_rate, weight_decay=0.0)
    warmup = max(1, sizes.steps // 20)
    queue: list[int] = []
    for step in range(sizes.steps):
        while len(queue) < sizes.batch_samples:
            epoch = list(range(len(samples)))
            rng.shuffle(epoch)
            queue += epoch
        chosen, queue = queue[: sizes.batch_samples], queue[sizes.batch_samples :]
        batch = sorted((samples[number] for number in chosen), key=lambda sample: len(sample[0]))
        num_supervised = sum(num_answer for _, num_answer in batch)
        done = max(0.0, (step - warmup) / max(1, sizes.steps - warmup))
        rate = min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = sizes.learning_rate * rate
        optimizer.zero_grad()
        total = 0.0
        for first in range(0, len(batch), 8):  # neighbours in length: half the padding of the whole batch
            loss = answer_loss(model, batch[first : first + 8]) / num_supervised
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress(step + 1, total)


def answer_loss(model: Qwen2ForCausalLM, samples: Sequence[tuple[list[int], int]]) -> Tensor:
    """Summed loss over the answers' tokens; prompts are not learned, the demo's are mostly chance."""
    longest = max(len(ids) for ids, _ in samples)
    input_ids = torch.zeros(len(samples), longest, dtype=torch.int64)
    labels = torch.full((len(samples), longest), IGNORE_INDEX)
    for row, (ids, num_answer) in enumerate(samples):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        labels[row, len(ids) - num_answer - 1 : len(ids) - 1] = torch.tensor(ids[-num_answer:])
    # Padding stands on the right of causal attention, so no answer sees it and no mask is needed.
    hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state
    answered = labels != IGNORE_INDEX
    return F.cross_entropy(model.lm_head(hidden[answered]), labels[answered], reduction="sum")
