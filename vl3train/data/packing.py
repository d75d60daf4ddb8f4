"""How samples go into packs, and packs to ranks: integer arithmetic only, so equal on every machine."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from vl3train.contracts.records import Pack

# Work in kFLOP of one forward pass of VideoLLaMA3-2B, counted from its shapes. Attention is per sample in the
# language model and per frame in the encoder.
KFLOP_TOKEN, KFLOP_TOKEN_PAIR = 3_100_000, 86
KFLOP_PATCH, KFLOP_PATCH_PAIR = 820_000, 124


def sample_costs(num_tokens: np.ndarray, num_patches: np.ndarray, num_patch_pairs: np.ndarray) -> np.ndarray:
    """Work of each sample in kFLOP, int64. ``num_patch_pairs`` is the sum over frames of patches squared.

    >>> sample_costs(np.array([10]), np.array([8]), np.array([32])).tolist()
    [37572568]
    """
    tokens, patches = num_tokens.astype(np.int64), num_patches.astype(np.int64)
    language_model = KFLOP_TOKEN * tokens + KFLOP_TOKEN_PAIR * tokens * tokens
    return language_model + KFLOP_PATCH * patches + KFLOP_PATCH_PAIR * num_patch_pairs.astype(np.int64)


def pack_samples(
    tokens: Sequence[int], patches: Sequence[int], costs: Sequence[int], *, packs: int, caps: tuple[int, int]
) -> list[int] | None:
    """A pack number for each sample, or None where this rule finds no room.

    First by balance: the costliest sample first, into the cheapest pack with room. Where that leaves a sample
    without a place, by size: the largest first, into the fullest pack with room (best fit decreasing).

    >>> pack_samples([6, 5, 4, 2], [0, 9, 4, 0], [6, 14, 8, 2], packs=2, caps=(10, 10))
    [1, 0, 1, 0]
    """
    everyone = range(len(tokens))
    by_cost = sorted(everyone, key=lambda i: (-costs[i], i))
    assignment = [0] * len(tokens)
    heap = [(0, pack, 0, 0) for pack in range(packs)]  # cost, pack, tokens, patches
    for i in by_cost:
        full = []
        while heap:
            cost, pack, used_tokens, used_patches = heapq.heappop(heap)
            now = (cost + costs[i], pack, used_tokens + tokens[i], used_patches + patches[i])
            if now[2] <= caps[0] and now[3] <= caps[1]:
                assignment[i] = pack
                heapq.heappush(heap, now)
                break
            full.append((cost, pack, used_tokens, used_patches))
        else:
            return _best_fit_decreasing(tokens, patches, packs=packs, caps=caps)
        for entry in full:
            heapq.heappush(heap, entry)
    return assignment


def _best_fit_decreasing(
    tokens: Sequence[int], patches: Sequence[int], *, packs: int, caps: tuple[int, int]
) -> list[int] | None:
    """The largest share of a cap first, into the pack where it leaves the least. Integers only."""

    def share(used_tokens: int, used_patches: int) -> int:  # of the cap that is nearer, times both caps
        return max(used_tokens * caps[1], used_patches * caps[0])

    room = [caps] * packs
    assignment = [0] * len(tokens)
    for i in sorted(range(len(tokens)), key=lambda i: (-share(tokens[i], patches[i]), i)):
        fits = [
            (share(free[0] - tokens[i], free[1] - patches[i]), pack)
            for pack, free in enumerate(room)
            if tokens[i] <= free[0] and patches[i] <= free[1]
        ]
        if not fits:
            return None
        pack = min(fits)[1]
        assignment[i] = pack
        room[pack] = (room[pack][0] - tokens[i], room[pack][1] - patches[i])
    return assignment


def rank_packs(packs: Sequence[Pack], rank: int, dp_size: int) -> list[Pack]:
    """The packs of one rank in the order it runs them: as many on each rank, balanced, costliest first.

    The costliest pack first, to the rank with the least work that still has a place (LPT). Running them in
    falling cost pairs packs of like cost across the ranks, which wait for each other in every micro-batch.
    """
    if len(packs) % dp_size:
        raise ValueError(f"step.global_packs={len(packs)} does not divide over {dp_size} ranks")
    work, mine = [0] * dp_size, [[] for _ in range(dp_size)]  # type: tuple[list[int], list[list[Pack]]]
    for i in sorted(range(len(packs)), key=lambda i: (-packs[i].cost, i)):
        open_ranks = [r for r in range(dp_size) if len(mine[r]) < len(packs) // dp_size]
        chosen = min(open_ranks, key=lambda r: (work[r], r))
        mine[chosen].append(packs[i])
        work[chosen] += packs[i].cost
    return mine[rank]
