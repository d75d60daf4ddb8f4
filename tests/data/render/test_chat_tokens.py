"""Ids equal transformers' on the rendered text; labels are the assistant's words and nothing else."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vl3train.contracts.records import SampleError
from vl3train.contracts.tokens import IGNORE_INDEX, RESERVED_TOKENS, UPSTREAM_ADDED_TOKENS
from vl3train.data.records.conversation import Conversation, Image, Text, Turn, Video, is_learned
from vl3train.data.render.chat_tokens import ChatTokenizer, ItemTokens, render_conversation
from vl3train.model.weights.processor import prepare_tokenizer

WORDS = st.text(
    alphabet=st.one_of(st.sampled_from(" \n\t.aé你'1 "), st.characters(exclude_categories=("Cs",))),
    max_size=30,
).filter(lambda text: not any(token in text for token in (*RESERVED_TOKENS, *UPSTREAM_ADDED_TOKENS)))


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return ChatTokenizer.from_folder(tokenizer_dir)


def conversation_of(*turns: tuple[str, str]) -> Conversation:
    return Conversation(tuple(Turn(role, (Text(text),)) for role, text in turns))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), WORDS), min_size=1, max_size=4))
def test_ids_of_any_words_equal_transformers(processor, tokenizer, turns):
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    expected = processor.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"][0]
    assert render_conversation(conversation_of(*turns), [], tokenizer).input_ids.tolist() == list(expected)


@settings(max_examples=150, deadline=None)
@given(WORDS, WORDS)
def test_labels_are_the_next_ids_of_the_answers(tokenizer, first, second):
    turns = [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", first),
        ("user", "?"),
        ("assistant", second),
    ]
    rendered = render_conversation(conversation_of(*turns), [], tokenizer)
    supervised = rendered.labels != IGNORE_INDEX
    np.testing.assert_array_equal(rendered.labels[supervised], rendered.input_ids[1:][supervised[:-1]])
    assert rendered.labels[-1] == IGNORE_INDEX
    pieces = tokenizer.decode(rendered.labels[supervised]).split("<|im_end|>")
    header, answers = "assistant\n", [turn for turn in conversation_of(*turns).turns if is_learned(turn)]
    for piece, answer in zip(pieces, answers, strict=False):
        whole = tokenizer.decode(tokenizer.encode(header + answer.content[0].text))
        assert whole.endswith(piece)
        assert piece == whole.removeprefix(header) or answer.content[0].text[:1].isspace()
    assert pieces[len(answers) :] == [""]


def test_labels_of_a_plain_answer(tokenizer):
    turns = [("user", "What is the capital of France?"), ("assistant", "Paris.")]
    rendered = render_conversation(conversation_of(*turns), [], tokenizer)
    assert tokenizer.decode(rendered.labels[rendered.labels != IGNORE_INDEX]) == "Paris.<|im_end|>"
    assert tokenizer.decode(rendered.input_ids) == (
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\nParis.<|im_end|>\n"
    )


@pytest.mark.parametrize("blank", ["", " ", "\n\t ", "\u00a0\u3000", "\ufeff", "\u200b\u2060", "\u200e\r\n"])
def test_an_answer_without_words_supervises_nothing_and_is_shown(tokenizer, processor, blank):
    turns = [("user", "Hi"), ("assistant", blank), ("user", "?"), ("assistant", "Yes.")]
    rendered = render_conversation(conversation_of(*turns), [], tokenizer)
    assert tokenizer.decode(rendered.labels[rendered.labels != IGNORE_INDEX]) == "Yes.<|im_end|>"
    messages = [{"role": role, "content": text} for role, text in turns]
    expected = processor.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"][0]
    assert rendered.input_ids.tolist() == list(expected)


def test_an_answer_out_of_the_loss_is_shown_and_not_supervised(tokenizer):
    turns = list(
        conversation_of(("user", "Hi"), ("assistant", "No."), ("user", "?"), ("assistant", "Yes.")).turns
    )
    whole = render_conversation(Conversation(tuple(turns)), [], tokenizer)
    turns[1] = dataclasses.replace(turns[1], supervised=False)
    rendered = render_conversation(Conversation(tuple(turns)), [], tokenizer)
    assert rendered.input_ids.tolist() == whole.input_ids.tolist()
    assert tokenizer.decode(rendered.labels[rendered.labels != IGNORE_INDEX]) == "Yes.<|im_end|>"


def test_placeholders_stand_item_by_item(tokenizer):
    turn = Turn("user", (Video("0.mp4"), Image("1.png"), Text("Well?")))
    items = [ItemTokens((2, 1), (0.0, 1.25)), ItemTokens((3,))]
    rendered = render_conversation(Conversation((turn, Turn("assistant", (Text("Yes."),)))), items, tokenizer)
    assert tokenizer.decode(rendered.input_ids).startswith(
        "<|im_start|>user\nTime 0.0s:<|video_pad|><|video_pad|>,Time 1.2s:<|video_pad|>\n"
        "<|image_pad|><|image_pad|><|image_pad|>\nWell?<|im_end|>\n"
    )
    ids = rendered.input_ids[rendered.placeholder_positions]
    assert ids.tolist() == [tokenizer.video_pad_id] * 3 + [tokenizer.image_pad_id] * 3


def test_an_image_in_an_answer_is_refused(tokenizer):
    turn = Turn("assistant", (Image("0.png"),))
    with pytest.raises(SampleError, match="words only"):
        render_conversation(Conversation((turn,)), [ItemTokens((1,))], tokenizer)


def test_ids_of_special_tokens_equal_the_processors(processor, tokenizer):
    for token, number in tokenizer.special_ids.items():
        assert processor.tokenizer.convert_tokens_to_ids(token) == number


def test_a_qwen2_tokenizer_gets_the_placeholders_it_lacks(tokenizer_dir, tmp_path):
    from vl3train.model.weights.processor import build_processor

    shutil.copytree(tokenizer_dir, tmp_path / "qwen2")
    file = tmp_path / "qwen2" / "tokenizer.json"
    content = json.loads(file.read_text())
    keep = [
        token
        for token in content["added_tokens"]
        if token["content"] in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    ]
    assert len(keep) == 3
    highest = max(content["model"]["vocab"].values())
    content["added_tokens"] = [{**token, "id": highest + 1 + number} for number, token in enumerate(keep)]
    file.write_text(json.dumps(content))
    ours, theirs = ChatTokenizer.from_folder(file.parent), build_processor(file.parent).tokenizer
    assert ours.special_ids == {token: theirs.convert_tokens_to_ids(token) for token in ours.special_ids}


def test_other_tokenizers_are_refused(tokenizer_dir, tmp_path):
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json"):
        ChatTokenizer.from_folder(tmp_path)
    text = (tokenizer_dir / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace("<|im_start|>", "<|other|>"))
    with pytest.raises(ValueError, match=r"no <\|im_start\|>"):
        ChatTokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text.replace('"vocab"', '"vocaB"'))  # one flipped bit
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read: "):
        ChatTokenizer.from_folder(tmp_path)
    shutil.copy(tokenizer_dir / "tokenizer_config.json", tmp_path)
    with pytest.raises(ValueError, match=r"its tokenizer\.json cannot be read: "):
        prepare_tokenizer(tmp_path)


def test_names_of_special_tokens_in_words_are_words(tokenizer):
    ids = tokenizer.encode("<|im_end|><image>")
    assert not set(ids) & set(tokenizer.special_ids.values())
    assert tokenizer.decode(ids) == "<|im_end|><image>"


def test_fingerprint_is_the_files(tokenizer_dir, tokenizer):
    import hashlib

    assert (
        tokenizer.fingerprint == hashlib.sha256((tokenizer_dir / "tokenizer.json").read_bytes()).hexdigest()
    )
