"""Words of other programs lead to options that exist, in errors and in the list of options."""

from __future__ import annotations

import pytest

from vl3train.config.input.meanings import meanings
from vl3train.config.input.options import OPTIONS, RENAMED, suggest
from vl3train.config.input.other_words import OTHER_WORDS
from vl3train.config.load import read_config


def test_every_word_leads_to_options_that_exist():
    assert {key for keys in OTHER_WORDS.values() for key in keys} <= set(OPTIONS)


def test_no_word_hides_an_option_or_a_former_name():
    names = {key.partition(".")[2] for key in (*OPTIONS, *RENAMED)}
    assert names & set(OTHER_WORDS) == set()
    assert [word for word in OTHER_WORDS if word != word.lower() or "-" in word] == []


@pytest.mark.parametrize(
    ("word", "option"),
    [
        ("lr", "optim.learning_rate"),
        ("train.lr", "optim.learning_rate"),
        ("learning_rate", "optim.learning_rate"),
        ("batch_size", "step.max_samples or step.global_packs"),
        ("step.batch-size", "step.max_samples or step.global_packs"),
        ("epochs", "run.num_epochs"),
        ("num_epochs", "run.num_epochs"),
        ("train.num_epochs", "run.num_epochs"),
        ("max_length", "step.max_tokens"),
        ("lora_r", "adapter.rank"),
        ("adapter.r", "adapter.rank"),
        ("lora_rnk", "adapter.rank"),
        ("save_total_limit", "run.keep_checkpoints"),
        ("run.output_dri", "run.output_dir"),
    ],
)
def test_an_unknown_option_is_answered_with_the_right_one(word: str, option: str):
    assert suggest(word).startswith(f"did you mean {option}")
    problems = [str(one) for one in read_config(["stage=1", f"{word}=1"])[1]]
    assert any(one.startswith(f"{word}=1: no such option; did you mean {option}") for one in problems)


def test_the_meaning_of_every_option_is_that_of_the_schema():
    found = meanings()
    assert list(found) == list(OPTIONS)
    one = found["step.max_samples"]
    assert (one.takes, one.default, one.set_by) == ("a whole number, or null", "128", ("data=demo",))
    assert one.meaning.startswith("Most samples of one step; a step also ends")
    assert found["adapter.parts"].default == "[language_model]"
    assert found["run.output_dir"].default == "MUST BE SET"
    assert "data=demo" in found["data.root"].set_by
    assert "stage=4_video_finetuning" in found["data.image_min_pixels"].set_by
