"""Answers of a few words, each against the recorded answer: 1 right, 0 wrong, and degrees between."""

from __future__ import annotations

import re

ANLS_THRESHOLD = 0.5
"""Answers that differ in half of their characters or more score 0 (Biten et al. 2019, DocVQA)."""

RELAXED_TOLERANCE = 0.05
"""Numbers may differ by this share (Methani et al. 2020, ChartQA)."""


def exact(prediction: str, reference: str) -> float:
    """1 where both are the same words: case, outer space and a period at the end don't count.

    >>> exact(" A red car.", "a red  car"), exact("car", "a red car")
    (1.0, 0.0)
    """
    return float(plain(prediction) == plain(reference))


def relaxed(prediction: str, reference: str) -> float:
    """ChartQA's relaxed accuracy: numbers may differ by 5 %, other answers not at all.

    >>> relaxed("104", "100"), relaxed("106", "100"), relaxed("52%", "0.51"), relaxed("Peru", "peru")
    (1.0, 0.0, 1.0, 1.0)
    """
    found, true = number(prediction), number(reference)
    if found is None or true is None or true == 0:
        return exact(prediction, reference) if found != true or true is None else 1.0
    return float(abs(found - true) / abs(true) <= RELAXED_TOLERANCE)


def anls(prediction: str, reference: str) -> float:
    """Average normalized Levenshtein similarity of one answer, as DocVQA scores it.

    >>> anls("Harbor Street 12", "harbour street 12") > 0.9, anls("no idea", "harbour street 12")
    (True, 0.0)
    """
    from rapidfuzz.distance import Levenshtein

    similarity = float(Levenshtein.normalized_similarity(plain(prediction), plain(reference)))
    return similarity if similarity > 1 - ANLS_THRESHOLD else 0.0


def multiple_choice(prediction: str, reference: str) -> float:
    """1 where both name the same letter: "B", "(b)", "B. a dog", "The answer is B.".

    >>> [multiple_choice(text, "(B) a dog") for text in ("B", "b.", "Answer: (B)", "The best answer is B", "A", "Bob")]
    [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    """
    true = letter(reference)
    return float(true is not None and letter(prediction) == true)


def plain(text: str) -> str:
    """Lower case, single spaces, no period at the end."""
    return " ".join(text.lower().split()).removesuffix(".")


def number(text: str) -> float | None:
    """The number that an answer is: "1,200", "$3.5", "52%" (0.52); None for anything else."""
    words = text.strip().removesuffix(".").replace(",", "").lstrip("$€£").strip()
    percent = words.endswith("%")
    try:
        value = float(words.rstrip("% "))
    except ValueError:
        return None
    if value != value or value in (float("inf"), float("-inf")):
        return None
    return value / 100 if percent else value


def letter(text: str) -> str | None:
    """The letter of a choice that an answer names, or None.

    A letter at the beginning counts, alone or before punctuation; else one after "answer is", "answer:", "option".
    """
    start = re.match(r"\s*[\(\[]?([A-Za-z])(?:[\)\].:,]|\s*$)", text)
    said = re.search(r"(?:answer|option|choice)(?:\s+is)?\s*:?\s*[\(\[]?([A-Za-z])\b", text, re.IGNORECASE)
    found = start or said
    return found[1].upper() if found else None
