"""The rules of data/plan/balance.py once more, in plain Python with no bound on integers, written to be read."""

from __future__ import annotations

from collections.abc import Sequence

SHARE, SLACK, LOOKAHEAD = 1 << 20, 1 << 19, 64


def measured(sample: tuple[int, int, int, int], costs: Sequence[int], means: Sequence[int]) -> list[int]:
    """Tokens, patches, items; shares of work, the language model's, the encoder's, tokens and patches."""
    tokens, patches, items, pairs = sample
    language, encoder = costs[0] * tokens + costs[1] * tokens**2, costs[2] * patches + costs[3] * pairs
    parts = (language + encoder, language, encoder, tokens, patches)
    return [tokens, patches, items, *(part * SHARE // mean for part, mean in zip(parts, means, strict=True))]


def placed(samples: list[list[int]], by_size: bool, num_packs: int, caps: Sequence[int]) -> list[int | None]:
    """The largest first, into the least loaded pack with room."""
    held = [[0] * 8 for _ in range(num_packs)]
    found: list[int | None] = [None] * len(samples)

    def size(i: int) -> int:
        return max(samples[i][0] * caps[1], samples[i][1] * caps[0]) if by_size else samples[i][3]

    for i in sorted(range(len(samples)), key=lambda i: (-size(i), i)):
        options = []
        for k in range(num_packs):
            together = [a + b for a, b in zip(held[k], samples[i], strict=True)]
            if all(total <= cap for total, cap in zip(together, caps, strict=False)):
                options.append((max(together[6:] if by_size else together[3:]), k))
        if options:
            found[i] = min(options)[1]
            held[found[i]] = [a + b for a, b in zip(held[found[i]], samples[i], strict=True)]
    return found


def assigned(samples: list[list[int]], num_packs: int, caps: Sequence[int]) -> list[int | None]:
    """By balance; by size where that leaves out fewer."""
    ways = [placed(samples, by_size, num_packs, caps) for by_size in (False, True)]
    return min(ways, key=lambda way: way.count(None))  # the first of equals


def improved(samples: list[list[int]], found: list[int], num_packs: int, caps: Sequence[int]) -> list[int]:
    """Exchanges between the most loaded pack and the 16 least loaded ones."""
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    for i, k in enumerate(found):
        packs[k].insert(0, i)

    def held(pack: list[int]) -> list[int]:
        return [sum(samples[i][column] for i in pack) for column in range(8)]

    def load(pack: list[int]) -> int:
        total = held(pack)
        return max(total[3], total[4] - SLACK, total[5] - SLACK)

    enough = sum(held(pack)[3] for pack in packs) // num_packs * 1025 // 1024
    stuck: set[int] = set()
    for _ in range(8 * num_packs):
        free = [k for k in range(num_packs) if k not in stuck]
        if not free:
            break
        a = max(free, key=lambda k: (load(packs[k]), -k))
        best, choice = load(packs[a]), None
        if best <= enough:
            break
        others = sorted((k for k in range(num_packs) if k != a), key=lambda k: (load(packs[k]), k))[:16]
        for b in others:
            for i in packs[a]:
                for j in [None, *packs[b]]:
                    if samples[i][3] <= (samples[j][3] if j is not None else 0):
                        continue
                    left = [n for n in packs[a] if n != i] + ([j] if j is not None else [])
                    right = [n for n in packs[b] if n != j] + [i]
                    sums = [*zip(held(left)[:3], caps, strict=True), *zip(held(right)[:3], caps, strict=True)]
                    most = max(load(left), load(right))
                    if most < best and all(total <= cap for total, cap in sums):
                        best, choice = most, (i, j, b)
        if choice is None:
            stuck.add(a)
            continue
        i, j, b = choice
        packs[a].remove(i)
        packs[b].insert(0, i)
        if j is not None:
            packs[b].remove(j)
            packs[a].insert(0, j)
        stuck.discard(b)
    where = {i: k for k, pack in enumerate(packs) for i in pack}
    return [where[i] for i in range(len(samples))]


def cut(
    order: Sequence[int],
    samples: list[tuple[int, int, int, int]],
    costs: Sequence[int],
    means: Sequence[int],
    num_packs: int,
    caps: Sequence[int],
    aims: Sequence[int],
    max_samples: int,
) -> list[list[int]]:
    """Steps, each a list of samples."""
    waiting: list[int] = []
    ahead = list(order)
    steps = []

    def fits(chosen: list[int], row: int) -> bool:
        if not chosen:
            return True
        totals = [sum(samples[i][d] for i in [*chosen, row]) for d in range(3)]
        return len(chosen) < max_samples and all(t <= aim for t, aim in zip(totals, aims, strict=True))

    while waiting or ahead:
        chosen: list[int] = []
        still = []
        for row in waiting:
            (chosen if fits(chosen, row) else still).append(row)
        waiting = still
        while (
            ahead
            and len(waiting) < LOOKAHEAD
            and len(chosen) < max_samples
            and sum(samples[i][0] for i in chosen) < aims[0] - aims[0] // 2048
        ):
            row = ahead.pop(0)
            (chosen if fits(chosen, row) else waiting).append(row)
        found = assigned([measured(samples[row], costs, means) for row in chosen], num_packs, caps)
        steps.append([row for row, k in zip(chosen, found, strict=True) if k is not None])
        waiting = [row for row, k in zip(chosen, found, strict=True) if k is None] + waiting
    return steps
