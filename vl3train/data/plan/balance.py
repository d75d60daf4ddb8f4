"""Samples into the packs of a step, and an epoch into steps: compiled, integers only, equal on every machine.

A step is filled in the order of the epoch. What would overflow it, or finds no place when its packs are put
together, comes first in the next one. So every sample of the epoch is in exactly one step, every step is known to
go into its packs, and any step can be put together again by itself.
"""

from __future__ import annotations

import numpy as np
from numba import njit

SHARE = 1 << 20
"""What a pack of mean work counts: work is compared in these units, of the language model and of the encoder."""

SLACK = SHARE // 2
"""How much more than its total work one of a pack's two kinds may be out of balance before swaps look at it."""

ASKED = 16
"""How many of the least loaded packs are asked for an exchange."""

LOOKAHEAD = 64
"""Samples that a step may put off while it looks for ones that still fit: fill and locality weigh against it."""

# Columns of a measured sample. The first three have caps; the others are shares of a mean pack.
TOKENS, PATCHES, ITEMS, WORK, LANGUAGE, ENCODER, TOKEN_SHARE, PATCH_SHARE = range(8)


@njit(cache=True, nogil=True)
def measure(rows, tokens, patches, items, pairs, costs, means):
    """The eight columns of some samples.

    Args:
        rows: (n,) samples of the table.
        tokens: of every sample of the table, as ``patches``, ``items`` (images and clips) and ``pairs``.
        patches: see there.
        items: see there.
        pairs: sum over frames of patches squared.
        costs: (4,) work of a token, a token pair, a patch and a patch pair.
        means: (5,) what WORK to PATCH_SHARE are shares of: a mean pack's.

    Returns:
        (n, 8) int64
    """
    measured = np.empty((len(rows), 8), np.int64)
    for i in range(len(rows)):
        row = rows[i]
        t, p = np.int64(tokens[row]), np.int64(patches[row])
        language = costs[0] * t + costs[1] * t * t
        encoder = costs[2] * p + costs[3] * np.int64(pairs[row])
        measured[i, TOKENS], measured[i, PATCHES], measured[i, ITEMS] = t, p, items[row]
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
        by_size: a pack's load, and a sample's size, is its tokens or patches, whichever is the larger share; else
            its work too: all of it, the language model's, the encoder's.
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
    """As ``place``, by balance; where that leaves some out, by size if that leaves out fewer.

    Asked again for the samples that it placed, it places all of them: one left out changes nothing for the rest.
    """
    found, held = place(measured, False, num_packs, caps)
    left_out = np.sum(found < 0)
    if left_out:
        other, other_held = place(measured, True, num_packs, caps)
        if np.sum(other < 0) < left_out:
            return other, other_held
    return found, held


@njit(cache=True, nogil=True)
def _load(held, k):
    return max(held[WORK, k], held[LANGUAGE, k] - SLACK, held[ENCODER, k] - SLACK)


@njit(cache=True, nogil=True)
def improve(measured, found, held, caps):
    """Move and swap samples between the most loaded pack and lightly loaded ones, in place, while that helps.

    Ends when no pack is 0.1 % above the mean, or at 8 exchanges a pack.
    """
    num_packs = held.shape[1]
    first = np.full(num_packs, -1, np.int64)
    after = np.full(len(found), -1, np.int64)
    for i in range(len(found)):
        after[i] = first[found[i]]
        first[found[i]] = i
    load = np.array([_load(held, k) for k in range(num_packs)])
    enough = np.sum(held[WORK]) // num_packs * 1025 // 1024
    stuck = np.zeros(num_packs, np.bool_)
    for _ in range(8 * num_packs):
        a = -1
        for k in range(num_packs):
            if not stuck[k] and (a < 0 or load[k] > load[a]):
                a = k
        if a < 0 or load[a] <= enough:
            return
        best, best_i, best_j, best_b = load[a], -1, -1, -1
        asked = np.zeros(num_packs, np.bool_)
        asked[a] = True
        for _ in range(min(ASKED, num_packs - 1)):
            b = -1
            for k in range(num_packs):
                if not asked[k] and (b < 0 or load[k] < load[b]):
                    b = k
            asked[b] = True
            i = first[a]
            while i >= 0:
                j = -2  # first a move: nothing comes back
                while j != -1:
                    # Loads before fits: few exchanges pass the first, and this is the innermost loop.
                    work = measured[i, WORK] - (measured[j, WORK] if j >= 0 else 0)
                    if work > 0 and held[WORK, b] + work < best:
                        language = measured[i, LANGUAGE] - (measured[j, LANGUAGE] if j >= 0 else 0)
                        encoder = measured[i, ENCODER] - (measured[j, ENCODER] if j >= 0 else 0)
                        most = max(
                            held[WORK, a] - work,
                            held[LANGUAGE, a] - language - SLACK,
                            held[ENCODER, a] - encoder - SLACK,
                            held[WORK, b] + work,
                            held[LANGUAGE, b] + language - SLACK,
                            held[ENCODER, b] + encoder - SLACK,
                        )
                        if most < best:
                            fits = True
                            for column in range(3):
                                change = measured[i, column] - (measured[j, column] if j >= 0 else 0)
                                fits &= held[column, b] + change <= caps[column]
                                fits &= held[column, a] - change <= caps[column]
                            if fits:
                                best, best_i, best_j, best_b = most, i, j, b
                    j = first[b] if j == -2 else after[j]
                i = after[i]
        if best_i < 0:
            stuck[a] = True
            continue
        _carry_over(best_i, a, best_b, measured, found, held, first, after)
        if best_j >= 0:
            _carry_over(best_j, best_b, a, measured, found, held, first, after)
        load[a], load[best_b] = _load(held, a), _load(held, best_b)
        stuck[best_b] = False


