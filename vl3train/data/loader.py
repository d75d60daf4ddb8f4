"""The packs of the plan become batches, in worker processes that keep no position of their own.

A worker gets the number of a micro-batch and computes from the plan what is in it. What was prefetched when a run
dies, the next one loads anew.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from torch.utils.data import DataLoader, Dataset

from vl3train.contracts.line_log import let_output_fail
from vl3train.contracts.progress.job import keep_record_of_worker, remove_ended_workers
from vl3train.contracts.progress.record import IDLE, progress
from vl3train.contracts.records import Batch, Cursor, Pack, RenderedSample, RenderSettings, SampleError
from vl3train.data.collate import collate
from vl3train.data.data_wait import data_wait
from vl3train.data.media.clips import DecodeLimits
from vl3train.data.plan.costs import rank_packs
from vl3train.data.plan.plan import Plan
from vl3train.data.render.decode_client import Decoder, decode_server
from vl3train.data.render.families import FamilyRecord, blank_family
from vl3train.data.render.processes import clean_processes, end_with_parent
from vl3train.data.shards.index import Index
from vl3train.data.shards.manifest import IndexPlace


class FailedEntry(NamedTuple):
    """A sample that failed in the run: one line of the ledger."""

    shard: str
    key: str
    reason: str


class LoadedPack(NamedTuple):
    """A micro-batch, and its samples that failed. A tuple, so that DataLoader can pin what is inside."""

    batch: Batch
    failed: tuple[FailedEntry, ...]


@dataclass(frozen=True, kw_only=True)
class OpenData:
    """The data of a run, opened: what there is, in which order it comes, how it is rendered."""

    index: Index
    plan: Plan
    settings: RenderSettings
    tokenizer_dir: Path
    limits: DecodeLimits
    decode_seconds: float  # wall-clock limit of one sample
    retry_seconds: float  # how long a shard that cannot be read is tried again
    places: tuple[tuple[str, IndexPlace], ...] = ()  # name of each source that has shards, and where they lie
    changed: tuple[
        str, ...
    ] = ()  # what was different when they were indexed last, where this process did it again

    @property
    def source_names(self) -> tuple[str, ...]:
        """The recipe's sources; ``Batch.segment_sources`` are numbers of these."""
        return self.index.source_names


def micro_batch_packs(packs: list[Pack], dp_size: int) -> list[list[Pack]]:
    """The packs that run at the same time: one list for each micro-batch, with a pack for each rank."""
    shares = [rank_packs(packs, rank, dp_size) for rank in range(dp_size)]
    return [list(row) for row in zip(*shares, strict=True)]


