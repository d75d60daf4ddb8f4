"""Answers behind a shared prefix are those of each question alone."""

from __future__ import annotations

import pytest
import torch

from tests.model.generation.test_generate import END_IDS, answers_of, model, stock_answer  # noqa: F401
from tests.model.test_families import MEDIA, family_samples, make_family, pack_of, rendered
from vl3train.model.generation.generate import Generator
from vl3train.model.generation.prefill import find_prompts
from vl3train.model.packed_forward import PackedModel


@pytest.fixture
def questions(mixed):
    """Two families with samples before, between and behind them; the pack, and each sample by itself."""
    torch.manual_seed(3)
    families = [make_family(MEDIA[name]()) for name in ("several", "pruned clip")]
    members = [mixed[1], *families[0], mixed[3], *families[1], mixed[2]]
    numbers = iter(range(len(members)))

    def keyed(samples):
        named = [one for one in samples if one.key != "prefix"]
        for one in named:
            object.__setattr__(one, "key", str(next(numbers)))
        return samples

    samples = [
        *keyed([rendered(mixed[1])]),
        *keyed(family_samples(families[0])),
        *keyed([rendered(mixed[3])]),
        *keyed(family_samples(families[1])),
        *keyed([rendered(mixed[2])]),
    ]
    return pack_of(samples), members


@pytest.mark.parametrize("num_slots", [2, 32])
def test_answers_behind_a_prefix_are_those_of_transformers(model, questions, num_slots):  # noqa: F811
    batch, members = questions
    generator = Generator(PackedModel(model, "reference"), END_IDS, max_new_tokens=12, num_slots=num_slots)
    found = answers_of(generator, [batch])
    assert len(found) == len(members)
    for (number, _), answer in found.items():
        own = members[number]
        assert answer.prompt.length == len(own.ids) - len(answer.prompt.true_ids)
        assert answer.ids == stock_answer(model, own, answer.prompt.length, 12, END_IDS)


def test_the_rows_of_a_prompt_are_its_tokens(questions):
    batch, members = questions
    for prompt in find_prompts(batch):
        own = members[int(batch.segment_keys[prompt.segment])]
        ids = torch.cat([batch.input_ids[rows] for rows in prompt.rows])
        assert torch.equal(ids, own.ids[: prompt.length])
