"""An epoch into steps: compiled, integers only, equal on every machine.

A step is filled in the order of the epoch. What would overflow it, or finds no place when its packs are put
together, comes first in the next one. So every sample of the epoch is in exactly one step, every step is known to
go into its packs, and any step can be put together again by itself.
"""

from __future__ import annotations

import numpy as np

from vl3train.data.compiled import njit
from vl3train.data.plan.balance import assign, at, measure

LOOKAHEAD = 64
"""Samples that a step may put off while it searches for ones that still fit: fill and locality weigh against it."""


@njit(cache=True, nogil=True)
def cut_epoch(order, columns, rules, aims, max_samples):
    """The epoch's samples, step after step, and where each step begins.

    Args:
        order: (n,) samples in the order of the epoch; each fits a pack alone.
        columns: ``balance.Columns`` of the whole table.
        rules: ``balance.Rules``.
        aims: (3,) tokens, patches and items at which a step closes; one sample alone may be more.
        max_samples: of one step, records of families each.

    Returns:
        (n,) the same samples in another order, and (steps + 1,) int64 bounds.
    """
    total = len(order)
    cut, bounds = np.empty_like(order), np.empty(total + 1, np.int64)
    waiting, chosen = np.empty_like(order), np.empty_like(order)
    # Not 0 alone: numba gives a literal a type of its own, and compiles what is called with it once more.
    num_waiting = position = written = num_steps = np.int64(0)
    while written < total:
        bounds[num_steps] = written
        num_steps += 1
        num_chosen, num_waiting, filled = _take_waiting(
            waiting, num_waiting, chosen, columns, aims, max_samples
        )
        while (
            position < total
            and num_waiting < LOOKAHEAD
            and filled[3] < max_samples
            and filled[0] < aims[0] - aims[0] // 2048
        ):
            row = order[position]
            position += 1
            if num_chosen == 0 or _fits(row, filled, columns, aims, max_samples):
                chosen[num_chosen] = row
                num_chosen += 1
                filled = _add(row, filled, columns)
            else:
                waiting[num_waiting] = row
                num_waiting += 1
        rows = chosen[:num_chosen]
        found, _ = assign(measure(rows, columns, rules), rules.num_packs, rules.caps)
        written, num_waiting = _split(rows, found, cut, written, waiting, num_waiting)
    bounds[num_steps] = total
    return cut, bounds[: num_steps + 1].copy()


@njit(cache=True, nogil=True)
def _take_waiting(waiting, num_waiting, chosen, columns, aims, max_samples):
    """Choose what fits a new step of the samples that wait.

    Returns:
        How many are chosen, how many still wait, and the tokens, patches, items and records of those chosen.
    """
    num_chosen = num_kept = 0
    filled = (0, 0, 0, 0)
    for w in range(num_waiting):
        row = waiting[w]
        if num_chosen == 0 or _fits(row, filled, columns, aims, max_samples):
            chosen[num_chosen] = row
            num_chosen += 1
            filled = _add(row, filled, columns)
        else:
            waiting[num_kept] = row
            num_kept += 1
    return num_chosen, num_kept, filled


@njit(cache=True, nogil=True)
def _split(rows, found, cut, written, waiting, num_waiting):
    """Write the samples that found a pack behind the steps cut so far; the others come first among those that wait.

    They were in front of those: the samples that wait keep the order of the epoch.

    Returns:
        How many samples are written, and how many wait.
    """
    num_unplaced = np.sum(found < 0)
    for w in range(num_waiting - 1, -1, -1):
        waiting[w + num_unplaced] = waiting[w]
    first = 0
    for i in range(len(rows)):
        if found[i] >= 0:
            cut[written] = rows[i]
            written += 1
        else:
            waiting[first] = rows[i]
            first += 1
    return written, num_waiting + num_unplaced


# Inlined: a call would count references of all the arrays for each sample, which makes the cut a quarter slower.
@njit(cache=True, nogil=True, inline="always")
def _fits(row, filled, columns, aims, max_samples):
    """Whether a step of so many tokens, patches, items and records stays within its aims with one more sample."""
    return (
        filled[0] + columns.tokens[row] <= aims[0]
        and filled[1] + columns.patches[row] <= aims[1]
        and filled[2] + columns.items[row] <= aims[2]
        and filled[3] + at(columns.records, row) <= max_samples
    )


@njit(cache=True, nogil=True, inline="always")
def _add(row, filled, columns):
    """Tokens, patches, items and records of a step with one more sample."""
    tokens, patches, items, records = filled
    return (
        tokens + columns.tokens[row],
        patches + columns.patches[row],
        items + columns.items[row],
        records + at(columns.records, row),
    )
