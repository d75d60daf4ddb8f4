"""Shards with clips become shards with stored frames: the same samples, decoded once for all epochs.

It resumes: a shard that exists and is newer than its source is kept. The source shards do not change; take frames for
another rate or size from them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from vl3train.contracts.files import whole_file, write_whole
from vl3train.contracts.records import RenderSettings, SampleError
from vl3train.contracts.strict_json import json_text
from vl3train.data.media.clips import DecodeLimits
from vl3train.data.prepare.rejections import REJECTED_FILE
from vl3train.data.prepare.write_shards import write_members
from vl3train.data.recipe import Recipe
from vl3train.data.render.decode_client import Decoder, decode_server
from vl3train.data.shards.manifest import shard_files
from vl3train.data.shards.read import read_parts
from vl3train.data.shards.remote import SHARD_LIST, local_files
from vl3train.data.shards.tar_headers import CONVERSATION_PART, ShardSample, shard_samples

Members = dict[str, bytes]


def store_recipe(
    recipe: Recipe,
    out: Path,
    settings: RenderSettings,
    *,
    tokenizer_dir: Path,
    limits: DecodeLimits,
    num_workers: int,
    decode_seconds: float,
    progress: Callable[[str, int, int], None],
) -> Path:
    """Store the frames of all sources of a recipe below ``out``; the path of the recipe that names them.

    Rejected samples are in no new shard; REJECTED_FILE beside the shards lists them with the reasons.

    Args:
        num_workers: processes that decode.
        decode_seconds: wall-clock limit of one sample.
        progress: called with the source's name, samples done and samples in all.
    """
    sources = []
    with decode_server(settings, tokenizer_dir, limits) as address:
        for source in recipe.sources:
            entry = {"name": source.name, "weight": source.weight}
            for part, folder in (("shards", source.shards), ("held_out", source.held_out)):
                if folder is None:
                    continue
                target = out / source.name / ("train" if part == "shards" else "held_out")
                entry[part] = str(target.resolve())
                store_folder(
                    folder,
                    target,
                    address,
                    num_threads=max(1, num_workers),
                    decode_seconds=decode_seconds,
                    progress=lambda done, total, name=source.name: progress(name, done, total),  # type: ignore[misc]
                )
            sources.append(entry)
    about = f"{recipe.about} Clips are stored frames, taken at {settings.fps:g} a second."
    path = out / "recipe.yaml"
    write_whole(
        path, yaml.safe_dump({"name": recipe.name, "about": about, "sources": sources}, sort_keys=False)
    )
    return path


def store_folder(
    shards: Path,
    out: Path,
    address: str,
    *,
    num_threads: int,
    decode_seconds: float,
    progress: Callable[[int, int], None],
) -> None:
    """Store the frames of a folder of shards under the same shard names, through a decode server."""
    out.mkdir(parents=True, exist_ok=True)
    for unfinished in out.glob(
        "*.partial"
    ):  # of a run that was killed: one process at a time writes a folder
        unfinished.unlink()
    done = total = 0
    for shard in [shard for shard in shard_files(shards) if not _is_stored(shard, out)]:
        rejected: list[dict[str, str]] = []
        with local_files([shard], out) as files:
            samples = shard_samples(files[shard])
            total += len(samples)

            def kept(
                shard: Path = shard,
                file: Path = files[shard],
                samples: list[ShardSample] = samples,
                rejected: list[dict[str, str]] = rejected,
                total: int = total,
            ) -> Iterator[tuple[str, Members]]:
                nonlocal done
                for sample, stored in _stored(file, samples, address, num_threads, decode_seconds):
                    done += 1
                    progress(done, total)
                    if isinstance(stored, str):
                        rejected.append({"where": f"{shard}: {sample.key}", "reason": stored})
                    else:
                        yield sample.key, stored

            with whole_file(out / shard.name) as partial:
                write_members(partial, kept())
                if rejected:
                    with (out / REJECTED_FILE).open("a", encoding="utf-8") as ledger:
                        ledger.writelines(json_text(line) + "\n" for line in rejected)


def _is_stored(shard: Path, out: Path) -> bool:
    target = out / shard.name
    source = shard if shard.is_file() else shard.parent / SHARD_LIST  # of a remote shard: by the list
    return target.is_file() and target.stat().st_mtime_ns >= source.stat().st_mtime_ns


def _stored(
    shard: Path, samples: list[ShardSample], address: str, num_threads: int, decode_seconds: float
) -> Iterator[tuple[ShardSample, Members | str]]:
    """Each sample with its new members, or with the reason why it has none; a few at a time, in order."""
    own = threading.local()

    def store(sample: ShardSample) -> Members | str:
        if not hasattr(own, "decoder"):
            own.decoder = Decoder(address, decode_seconds)
        try:
            if sample.rejection is not None:
                raise SampleError(sample.rejection)
            data = read_parts(shard, sample.parts)
            return own.decoder.store(data.pop(CONVERSATION_PART, b""), data)
        except SampleError as error:
            return str(error)

    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="store")
    try:
        for first in range(0, len(samples), 4 * num_threads):
            window = samples[first : first + 4 * num_threads]
            yield from zip(window, pool.map(store, window), strict=True)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
