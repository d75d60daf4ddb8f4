"""The tasks as tasks: the picture is needed, and a seed decides everything."""

from __future__ import annotations

import random
from collections import Counter, defaultdict

import pytest

from vl3train.demo.questions import TASKS


@pytest.mark.parametrize("task", [name for name in TASKS if name != "text"])
def test_the_question_alone_does_not_give_the_answer_away(task: str) -> None:
    rng = random.Random(0)
    by_question = defaultdict(Counter)
    for _ in range(400):
        question = TASKS[task](rng)
        by_question[question.question][question.answer] += 1
    right = sum(answers.most_common(1)[0][1] for answers in by_question.values() if answers.total() > 20)
    asked = sum(answers.total() for answers in by_question.values() if answers.total() > 20)
    assert right / asked < 0.55, "knowing each question's most frequent answer must not be enough"


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_decides_every_question(task: str) -> None:
    first, again, other = (
        [TASKS[task](random.Random(f"{seed}/{number}")) for number in range(5)] for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_every_picture_in_words_answers_its_question() -> None:
    """What the language model is pre-trained on holds the answer, in these words or in the captions'."""
    rng = random.Random(5)
    for task in ("colour", "shape", "position", "word", "chart", "captions", "order", "text"):
        for _ in range(20):
            question = TASKS[task](rng)
            assert question.answer in question.in_words, question.in_words
