"""Generated answers are those of transformers' own generate, prompt by prompt."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from tests.model.conftest import Conversation, make_batch, make_conversation, make_item, make_model
from vl3train.config.choices import AdapterKind
from vl3train.config.schema import AdapterConfig
from vl3train.contracts.tokens import IGNORE_INDEX
from vl3train.model.adapters import add_adapters
from vl3train.model.generation.generate import Generator
from vl3train.model.generation.prefill import find_prompts
from vl3train.model.generation.sampling import Sampling, next_tokens
from vl3train.model.packed_forward import PackedModel


def stock_answer(model, conversation, length, max_new_tokens, end_ids):
    """What transformers generates after the first ``length`` tokens of a conversation."""
    inputs = conversation.stock_inputs()
    del inputs["labels"], inputs["use_cache"]
    inputs["input_ids"] = inputs["input_ids"][:, :length]
    with torch.inference_mode():
        ids = model.generate(
            **inputs,
            attention_mask=torch.ones(1, length, dtype=torch.int64),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=sorted(end_ids),
            pad_token_id=0,
        )
    found = ids[0, length:].tolist()
    return found[:-1] if found[-1] in end_ids else found


def two_answers() -> Conversation:
    """An image with a question, an answer, another question and its answer."""
    conversation = make_conversation([make_item((1, 4, 4), 2)], text=14, answer=3)
    conversation.labels[-9:-6] = conversation.ids[-8:-5]
    return conversation


END_IDS = {3, 7, 11, 20, 21, 22, 23, 24, 25, 26, 27, 28}
"""A tenth of the vocabulary: answers end at many places."""


@pytest.fixture(scope="module")
def model():
    model = make_model().eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def conversations(mixed):
    torch.manual_seed(5)
    return [*mixed, two_answers(), two_answers()]


def packs_of(conversations, *sizes):
    """Packs of as many conversations as ``sizes`` says; keys are the conversations' numbers."""
    packs, start = [], 0
    for size in sizes:
        batch = make_batch(conversations[start : start + size])
        packs.append(replace(batch, segment_keys=tuple(str(start + i) for i in range(size))))
        start += size
    return packs


def answers_of(generator, packs):
    found = list(generator.answers(packs))
    by_place = {(int(one.key), one.prompt.answer): one for one in found}
    assert len(by_place) == len(found), "an answer came twice"
    return by_place


@pytest.mark.parametrize("num_slots", [1, 3, 32])
def test_answers_are_those_of_transformers(model, conversations, num_slots):
    """A slot takes the next prompt when its answer has ended, in the midst of others and of another pack."""
    generator = Generator(PackedModel(model, "reference"), END_IDS, max_new_tokens=12, num_slots=num_slots)
    found = answers_of(generator, packs_of(conversations, 3, 4, 1))
    assert sorted(found) == [(0, 0), (1, 0), (2, 0), (3, 0), (5, 0), (6, 0), (6, 1), (7, 0), (7, 1)]
    for (number, _), answer in found.items():
        expected = stock_answer(model, conversations[number], answer.prompt.length, 12, END_IDS)
        assert answer.ids == expected
        assert answer.ended == (len(expected) < 12)
    assert len({len(answer.ids) for answer in found.values()}) > 3, "the answers are of many lengths"


def test_answers_grow_while_others_come_and_may_be_cut(model, conversations):
    """Packs that are not there yet hold nothing up, and an answer that is cut leaves its slot to the next."""
    first, second = packs_of(conversations[:4], 2, 2)
    grown = []

    def packs():
        yield first
        for count in range(3, 6):  # the first answer goes on meanwhile
            yield None
            assert sum(key == "0" for key, _ in grown) == count
        yield second

    def goes_on(answer):
        grown.append((answer.key, tuple(answer.ids)))
        return answer.key != "1" or len(answer.ids) < 2

    generator = Generator(PackedModel(model, "reference"), (), max_new_tokens=6, num_slots=2, goes_on=goes_on)
    found = answers_of(generator, packs())
    for (number, _), answer in found.items():
        expected = stock_answer(model, conversations[number], answer.prompt.length, 6, {-1})
        assert answer.ids == expected[: 2 if number == 1 else 6]
        assert not answer.ended
        steps = [ids for key, ids in grown if key == str(number)]
        assert steps == [tuple(answer.ids[:count]) for count in range(1, len(answer.ids) + 1)]
    assert sorted(found) == [(0, 0), (1, 0), (2, 0), (3, 0)]


