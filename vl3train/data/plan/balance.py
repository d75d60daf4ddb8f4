"""The samples of a step into its packs: compiled, integers only, equal on every machine.

The largest sample goes first, into the least loaded pack that has room. Then single moves and swaps even out the
work. ``cut.py`` decides which samples a step has.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vl3train.data.compiled import njit

SHARE = 1 << 20
"""What a pack of mean work counts: work is compared in these units, of the language model and of the encoder."""

SLACK = SHARE // 2
"""How far the work of one of the two models may be above its mean before an exchange takes it into account."""

MAX_PARTNERS = 16
"""How many of the least loaded packs are tried for one exchange."""

NO_SAMPLE = -1
"""End of a linked list of samples; as the second sample of an exchange it means a move: nothing comes back."""

# Columns of a measured sample. The first three have caps; the others are shares of a mean pack.
TOKENS, PATCHES, ITEMS, WORK, LANGUAGE, ENCODER, TOKEN_SHARE, PATCH_SHARE = range(8)


class Columns(NamedTuple):
    """What the compiled code reads of every unit of a plan (families.py), n of them: a sample, or records that share a
    prefix."""

    tokens: np.ndarray  # (n,) int32
    patches: np.ndarray  # (n,) int32
    items: np.ndarray  # (n,) int32, images and clips
    pairs: np.ndarray  # (n,) int64, sum over frames of their patches squared
    fewer_pairs: (
        np.ndarray
    )  # (n,) int64, token pairs fewer than a sample of as many tokens has; or (1,): 0 for all
    records: np.ndarray  # (n,) int32; or (1,): 1 for all


class Rules(NamedTuple):
    """What a step's packs may hold and how their work is counted."""

    num_packs: int
    caps: np.ndarray  # (3,) int64 on tokens, patches and items of a pack
    costs: np.ndarray  # (4,) int64 work of a token, a token pair, a patch and a patch pair
    means: np.ndarray  # (5,) int64 a mean pack's WORK, LANGUAGE, ENCODER, TOKENS and PATCHES


@njit(cache=True, nogil=True, inline="always")
def at(values, row):
    """The row's value in an array that has one for all rows where they are the same."""
    return values[row] if len(values) > 1 else values[0]


@njit(cache=True, nogil=True)
def measure(rows, columns, rules):
    """The eight columns of some samples.

    Args:
        rows: (n,) samples of the table.
        columns: ``Columns`` of the whole table.
        rules: ``Rules``.

    Returns:
        (n, 8) int64
    """
    costs, means = rules.costs, rules.means
    measured = np.empty((len(rows), 8), np.int64)
    for i in range(len(rows)):
        row = rows[i]
        t, p = np.int64(columns.tokens[row]), np.int64(columns.patches[row])
        language = costs[0] * t + costs[1] * (t * t - at(columns.fewer_pairs, row))
        encoder = costs[2] * p + costs[3] * np.int64(columns.pairs[row])
        measured[i, TOKENS], measured[i, PATCHES], measured[i, ITEMS] = t, p, columns.items[row]
        measured[i, WORK] = (language + encoder) * SHARE // means[0]
        measured[i, LANGUAGE] = language * SHARE // means[1]
        measured[i, ENCODER] = encoder * SHARE // means[2]
        measured[i, TOKEN_SHARE] = t * SHARE // means[3]
        measured[i, PATCH_SHARE] = p * SHARE // means[4]
    return measured


@njit(cache=True, nogil=True)
def place(measured, by_size, num_packs, caps):
    """A pack for each sample: the largest first, into the pack that is least loaded with it.

    Args:
        measured: (n, 8), see ``measure``.
        by_size: a sample's size, and a pack's load, is its tokens or patches, whichever is the larger share of a
            pack. False: its work, in all, of the language model and of the encoder, counts too.
        num_packs: K.
        caps: (3,) on tokens, patches and items of a pack.

    Returns:
        (n,) int64 packs, -1 where no pack has room; and what the packs hold, (8, K) int64. Equal loads go to the
        first pack, equal sizes in the order given.
    """
    num = len(measured)
    if by_size:
        size = np.maximum(measured[:, TOKENS] * caps[1], measured[:, PATCHES] * caps[0])
    else:
        size = measured[:, WORK].copy()
    found = np.full(num, -1, np.int64)
    held = np.zeros((8, num_packs), np.int64)
    load = np.empty(num_packs, np.int64)
    for i in np.argsort(-size, kind="mergesort"):
        one = measured[i]
        for k in range(num_packs):
            most = max(held[TOKEN_SHARE, k] + one[TOKEN_SHARE], held[PATCH_SHARE, k] + one[PATCH_SHARE])
            if not by_size:
                most = max(
                    most,
                    held[WORK, k] + one[WORK],
                    held[LANGUAGE, k] + one[LANGUAGE],
                    held[ENCODER, k] + one[ENCODER],
                )
            fits = (
                (held[TOKENS, k] + one[TOKENS] <= caps[0])
                & (held[PATCHES, k] + one[PATCHES] <= caps[1])
                & (held[ITEMS, k] + one[ITEMS] <= caps[2])
            )
            load[k] = most if fits else np.int64(1) << 62
        best = 0
        for k in range(1, num_packs):
            if load[k] < load[best]:
                best = k
        if load[best] < np.int64(1) << 62:
            found[i] = best
            for column in range(8):
                held[column, best] += one[column]
    return found, held