@dataclass(frozen=True, kw_only=True)
class PackDataset(Dataset[LoadedPack]):
    """Micro-batch i of one rank, counted from step ``first``."""

    data: OpenData
    first: Cursor
    rank: int
    dp_size: int
    loss_chunk_tokens: int
    decode_address: str = ""  # of the decode server; ``load_packs`` fills it in

    def __getitem__(self, number: int) -> LoadedPack:
        return self._load(*self._planned(number))

    def blank(self, number: int) -> LoadedPack:
        """The same without pictures, supervised tokens or a sample that counts as failed; reads nothing."""
        pack, num_loss_chunks = self._planned(number)
        index = self.data.index
        samples: list[RenderedSample] = []
        for rows in pack.groups:
            planned, keys = [index.lengths(row) for row in rows], [index.key(row) for row in rows]
            samples += blank_family(planned, keys=keys, source=index.source(rows[0]))
        batch = collate(samples, pack, num_loss_chunks=num_loss_chunks, num_failed_samples=0)
        return LoadedPack(batch, ())

    def _planned(self, number: int) -> tuple[Pack, int]:
        """What is in a micro-batch, and how many pieces its loss is taken in."""
        plan = self.data.plan
        steps, micro_batch = divmod(number, plan.step.global_packs // self.dp_size)
        cursor = plan.cursor_at(self.first.step + steps, near=self.first)
        packs = micro_batch_packs(plan.step_packs(cursor), self.dp_size)[micro_batch]
        # By the largest pack of all ranks: ZeRO-3 gathers weights once a chunk, on every rank or on none.
        most = max(pack.num_supervised_tokens for pack in packs)
        return packs[self.rank], max(1, -(-most // self.loss_chunk_tokens))

    def _load(self, pack: Pack, num_loss_chunks: int) -> LoadedPack:
        failed: list[FailedEntry] = []
        samples, first_patch = [], 0
        for rows in pack.groups:
            found = self._render(rows, first_patch, failed)
            first_patch += len(found[0].patches)
            samples += found
        progress.sample("a pack", "collating")
        batch = collate(samples, pack, num_loss_chunks=num_loss_chunks, num_failed_samples=len(failed))
        progress.sample("", IDLE)
        return LoadedPack(batch, tuple(failed))

    def _render(
        self, rows: Sequence[int], first_patch: int, failed: list[FailedEntry]
    ) -> list[RenderedSample]:
        """A sample, or the prefix and the branches of a family; where one fails, blanks of the lengths of all, without
        pictures or supervised tokens: they show the same media."""
        index, wait = self.data.index, self.data.retry_seconds
        planned, keys = [index.lengths(row) for row in rows], [index.key(row) for row in rows]
        source = index.source(rows[0])
        try:
            progress.sample(keys[0], "reading")
            read = [index.read_sample(rows[0], retry_seconds=wait)]
            read += [index.read_text(row, retry_seconds=wait) for row in rows[1:]]
            progress.sample(keys[0], "decoding")
            decoder = _decoder(self.decode_address, self.data.decode_seconds, self.data.plan.step.max_patches)
            first, *rest = (FamilyRecord(*one, lengths) for one, lengths in zip(read, planned, strict=True))
            return decoder.render_family(first, rest, keys=keys, source=source, first_patch=first_patch)
        except SampleError as error:
            shards = (str(index.shard(row)) for row in rows)
            failed += [FailedEntry(shard, key, str(error)) for shard, key in zip(shards, keys, strict=True)]
            return blank_family(planned, keys=keys, source=source)
        except Exception as error:
            error.add_note(f"while rendering {keys[0]}")
            raise


@functools.lru_cache(maxsize=1)
def _decoder(address: str, seconds: float, num_patches: int) -> Decoder:
    """This process's own decode process; it lives until a decoder for another address is made."""
    return Decoder(address, seconds, num_patches)


def begin_worker(rank: Path | None, number: int) -> None:
    """The first call in a worker of the rank whose record is ``rank``."""
    let_output_fail()
    end_with_parent()
    Queue._on_queue_feeder_error = staticmethod(end_worker)  # type: ignore[attr-defined]  # of CPython 3.11 to 3.13
    keep_record_of_worker(rank, number)
    progress.phase("loader worker")


def end_worker(error: Exception, _: object) -> NoReturn:
    """End this worker because a pack could not be sent. Python would print the error, and the rank wait for ever."""
    print(
        f"\na loader worker could not send a pack: {error}. Where shared memory is full, give the container more "
        "(docker run --shm-size=16g), or set data.num_workers lower",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def load_packs(
    dataset: PackDataset, count: int, *, num_workers: int, pin_memory: bool
) -> Iterator[LoadedPack]:
    """Micro-batches 0 to ``count`` (not included) in order; each worker prefetches the next two.

    Where the wait for one is given up, it and those after it are blank (``data_wait``).
    """
    data = dataset.data
    remove_ended_workers()
    with decode_server(data.settings, data.tokenizer_dir, data.limits) as address:
        loader = DataLoader(
            dataclasses.replace(dataset, decode_address=address),
            batch_size=None,
            sampler=range(count),
            # A generator of its own: without one, each loader draws a seed from torch's global generator. A resumed
            # run makes its loaders at other moments, so its dropout would differ.
            generator=torch.Generator(),
            num_workers=min(num_workers, count),
            pin_memory=pin_memory,
            worker_init_fn=functools.partial(begin_worker, progress.path),
            multiprocessing_context=clean_processes() if num_workers and count else None,
        )
        packs = iter(loader)
        for number in range(count):
            pack = data_wait.next(packs)
            yield dataset.blank(number) if pack is None else pack