def test_a_longer_prompt_gets_a_longer_cache(model, conversations):
    """It waits until the answers in progress have ended; those after it wait with it."""
    torch.manual_seed(8)
    long = make_conversation([], text=300, answer=2)
    order = [conversations[3], conversations[0], long, conversations[1]]
    generator = Generator(PackedModel(model, "reference"), END_IDS, max_new_tokens=12, num_slots=2)
    found = answers_of(generator, packs_of(order, 2, 2))
    for (number, _), answer in found.items():
        expected = stock_answer(model, order[number], answer.prompt.length, 12, END_IDS)
        assert answer.ids == expected
    assert len(found) == 4
    small = Generator(PackedModel(model, "reference"), (), max_new_tokens=12, cache_bytes=50_000)
    with pytest.raises(ValueError, match=r"a prompt of 298 tokens needs .* GiB"):
        list(small.answers(packs_of(order, 4)))


def test_adapters_take_part(conversations):
    adapter = AdapterConfig(kind=AdapterKind.lora, rank=4, alpha=8, parts=["language_model"])
    peft_model = add_adapters(make_model(), adapter)
    for name, weight in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(1))
    adapted = peft_model.get_base_model().eval()
    adapted.generation_config.eos_token_id = None
    found, plain = (
        answers_of(
            Generator(PackedModel(one, "reference"), END_IDS, max_new_tokens=6), packs_of(conversations, 8)
        )
        for one in (adapted, make_model())
    )
    assert [one.ids for one in found.values()] != [one.ids for one in plain.values()]
    for (number, _), answer in found.items():
        assert answer.ids == stock_answer(adapted, conversations[number], answer.prompt.length, 6, END_IDS)


def test_sampling_draws_from_what_it_may(model, conversations):
    packs = packs_of(conversations, 8)

    def ids(**sampling):
        generator = Generator(
            PackedModel(model, "reference"), END_IDS, max_new_tokens=8, sampling=Sampling(**sampling)
        )
        return {place: one.ids for place, one in answers_of(generator, packs).items()}

    greedy = ids()
    assert ids(temperature=0.7, top_k=1) == greedy == ids(temperature=0.7, top_p=1e-6)
    assert ids(temperature=2.0, seed=1) == ids(temperature=2.0, seed=1) != ids(temperature=2.0, seed=2)
    with pytest.raises(ValueError, match=r"temperature=-1.*top_k=-2.*top_p=0"):
        Sampling(temperature=-1, top_k=-2, top_p=0)


def test_drawn_tokens_come_as_often_as_their_probabilities_say():
    logits = (
        torch.tensor([0.5, 0.2, 0.2, 0.1]).log().expand(20_000, -1) * 0.5
    )  # temperature 0.5 undoes the factor
    drawn = next_tokens(logits, Sampling(temperature=0.5, top_p=0.85), torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    # 0.5 + 0.2 < 0.85 <= 0.5 + 0.2 + 0.2: the last is never drawn, the others as often as before among themselves.
    torch.testing.assert_close(shares, torch.tensor([5, 2, 2, 0]) / 9, atol=0.015, rtol=0)


def test_prompts_are_where_supervised_tokens_begin(batch_of, mixed):
    pair = two_answers()
    batch = batch_of([mixed[4], pair, mixed[3]])
    first, second, third = find_prompts(batch)
    assert (first.segment, first.answer, second.answer, third.segment) == (1, 0, 1, 2)
    for prompt, conversation in ((first, pair), (second, pair), (third, mixed[3])):
        labels = conversation.labels[prompt.length - 1 :].tolist()
        size = len(prompt.true_ids)
        assert list(prompt.true_ids) == labels[:size] == conversation.ids[prompt.length :][:size].tolist()
        assert len(labels) == size or labels[size] == IGNORE_INDEX


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("num_slots", [2, 32])
def test_a_gpus_graphs_give_the_answers_of_the_cpu(model, conversations, num_slots):
    """Slots are refilled between replays; prompts beyond one length of the cache take a graph of their own."""
    torch.manual_seed(8)
    order = [*conversations[:4], make_conversation([], text=300, answer=2), *conversations[4:]]

    def answers(one, **sampling):
        generator = Generator(
            PackedModel(one, "reference"),
            END_IDS,
            max_new_tokens=12,
            num_slots=num_slots,
            sampling=Sampling(**sampling),
        )
        found = [answers_of(generator, packs_of(order, 3, 4, 2)) for _ in range(2)]
        return [{place: answer.ids for place, answer in one.items()} for one in found]

    on_gpu = deepcopy(model).cuda()
    assert answers(on_gpu) == answers(model)
    drawn = answers(on_gpu, temperature=2.0, seed=1)
    assert drawn == answers(on_gpu, temperature=2.0, seed=1), "replays draw from the generator's seed"
    assert drawn[0] != drawn[1], "and never the same numbers again"