@njit(cache=True, nogil=True)
def assign(measured, num_packs, caps):
    """As ``place``, by balance; where samples find no pack, by size if fewer find none that way.

    Called with the samples that it placed, it places all of them: one without a pack changes nothing for the others.
    """
    found, held = place(measured, False, num_packs, caps)
    num_unplaced = np.sum(found < 0)
    if num_unplaced:
        other, other_held = place(measured, True, num_packs, caps)
        if np.sum(other < 0) < num_unplaced:
            return other, other_held
    return found, held


@njit(cache=True, nogil=True)
def improve(measured, found, held, caps):
    """Move and swap samples between the most loaded pack and lightly loaded ones, in place, while that helps.

    Ends when no pack is 0.1 % above the mean, or at 8 exchanges a pack.
    """
    num_packs = held.shape[1]
    first, after = _linked(found, num_packs)
    load = np.array([_load(held, k) for k in range(num_packs)])
    enough = np.sum(held[WORK]) // num_packs * 1025 // 1024
    stuck = np.zeros(num_packs, np.bool_)
    for _ in range(8 * num_packs):
        a = _first_best(load, stuck)
        if a < 0 or load[a] <= enough:
            return
        i, j, b = _best_exchange(a, load, measured, held, caps, first, after)
        if i == NO_SAMPLE:
            stuck[a] = True
            continue
        _carry_over(i, a, b, measured, found, held, first, after)
        if j != NO_SAMPLE:
            _carry_over(j, b, a, measured, found, held, first, after)
        load[a], load[b] = _load(held, a), _load(held, b)
        stuck[b] = False


@njit(cache=True, nogil=True)
def _best_exchange(a, load, measured, held, caps, first, after):
    """Sample i of pack a for sample j of a pack b that leaves both least loaded; i is NO_SAMPLE where none helps."""
    best, best_i, best_j, best_b = load[a], NO_SAMPLE, NO_SAMPLE, -1
    tried = np.zeros(len(load), np.bool_)
    tried[a] = True
    for _ in range(min(MAX_PARTNERS, len(load) - 1)):
        b = _first_best(-load, tried)
        tried[b] = True
        i = first[a]
        while i != NO_SAMPLE:
            j, more = np.int64(NO_SAMPLE), first[b]  # a move first, then a swap with each sample of b
            while True:
                most = _load_after(i, j, a, b, measured, held, best)
                if most < best and _fits_after(i, j, a, b, measured, held, caps):
                    best, best_i, best_j, best_b = most, i, j, b
                if more == NO_SAMPLE:
                    break
                j, more = more, after[more]
            i = after[i]
    return best_i, best_j, best_b


@njit(cache=True, nogil=True)
def _load_after(i, j, a, b, measured, held, best):
    """The larger load of packs a and b after an exchange; ``best`` or more where it is no better than that."""
    # One comparison comes before the others: few exchanges pass it, and this is the innermost loop.
    work = measured[i, WORK] - (measured[j, WORK] if j >= 0 else 0)
    if work <= 0 or held[WORK, b] + work >= best:
        return best
    language = measured[i, LANGUAGE] - (measured[j, LANGUAGE] if j >= 0 else 0)
    encoder = measured[i, ENCODER] - (measured[j, ENCODER] if j >= 0 else 0)
    return max(
        held[WORK, a] - work,
        held[LANGUAGE, a] - language - SLACK,
        held[ENCODER, a] - encoder - SLACK,
        held[WORK, b] + work,
        held[LANGUAGE, b] + language - SLACK,
        held[ENCODER, b] + encoder - SLACK,
    )


@njit(cache=True, nogil=True)
def _fits_after(i, j, a, b, measured, held, caps):
    """Whether packs a and b keep their caps after an exchange."""
    fits = True
    for column in range(3):
        change = measured[i, column] - (measured[j, column] if j >= 0 else 0)
        fits &= held[column, b] + change <= caps[column]
        fits &= held[column, a] - change <= caps[column]
    return fits


@njit(cache=True, nogil=True)
def _first_best(values, closed):
    """The first pack with the largest value among those not closed; -1 where all are."""
    best = -1
    for k in range(len(values)):
        if not closed[k] and (best < 0 or values[k] > values[best]):
            best = k
    return best


@njit(cache=True, nogil=True)
def _load(held, k):
    return max(held[WORK, k], held[LANGUAGE, k] - SLACK, held[ENCODER, k] - SLACK)


@njit(cache=True, nogil=True)
def _linked(found, num_packs):
    """The samples of each pack as a linked list: its first one, (K,), and which comes after each, (n,)."""
    first = np.full(num_packs, NO_SAMPLE, np.int64)
    after = np.full(len(found), NO_SAMPLE, np.int64)
    for i in range(len(found)):
        after[i] = first[found[i]]
        first[found[i]] = i
    return first, after


@njit(cache=True, nogil=True)
def _carry_over(i, source, target, measured, found, held, first, after):
    """Take sample i out of one pack and put it into another, in all that is kept of the two."""
    if first[source] == i:
        first[source] = after[i]
    else:
        before = first[source]
        while after[before] != i:
            before = after[before]
        after[before] = after[i]
    after[i] = first[target]
    first[target] = i
    found[i] = target
    for column in range(8):
        held[column, source] -= measured[i, column]
        held[column, target] += measured[i, column]


@njit(cache=True, nogil=True)
def pack_step(rows, columns, rules):
    """The pack of each sample of a step that ``cut.cut_epoch`` made: (n,) int64."""
    measured = measure(rows, columns, rules)
    found, held = assign(measured, rules.num_packs, rules.caps)
    improve(measured, found, held, rules.caps)
    return found
