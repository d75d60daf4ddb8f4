"""Which token comes next: the most likely one, or one drawn from the likely ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn, by the field's names; the defaults are greedy.

    Raises ValueError naming every value that is out of range.
    """

    temperature: float = 0.0  # 0: the most likely token
    top_k: int = 0  # draw from this many of the most likely tokens; 0: from all
    top_p: float = 1.0  # draw from the fewest most likely tokens whose probabilities sum to this
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = []
        if not 0 <= self.temperature < float("inf"):
            wrong.append(f"temperature={self.temperature} must be 0 (greedy) or above")
        if self.top_k < 0:
            wrong.append(f"top_k={self.top_k} must be 0 (off) or above")
        if not 0 < self.top_p <= 1:
            wrong.append(f"top_p={self.top_p} must be above 0 and at most 1 (off)")
        if wrong:
            raise ValueError("; ".join(wrong))


GREEDY = Sampling()


def next_tokens(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """(B,) token ids. ``generator`` lies on the logits' device; greedy sampling needs none."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    scores = logits_BV.float() / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[:, -1:], -torch.inf)
    if sampling.top_p < 1:
        ordered, order = scores.sort(descending=True)
        probabilities = ordered.softmax(-1)
        # A token goes where those before it already reach top_p; so the most likely one always stays.
        enough = probabilities.cumsum(-1) - probabilities >= sampling.top_p
        scores = scores.masked_fill(enough.scatter(-1, order, enough), -torch.inf)
    return torch.multinomial(scores.softmax(-1), 1, generator=generator).squeeze(-1)
