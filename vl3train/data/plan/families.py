"""Which records the plan moves as one: those of a family, which show the same media behind the same text.

A *unit* is a sample, or up to ``data.max_family_records`` records of one family that fit a pack together. Its prefix
is encoded and prefilled once.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vl3train.data.compiled import njit
from vl3train.data.plan.balance import Columns
from vl3train.data.plan.sample_table import SampleTable


@dataclass(frozen=True, slots=True)
class Units:
    """The units of a table, source after source, each source's in the order of their first rows."""

    sizes: tuple[int, ...]  # units of each source
    rows: np.ndarray  # (n,) int64 rows of the table, unit after unit
    bounds: np.ndarray  # (units + 1,) int64 into rows
    tokens: np.ndarray  # (units,) int32, the prefix once
    fewer_pairs: np.ndarray  # (units,) int64, token pairs fewer than a sample of as many tokens has

    @property
    def first_rows(self) -> np.ndarray:
        """(units,) int64: the row whose media a unit shows."""
        return self.rows[self.bounds[:-1]]

    @property
    def num_records(self) -> np.ndarray:
        """(units,) int32"""
        return np.diff(self.bounds).astype(np.int32)

    def rows_of(self, units: np.ndarray) -> np.ndarray:
        """The rows of some units, one unit after the other."""
        firsts, counts = self.bounds[:-1][units], self.num_records[units]
        offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.asarray(self.rows[np.repeat(firsts, counts) + offsets])


def make_units(table: SampleTable, fits: np.ndarray, max_tokens: int, max_records: int) -> Units | None:
    """The units of the samples that fit a pack; None where no two records share a prefix.

    Args:
        table: of the samples.
        fits: (n,) bool, which samples fit a pack alone.
        max_tokens: of one pack.
        max_records: of one unit.
    """
    if table.families is None or table.prefix_tokens is None or max_records < 2:
        return None
    first, sizes, found, lengths = 0, [], [], []
    for size in table.sizes:
        rows = np.flatnonzero(fits[first : first + size]) + first
        order, starts = _units_of_source(table, rows, max_tokens, max_records)
        found.append(order)
        lengths.append(np.diff(np.append(starts, len(order))))
        sizes.append(len(starts))
        first += size
    rows, counts = (
        np.concatenate([*found, np.zeros(0, np.int64)]),
        np.concatenate([*lengths, np.zeros(0, int)]),
    )
    if len(counts) == len(rows):
        return None
    bounds = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    firsts = rows[bounds[:-1]]
    prefix = np.where(counts > 1, table.prefix_tokens[firsts], 0).astype(np.int64)
    whole = np.add.reduceat(table.num_tokens[rows].astype(np.int64), bounds[:-1])
    squares = np.add.reduceat(table.num_tokens[rows].astype(np.int64) ** 2, bounds[:-1])
    tokens = whole - (counts - 1) * prefix
    pairs = squares - (counts - 1) * prefix**2  # as contracts.families.doubled_pairs counts them
    return Units(tuple(sizes), rows, bounds, tokens.astype(np.int32), tokens**2 - pairs)


class Sharing(NamedTuple):
    """What ``data.share_prefix`` would do to the samples of an index, each taken once."""

    samples: float  # share of the samples that would share a prefix
    tokens: float  # share of the tokens that are prefixes again


SHARING_COUNTED = 1_000_000
"""Of a larger index only so many samples are looked at, those of some families: to sort 100 million takes 10 s."""


