"""The inner side of the decode sandbox: the decode server, and the decode processes that it forks."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import mmap
import os
import signal
import socket
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vl3train.contracts.records import RenderedSample, RenderSettings, SampleError, SampleLengths
from vl3train.contracts.tokens import PATCH_VALUES
from vl3train.data.media.clips import DecodeLimits
from vl3train.data.render.chat_tokens import ChatTokenizer
from vl3train.data.render.families import FamilyRecord, render_family
from vl3train.data.render.samples import Seen, measure_sample, render_sample
from vl3train.data.render.visual_items import check_media, store_sample

OUT_OF_MEMORY_FIRST = "1000"
"""oom_score_adj of decode processes: where memory runs out, the kernel ends one of these, not the training."""


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of /usr/include/malloc.h."""
KEPT_BYTES = 256 * 2**20


class Mailbox:
    """Memory that two processes share, for the bytes that belong to their messages.

    A socket would copy them four times, and wake both sides for each piece. Either side may make it larger.
    """

    def __init__(self, number: int) -> None:
        """``number``: of an open file of some bytes; it stays open."""
        self._number = number
        self._memory = mmap.mmap(number, 0)

    def put(self, parts: Mapping[str, bytes]) -> dict[str, int]:
        """Put them in one after the other; their sizes are what ``take`` wants."""
        sizes = {name: len(data) for name, data in parts.items()}
        if (total := sum(sizes.values())) > len(self._memory):
            os.ftruncate(self._number, total)
            self._memory = mmap.mmap(self._number, 0)
        for data, end in zip(parts.values(), accumulate(sizes.values()), strict=True):
            self._memory[end - len(data) : end] = data
        return sizes

    def take(self, sizes: Mapping[str, int]) -> dict[str, bytes]:
        """What the other side has put."""
        if sum(sizes.values()) > len(self._memory):
            self._memory = mmap.mmap(self._number, 0)
        ends = accumulate(sizes.values())
        return {
            name: self._memory[end - size : end]
            for (name, size), end in zip(sizes.items(), ends, strict=True)
        }


@dataclass(frozen=True, slots=True)
class Request:
    """What a decode process shall do. Requests are pickled; answers never are."""

    conversation: bytes
    sizes: dict[str, int]  # of its parts, one after the other in the mailbox
    seconds: float
    others: tuple[FamilyRecord, ...] = ()  # more records of the same media
    planned: SampleLengths | None = None  # to render by; None: measure it
    unplanned: bool = False  # render it, whatever lengths it has
    first_patch: int = 0  # where in the shared memory its patches go
    store: bool = False  # turn its clips into stored frames
    decode: bool = False  # where it is measured or checked: decode every image and clip whole
    check: bool = False  # check its media, and render nothing


