"""Each metric against values worked out by hand, or against its library's own."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

from vl3train.scoring import captions, intervals, matches, temporal
from vl3train.scoring.captions import cider, rouge_l
from vl3train.scoring.intervals import mean_with_interval, wilson
from vl3train.scoring.matches import anls, exact, letter, multiple_choice, number, relaxed
from vl3train.scoring.metrics import EACH, TOGETHER, Scored, metric_problem, score
from vl3train.scoring.predictions import Prediction, read_predictions, score_predictions
from vl3train.scoring.temporal import span, temporal_iou


@pytest.mark.parametrize("module", [captions, intervals, matches, temporal])
def test_examples_in_docstrings_hold(module):
    found = doctest.testmod(module)
    assert (found.failed, found.attempted > 0) == (0, True)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,200", 1200),
        ("$3.50", 3.5),
        ("45 %", 0.45),
        ("-7.", -7),
        ("seven", None),
        ("nan", None),
        ("", None),
        ("inf", None),
    ],
)
def test_numbers_are_read_as_charts_write_them(text, value):
    assert number(text) == (None if value is None else pytest.approx(value))


def test_relaxed_accuracy_at_its_bounds():
    assert (relaxed("105", "100"), relaxed("105.1", "100"), relaxed("-95", "-100")) == (1, 0, 1)
    assert (relaxed("0", "0"), relaxed("0.01", "0"), relaxed("0", "zero")) == (1, 0, 0)
    assert relaxed("Two dogs", "two dogs.") == 1


def test_anls_is_one_less_the_edits_and_zero_from_half_on():
    # abcd -> abce: one edit of four; abcd -> abxy: two of four
    assert anls("abce", "abcd") == pytest.approx(0.75)
    assert anls("abxy", "abcd") == 0
    assert (anls("", "abcd"), anls("", "")) == (0, 1)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("A", "A"), (" c ", "C"), ("(D)", "D"), ("B. the red one", "B"), ("b) the red one", "B"), ("[E]", "E"),
        ("The correct answer is (C).", "C"), ("Option D", "D"), ("answer: b", "B"), ("A man is walking", None),
        ("I think so", None), ("", None), ("Because", None),
    ],
)  # fmt: skip
def test_letters_of_choices(text, name):
    assert letter(text) == name


def test_a_reference_without_a_letter_is_never_right():
    assert multiple_choice("no letter here", "none either") == 0


@pytest.mark.parametrize(
    ("prediction", "reference", "value"),
    [
        ("2 to 6", "4 to 8", 1 / 3),
        ("4 - 8 s", "4.0s - 8.0s", 1),
        ("from 00:10 to 01:00", "10 to 60 seconds", 1),
        ("8 to 4", "4 to 8", 1),  # the order of a span's ends says nothing
        ("1 to 2", "3 to 4", 0),
        ("5", "3 to 4", 0),
        ("3 to 3", "3 and 3", 1),
        ("2 to 4", "4 to 6", 0),
    ],
)
def test_overlap_of_two_spans(prediction, reference, value):
    assert temporal_iou(prediction, reference) == pytest.approx(value)


def test_a_time_in_hours_is_one_time():
    assert span("1:00:30.5 - 1:01:00") == (3630.5, 3660.0)


def test_captions_score_as_their_libraries_do():
    from rouge_score.rouge_scorer import RougeScorer

    true, found = "a brown dog runs over the grass", "the dog runs fast over grass"
    expected = RougeScorer(["rougeL"]).score(true, found)["rougeL"].fmeasure
    assert rouge_l(found, true) == pytest.approx(expected)
    same, other = cider(["a dog runs", "two red cars"], ["A dog runs.", "the cat sleeps on a mat"])
    assert same > 2
    assert other == 0


def test_wilsons_interval_and_a_bootstrap_over_clips():
    mean, low, high = mean_with_interval([1.0] * 8 + [0.0] * 2, [str(i) for i in range(10)])
    assert (mean, low, high) == (0.8, *wilson(0.8, 10))
    # Ten answers about each of four clips, right or wrong together: as uncertain as four answers, not as forty.
    scores = [1.0] * 20 + [0.0] * 20
    _, low, high = mean_with_interval(scores, [f"clip {i // 10}" for i in range(40)])
    assert high - low > 0.8
    _, low, high = mean_with_interval([0.2, 0.4, 0.6, 0.8] * 100, [str(i) for i in range(400)])
    assert high - low == pytest.approx(4 * 0.2236 / 20, rel=0.1)  # 2 x 1.96 standard errors
    with pytest.raises(ValueError, match="no scores"):
        mean_with_interval([], [])


def test_functions_of_the_users_own(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def words(prediction, reference, question):\n    return len(prediction.split()) / len(question.split())\n"
        "def broken(prediction, reference, question):\n    return prediction['x']\n"
    )
    answers = [Scored("one two", "r", "a b c d"), Scored("one", "r", "")]
    assert metric_problem("mine.py:words", tmp_path) is None
    assert score("mine.py:words", answers, tmp_path) == [2, 0]
    with pytest.raises(ValueError, match=r"mine.py:broken failed on the answer 'a b c d' to 'one two'"):
        score("mine.py:broken", answers, tmp_path)
    assert "no file" in metric_problem("gone.py:words", tmp_path)
    (tmp_path / "mine.txt").write_bytes(b"\xffdef words(")
    assert "ends in .py" in metric_problem("mine.txt:words", tmp_path)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import nothing_there\ndef f(p, r, q): return 1", "cannot be imported: ModuleNotFoundError"),
        ("class A:\n    def f(p, r, q): return 1", "cannot be imported: AttributeError"),
        ("\xff def f(p, r, q): return 1", "cannot be imported: SyntaxError"),
        ("def f(p, r, q): raise SystemExit(3)", "failed on the answer 'a' to 'q': SystemExit"),
        ("def f(p, r, q): return float('nan')", "it gave nan, of which there is no mean"),
        ("def f(p, r, q): return 10 ** 400", "OverflowError"),
        ("def f(p, r): return 1", "takes 2 positional arguments"),
    ],
)
def test_a_function_that_gives_nonsense_costs_its_own_figure_only(tmp_path, code, said):
    (tmp_path / "mine.py").write_text(code, encoding="latin-1")
    assert metric_problem("mine.py:f", tmp_path) is None
    answer = Prediction(
        key="k", answer_number=0, source="s", question="q", reference="a", prediction="a", is_cut=False
    )
    figures, [problem] = score_predictions([answer], {"s": ("mine.py:f", "exact")}, tmp_path)
    assert problem.startswith("source s: metric mine.py:f ")
    assert said in problem
    assert set(figures["s"]) == {"questions", "cut", "exact", "exact_low", "exact_high"}


@pytest.mark.parametrize(
    "damage",
    [
        b"\xff\xfe",
        b"[" * 100_000,
        b"null",
        b'{"key": 1}',
        b'{"scores": 5',
        b'{"scores": {"exact": "x"}',
        b'{"question": null',
    ],
)
def test_damaged_predictions_are_told(tmp_path, damage):
    good = '"key": "k", "answer_number": 0, "source": "s", "reference": "a", "prediction": "\u2028", "is_cut": false'
    if not damage.endswith((b"}", b"l")) or b"x" in damage:
        damage += (("" if b"question" in damage else ', "question": "q"') + ", " + good + "}").encode()
    file = tmp_path / "predictions.jsonl"
    whole = "{" + good + ', "question": "q"}\n'
    file.write_bytes(whole.encode())
    assert read_predictions(file)[0].prediction == "\u2028"
    file.write_bytes(damage + b"\n" + whole.encode())
    with pytest.raises(ValueError, match="move the file away"):
        read_predictions(file)


def test_names_of_functions_that_are_not_there(tmp_path):
    (tmp_path / "mine.py").write_text("")
    assert "defines no function gone" in metric_problem("mine.py:gone", tmp_path)


def test_every_name_is_usable_and_a_wrong_one_leads_to_the_right_one():
    assert [metric_problem(name, Path()) for name in (*EACH, *TOGETHER)] == [None] * 7
    assert "did you mean multiple_choice?" in metric_problem("multichoice", Path())
    assert "there are exact, relaxed" in metric_problem("x", Path())
    for name in (*EACH, *TOGETHER):
        assert score(name, [Scored("q", "B. 2 to 4", "B. 2 to 4"), Scored("q", "a dog", "1")], Path())[0] > 0
    assert exact("a", "b") == 0


@pytest.mark.parametrize("name", ["multiple_choice", "temporal_iou"])
def test_a_metric_that_reads_no_recorded_answer_is_told_and_is_no_zero(name):
    answers = [Scored("What is it?", "a dog", "a dog"), Scored("And this?", "cats", "B")]
    with pytest.raises(ValueError, match=f"{name} can read none of the recorded answers, such as 'a dog'"):
        score(name, answers, Path())
    readable = Scored("Which?", "B" if name == "multiple_choice" else "1.0 to 2.0 seconds", "no")
    assert score(name, [*answers, readable], Path()) == [0, 0, 0]