def what_sharing_saves(
    table: SampleTable, max_tokens: int, max_records: int, counted: int = SHARING_COUNTED
) -> Sharing:
    """Of all samples of a table, or about so of families that hold about ``counted`` samples."""
    num = len(table.num_tokens)
    if table.families is None or table.prefix_tokens is None or not num:
        return Sharing(0.0, 0.0)
    every = -(-num // counted)  # a family's number is a digest, so this takes each with the same chance
    taken = (table.families != 0) & (table.families % every == 0) & (table.num_tokens <= max_tokens)
    families = table.families[taken]
    bounds = np.cumsum((0, *table.sizes))
    some = dataclasses.replace(
        table,
        sizes=tuple(int(taken[first:end].sum()) for first, end in itertools.pairwise(bounds)),
        num_tokens=table.num_tokens[taken],
        prefix_tokens=table.prefix_tokens[taken],
        families=families,
    )
    if len(np.unique(families)) == len(families):  # nothing of which make_units need be compiled
        return Sharing(0.0, 0.0)
    units = make_units(some, np.ones(len(some.num_tokens), bool), max_tokens, max_records)
    if units is None:
        return Sharing(0.0, 0.0)
    shared = units.num_records[units.num_records > 1].sum()
    saved = some.num_tokens.sum(dtype=np.int64) - units.tokens.sum(dtype=np.int64)
    whole = table.num_tokens.sum(dtype=np.int64)
    return Sharing(min(1.0, float(every * shared / num)), min(1.0, float(every * saved / whole)))


def _units_of_source(
    table: SampleTable, rows: np.ndarray, max_tokens: int, max_records: int
) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a source, unit after unit, and where each unit begins."""
    assert table.families is not None
    assert table.prefix_tokens is not None
    order = rows[np.argsort(table.families[rows], kind="stable")]
    begins = _begins(
        np.ascontiguousarray(table.families[order]),
        np.ascontiguousarray(table.num_tokens[order], np.int64),
        np.ascontiguousarray(table.prefix_tokens[order], np.int64),
        max_tokens,
        max_records,
    )
    starts = np.flatnonzero(begins)
    if not len(starts):
        return order, starts
    place = np.empty(len(starts), np.int64)
    place[np.argsort(order[starts])] = np.arange(len(starts))
    unit_of = place[np.cumsum(begins) - 1]
    by_unit = np.argsort(unit_of, kind="stable")
    return order[by_unit], np.flatnonzero(np.diff(unit_of[by_unit], prepend=-1))


@njit(cache=True, nogil=True)
def _begins(families, tokens, prefixes, max_tokens, max_records):
    """Which of the rows, sorted by family, begin a unit: (n,) bool. Family 0 shares nothing."""
    found = np.ones(len(families), np.bool_)
    held = count = 0
    for i in range(len(families)):
        same = i > 0 and families[i] != 0 and families[i] == families[i - 1]
        own = tokens[i] - prefixes[i]
        if same and count < max_records and held + own <= max_tokens:
            found[i] = False
            held, count = held + own, count + 1
        else:
            held, count = tokens[i], 1
    return found


def columns_of(table: SampleTable, units: Units | None) -> Columns:
    """The columns of the units, or of all samples, for the compiled code."""
    num = len(table.num_tokens)
    items = np.zeros(num, np.int32) if table.num_items is None else table.num_items
    if units is None:
        values = (table.num_tokens, table.num_patches, items, table.num_patch_pairs)
        fewer, records = np.zeros(1, np.int64), np.ones(1, np.int32)
    else:
        of_media = (one[units.first_rows] for one in (table.num_patches, items, table.num_patch_pairs))
        values = (units.tokens, *of_media)
        fewer, records = units.fewer_pairs, units.num_records
    tokens, patches, items, pairs = values
    # One dtype for the compiled code, without a copy where it is that already.
    columns = Columns(
        np.ascontiguousarray(tokens, np.int32),
        np.ascontiguousarray(patches, np.int32),
        np.ascontiguousarray(items, np.int32),
        np.ascontiguousarray(pairs, np.int64),
        fewer,
        records,
    )
    return Columns(*(_read_only(values) for values in columns))


def _read_only(values: np.ndarray) -> np.ndarray:
    """A view as of a mapped file: to numba an array that may be written has another type, compiled a second time."""
    view = values.view()
    view.flags.writeable = False
    return view
