"""Each question keeps its own limits among others, and an answer that an error cut short harms no other."""

from __future__ import annotations

import pytest

from tests.inference.asked import draw_media, requests_on
from vl3train.inference.answer import Asker
from vl3train.inference.answering import Asked
from vl3train.inference.questions import question_batch, render
from vl3train.inference.requests import as_question


@pytest.fixture(scope="module")
def asker(lively_model_dir):
    return Asker.load(lively_model_dir, device="cpu", max_new_tokens=12)


@pytest.fixture(scope="module")
def batches(asker, tmp_path_factory):
    requests = requests_on(draw_media(tmp_path_factory.mktemp("media")))
    return [
        question_batch(render(as_question(request), asker.rendering, key=str(number)))
        for number, request in enumerate(requests)
    ]


def asked(batches, **limits):
    """The questions; ``limits`` by number."""
    return [
        Asked(key=str(number), batch=batch, **{"max_new_tokens": 12, **limits.get(f"q{number}", {})})
        for number, batch in enumerate(batches)
    ]


def answers(asker, questions):
    return {int(one.asked.key): one for one in asker.answering(4).answers(questions)}


def test_limits_are_each_questions_own(asker, batches):
    whole = answers(asker, asked(batches))
    stop = whole[1].text[4:6]
    pieces = []
    found = answers(
        asker,
        asked(
            batches,
            q0={"max_new_tokens": 3, "tell": pieces.append},
            q1={"stops": ("never there", stop)},
            q2={"is_wanted": lambda: len(pieces) < 2},
        ),
    )
    assert found[0].num_tokens == 3
    assert found[0].is_cut
    assert whole[0].text.startswith(found[0].text)
    assert "".join(pieces) == found[0].text
    assert found[1].text == whole[1].text.partition(stop)[0].rstrip()
    assert not found[1].is_cut
    assert 0 < found[2].num_tokens < whole[2].num_tokens
    assert found[3].text == whole[3].text
    for number, batch in enumerate(batches):
        assert whole[number].asked.num_prompt_tokens == len(batch.input_ids) - 3  # "?", its end, a newline


def test_an_error_between_answers_leaves_nothing_behind(asker, batches):
    def failing():
        yield from asked(batches)[:2]
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        answers(asker, failing())
    assert {number: one.text for number, one in answers(asker, asked(batches)).items()} == {
        number: one.text for number, one in answers(asker, asked(batches)).items()
    }