@njit(cache=True, nogil=True)
def _carry_over(i, source, target, measured, found, held, first, after):
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
def pack_step(rows, tokens, patches, items, pairs, costs, means, num_packs, caps):
    """The pack of each sample of a step that ``cut_epoch`` made: (n,) int64."""
    measured = measure(rows, tokens, patches, items, pairs, costs, means)
    found, held = assign(measured, num_packs, caps)
    improve(measured, found, held, caps)
    return found


@njit(cache=True, nogil=True)
def cut_epoch(order, tokens, patches, items, pairs, costs, means, num_packs, caps, aims, max_samples):
    """The epoch's samples, step after step, and where each step begins.

    Args:
        order: (n,) samples in the order of the epoch; each fits a pack alone.
        tokens: see ``measure``, as for all up to ``means``.
        patches: likewise.
        items: likewise.
        pairs: likewise.
        costs: likewise.
        means: likewise.
        num_packs: K.
        caps: (3,) of a pack.
        aims: (3,) tokens, patches and items at which a step closes; one sample alone may be more.
        max_samples: of one step.

    Returns:
        (n,) the same samples in another order, and (steps + 1,) int64 bounds.
    """
    total = len(order)
    cut, bounds = np.empty_like(order), np.empty(total + 1, np.int64)
    waiting, chosen = np.empty_like(order), np.empty_like(order)
    num_waiting = position = written = num_steps = 0
    while written < total:
        bounds[num_steps] = written
        num_steps += 1
        num_chosen = t = p = v = kept = 0
        for w in range(num_waiting):
            row = waiting[w]
            if num_chosen == 0 or (
                num_chosen < max_samples
                and t + tokens[row] <= aims[0]
                and p + patches[row] <= aims[1]
                and v + items[row] <= aims[2]
            ):
                chosen[num_chosen] = row
                num_chosen, t, p, v = num_chosen + 1, t + tokens[row], p + patches[row], v + items[row]
            else:
                waiting[kept] = row
                kept += 1
        num_waiting = kept
        while (
            position < total
            and num_waiting < LOOKAHEAD
            and num_chosen < max_samples
            and t < aims[0] - aims[0] // 2048
        ):
            row = order[position]
            position += 1
            if num_chosen == 0 or (
                t + tokens[row] <= aims[0] and p + patches[row] <= aims[1] and v + items[row] <= aims[2]
            ):
                chosen[num_chosen] = row
                num_chosen, t, p, v = num_chosen + 1, t + tokens[row], p + patches[row], v + items[row]
            else:
                waiting[num_waiting] = row
                num_waiting += 1
        rows = chosen[:num_chosen]
        found, _ = assign(measure(rows, tokens, patches, items, pairs, costs, means), num_packs, caps)
        # Those left out were in front of what waits: they come first, in their order.
        num_left_out = np.sum(found < 0)
        for w in range(num_waiting - 1, -1, -1):
            waiting[w + num_left_out] = waiting[w]
        num_waiting += num_left_out
        num_left_out = 0
        for i in range(num_chosen):
            if found[i] >= 0:
                cut[written] = rows[i]
                written += 1
            else:
                waiting[num_left_out] = rows[i]
                num_left_out += 1
    bounds[num_steps] = total
    return cut, bounds[: num_steps + 1].copy()