def keep_freed_memory() -> None:
    """Let malloc keep the megabytes of a picture for the next one: page faults took a quarter of the time.

    For this process and those it forks. Only glibc has the call.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, KEPT_BYTES // 8)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def serve(
    address: str,
    parent: Connection,
    settings: RenderSettings,
    tokenizer_dir: Path | None,
    limits: DecodeLimits,
) -> None:
    """Fork a decode process for each connection, until the parent is gone. One thread: forking is safe."""
    os.setpgid(0, 0)  # Ctrl-C is the parent's, and the group can be ended as one
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a queue sends it to all; the parent saves first
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    torch.set_num_threads(1)
    keep_freed_memory()
    tokenizer = None if tokenizer_dir is None else ChatTokenizer.from_folder(tokenizer_dir)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen(256)
        parent.send_bytes(b"listening")
        while parent not in wait([listening, parent]):
            connected, _ = listening.accept()
            with connected:
                if os.fork() == 0:
                    listening.close()
                    parent.close()
                    _decode(connected, settings, tokenizer, limits)
    os.killpg(0, signal.SIGKILL)  # itself too


def _decode(
    connected: socket.socket,
    settings: RenderSettings,
    tokenizer: ChatTokenizer | None,
    limits: DecodeLimits,
) -> None:
    """A decode process: answer requests until the client is gone. Does not return."""
    status = 1
    try:
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
            score.write(OUT_OF_MEMORY_FIRST)
        _, (memory, mail), _, _ = socket.recv_fds(connected, 1, 2)
        space = np.frombuffer(mmap.mmap(memory, 0), np.uint8)
        mailbox = Mailbox(mail)
        connection = Connection(connected.detach())
        connection.send_bytes(str(os.getpid()).encode())
        while True:
            request = connection.recv()
            # If the client is gone, only the kernel can end a decoder that hangs.
            signal.setitimer(signal.ITIMER_REAL, 2 * request.seconds + 1)
            parts = mailbox.take(request.sizes)
            answer, content = _answer(request, parts, space, settings, tokenizer, limits)
            answer["content"] = mailbox.put({"": content})[""]
            connection.send_bytes(json.dumps(answer).encode())
            signal.setitimer(signal.ITIMER_REAL, 0)
    except (EOFError, ConnectionError):
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)  # not through what the server would do at its end


def _answer(
    request: Request,
    parts: Mapping[str, bytes],
    space: np.ndarray,
    settings: RenderSettings,
    tokenizer: ChatTokenizer | None,
    limits: DecodeLimits,
) -> tuple[dict[str, Any], bytes]:
    planned = request.planned
    try:
        if request.check:
            found = check_media(request.conversation, parts, settings, limits, decode=request.decode)
            return {"remarks": found}, b""
        if request.store:
            members = store_sample(request.conversation, parts, settings, limits)
            names, sizes = list(members), [len(data) for data in members.values()]
            return {"names": names, "sizes": sizes}, b"".join(members.values())
        assert tokenizer is not None, "a server without a tokenizer renders nothing"
        if request.unplanned:
            return _rendered_unplanned(request, parts, settings, tokenizer, limits)
        if planned is None:
            return {"records": _measured(request, parts, settings, tokenizer, limits)}, b""
        start = request.first_patch * PATCH_VALUES
        sample, texts = render_family(
            FamilyRecord(request.conversation, parts, planned),
            request.others,
            settings,
            tokenizer,
            limits,
            space=space[start : start + planned.num_patches * PATCH_VALUES].reshape(-1, PATCH_VALUES),
        )
    except SampleError as error:
        return {"rejected": str(error)}, b""
    except Exception:
        return {"bug": traceback.format_exc()}, b""
    more = [array.tobytes() for text in texts for array in (text.input_ids, text.labels)]
    return {}, b"".join((_joined(sample), *more))


def _measured(
    request: Request,
    parts: Mapping[str, bytes],
    settings: RenderSettings,
    tokenizer: ChatTokenizer,
    limits: DecodeLimits,
) -> list[dict[str, Any]]:
    """Of each record of the same media its lengths and remarks, or why it is rejected. Media are decoded once."""
    found: list[dict[str, Any]] = []
    seen: Seen = {}
    for conversation in (request.conversation, *(other.conversation for other in request.others)):
        remarks: set[str] = set()
        try:
            lengths = measure_sample(
                conversation,
                parts,
                settings,
                tokenizer,
                limits,
                decode=request.decode,
                remarks=remarks,
                seen=seen,
            )
        except SampleError as error:
            found.append({"rejected": str(error)})
        else:
            found.append({**dataclasses.asdict(lengths), "remarks": sorted(remarks)})
    return found


def _rendered_unplanned(
    request: Request,
    parts: Mapping[str, bytes],
    settings: RenderSettings,
    tokenizer: ChatTokenizer,
    limits: DecodeLimits,
) -> tuple[dict[str, Any], bytes]:
    """The sample's sizes; its numbers, and behind them its patches."""
    sample = render_sample(request.conversation, parts, settings, tokenizer, limits, key="", planned=None)
    sizes = {
        "num_tokens": len(sample.input_ids),
        "num_placed": len(sample.placeholder_positions),
        "grids": sample.grids.tolist(),
        "merge_sizes": sample.merge_sizes.tolist(),
    }
    return sizes, _joined(sample) + sample.patches.tobytes()


def _joined(sample: RenderedSample) -> bytes:
    arrays = (sample.input_ids, sample.labels, sample.placeholder_positions, sample.keep_mask)
    return np.concatenate([array.astype(np.int64) for array in arrays]).tobytes()
