"""Answers of sentences: how much of the words they share with the recorded one."""

from __future__ import annotations

import re
from collections.abc import Sequence


def rouge_l(prediction: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004), as google-research's rouge-score computes it.

    >>> round(rouge_l("a dog runs", "a brown dog runs fast"), 3)
    0.75
    """
    from rouge_score.rouge_scorer import RougeScorer

    return float(RougeScorer(["rougeL"]).score(reference, prediction)["rougeL"].fmeasure)


def cider(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """CIDEr-D of each answer (Vedantam et al. 2015), on COCO's scale of 0 to 10.

    The weights of words come from ``references``, all of them: a score of few answers is not that of many. Words are
    runs of letters and digits in lower case; COCO's own evaluation takes them from Stanford's tokenizer, a Java
    program, so figures differ from it by a few per cent.
    """
    from pycocoevalcap.cider.cider import Cider

    found = {i: [" ".join(words(text))] for i, text in enumerate(predictions)}
    true = {i: [" ".join(words(text))] for i, text in enumerate(references)}
    _, scores = Cider().compute_score(true, found)
    return [float(score) for score in scores]


def words(text: str) -> list[str]:
    """Letters and digits, in lower case."""
    return re.findall(r"\w+", text.lower())
