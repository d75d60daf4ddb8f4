"""The decode sandbox: a file of unknown origin is decoded in a process of its own, which is killed at a time limit.

One *decode server* for each rank has everything loaded. It forks a *decode process* for each client: a loader's worker
or a thread of the index pass. A decode process gets bytes and returns numbers. It opens no file, and its answers are
never unpickled. When it crashes, runs out of memory or takes longer than ``data.decode_seconds``, it ends alone. A hung
native decoder ignores Python signal handlers, so it is killed with SIGKILL.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import socket
import uuid
import weakref
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from vl3train.contracts.records import RenderedSample, RenderSettings, SampleError, SampleLengths
from vl3train.contracts.tokens import PATCH_VALUES
from vl3train.data.media.clips import DecodeLimits
from vl3train.data.render.answers import read_measured, read_sample
from vl3train.data.render.decode_server import Mailbox, Request, serve
from vl3train.data.render.families import FamilyRecord, cut_family
from vl3train.data.render.processes import clean_processes, folder_of_sockets, nameless_file

MAILBOX_BYTES = 2**20
"""To begin with; it grows to the largest sample."""


class DecodeServer:
    """A running decode server, as the process that started it sees it. ``address`` is for everybody."""

    def __init__(self, settings: RenderSettings, tokenizer_dir: Path | None, limits: DecodeLimits) -> None:
        # Nobody else can enter this folder, and connect.
        self.address = os.path.join(folder_of_sockets(), f"decode-{uuid.uuid4().hex[:8]}")
        processes = clean_processes()
        ours, theirs = processes.Pipe()
        process = processes.Process(
            target=serve, args=(self.address, theirs, settings, tokenizer_dir, limits), daemon=True
        )
        process.start()
        theirs.close()
        # Also when nobody calls close(), and before multiprocessing waits for its processes at exit.
        self.close = weakref.finalize(self, _end_server, ours, process, self.address)
        try:
            ours.recv_bytes()  # it listens
        except EOFError:
            self.close()
            raise RuntimeError("the decode server did not start; its error is printed above") from None


def _end_server(ours: Connection, process: BaseProcess, address: str) -> None:
    ours.close()
    process.join(5.0)
    if process.is_alive():
        process.kill()
        process.join()
    with contextlib.suppress(FileNotFoundError):  # it did not start
        os.unlink(address)


@contextlib.contextmanager
def decode_server(
    settings: RenderSettings, tokenizer_dir: Path | None, limits: DecodeLimits
) -> Iterator[str]:
    """The address of a decode server that runs as long as the ``with`` block; without a tokenizer it only checks."""
    server = DecodeServer(settings, tokenizer_dir, limits)
    try:
        yield server.address
    finally:
        server.close()


class Decoder:
    """A client of one decode process. Not for use by several threads at a time."""

    def __init__(self, address: str, seconds: float, num_patches: int = 0) -> None:
        """Connect.

        Args:
            address: of a decode server.
            seconds: wall-clock limit of one sample.
            num_patches: most patches that one pack holds; ``render`` writes them into shared memory.
        """
        self._address, self._seconds = address, seconds
        self._memory = nameless_file(max(1, num_patches * PATCH_VALUES))
        self._space = np.frombuffer(mmap.mmap(self._memory.fileno(), 0), np.uint8)
        self._mail = nameless_file(MAILBOX_BYTES)
        self._mailbox = Mailbox(self._mail.fileno())
        self._connection: Connection | None = None
        self._pid = 0

    def measure(
        self,
        conversation: bytes,
        parts: Mapping[str, bytes],
        *,
        decode: bool = False,
        remarks: set[str] | None = None,
    ) -> SampleLengths:
        """``samples.measure_sample`` in the decode process.

        Raises:
            SampleError: as there; or it took too long, or the process died of it.
        """
        (found,) = self.measure_records([conversation], parts, decode=decode)
        if isinstance(found, SampleError):
            raise found
        lengths, noted = found
        if remarks is not None:
            remarks.update(noted)
        return lengths

    def measure_records(
        self, conversations: Sequence[bytes], parts: Mapping[str, bytes], *, decode: bool
    ) -> list[tuple[SampleLengths, list[str]] | SampleError]:
        """``samples.measure_sample`` of each record of the same media, which are decoded once: lengths and remarks.

        Raises:
            SampleError: they took too long, or the process died of them.
        """
        others = tuple(FamilyRecord(conversation, {}) for conversation in conversations[1:])
        answer, _ = self._request(parts, conversations[0], others=others, decode=decode)
        return [read_measured(found) for found in answer["records"]]

    def check(self, conversation: bytes, parts: Mapping[str, bytes], *, decode: bool) -> list[str]:
        """``visual_items.check_media`` in the decode process: its remarks.

        Raises:
            SampleError: as there; or it took too long, or the process died of it.
        """
        answer, _ = self._request(parts, conversation, check=True, decode=decode)
        return list(answer["remarks"])

    def store(self, conversation: bytes, parts: Mapping[str, bytes]) -> dict[str, bytes]:
        """``visual_items.store_sample`` in the decode process.

        Raises:
            SampleError: as there; or it took too long, or the process died of it.
        """
        answer, content = self._request(parts, conversation, store=True)
        ends = np.cumsum(answer["sizes"]).tolist()
        return {
            name: content[end - size : end]
            for name, size, end in zip(answer["names"], answer["sizes"], ends, strict=True)
        }

    def render(
        self,
        conversation: bytes,
        parts: Mapping[str, bytes],
        planned: SampleLengths,
        *,
        key: str,
        source: int,
        first_patch: int = 0,
    ) -> RenderedSample:
        """``samples.render_sample`` in the decode process. Its patches are a view of memory that the next pack reuses.

        Args:
            first_patch: where in that memory they are put.

        Raises:
            SampleError: as there; or it took too long, or the process died of it.
        """
        first = FamilyRecord(conversation, parts, planned)
        return self.render_family(first, (), keys=[key], source=source, first_patch=first_patch)[0]

    def render_family(
        self,
        first: FamilyRecord,
        others: Sequence[FamilyRecord],
        *,
        keys: Sequence[str],
        source: int,
        first_patch: int = 0,
    ) -> list[RenderedSample]:
        """Records of the same media as a prefix and their branches; one record alone as ``render`` has it.

        Args:
            first: the record whose parts have their bytes, with its plan.
            others: records whose media have none, with theirs.
            keys: of all of them.
            source: of all of them.
            first_patch: as for ``render``.

        Raises:
            SampleError: as ``render``, for any of them.
        """
        planned = first.planned
        assert planned is not None, "what is rendered for a pack was measured"
        _, content = self._request(
            first.parts, first.conversation, others=tuple(others), planned=planned, first_patch=first_patch
        )
        start = first_patch * PATCH_VALUES
        lengths = [other.planned.num_tokens for other in others if other.planned is not None]
        end = len(content) - 2 * sum(lengths) * np.dtype(np.int64).itemsize
        sample = read_sample(
            content[:end],
            key=keys[0],
            source=source,
            num_tokens=planned.num_tokens,
            num_placed=planned.num_visual_tokens,
            patches=self._space[start : start + planned.num_patches * PATCH_VALUES].reshape(-1, PATCH_VALUES),
            grids=np.array(planned.grids, np.int64).reshape(-1, 3),
            merge_sizes=np.array(planned.merge_sizes, np.int64),
        )
        if not others:
            return [sample]
        texts = np.split(np.frombuffer(content[end:], np.int64), np.cumsum(np.repeat(lengths, 2))[:-1])
        return cut_family(
            sample, list(zip(texts[::2], texts[1::2], strict=True)), keys, planned.prefix_tokens
        )

    def render_unplanned(
        self, conversation: bytes, parts: Mapping[str, bytes], *, key: str
    ) -> RenderedSample:
        """``samples.render_sample`` in the decode process, of a sample that nobody has measured: a question.

        Raises:
            SampleError: as there; or it took too long, or the process died of it.
        """
        answer, content = self._request(parts, conversation, unplanned=True)
        grids = np.array(answer["grids"], np.int64).reshape(-1, 3)
        patches = np.frombuffer(content, np.uint8)[len(content) - int(grids.prod(1).sum()) * PATCH_VALUES :]
        return read_sample(
            content[: len(content) - len(patches)],
            key=key,
            source=0,
            num_tokens=answer["num_tokens"],
            num_placed=answer["num_placed"],
            patches=patches.reshape(-1, PATCH_VALUES),
            grids=grids,
            merge_sizes=np.array(answer["merge_sizes"], np.int64),
        )

    def close(self) -> None:
        """Let the decode process end."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _request(
        self, parts: Mapping[str, bytes], conversation: bytes, **more: Any
    ) -> tuple[dict[str, Any], bytes]:
        try:
            answer, content = self._exchange(parts, conversation, **more)
        except (EOFError, OSError):  # another process may have used up the memory: try once more
            self.close()
            try:
                answer, content = self._exchange(parts, conversation, **more)
            except (EOFError, OSError):
                self.close()
                raise SampleError(
                    "the decode process died of it twice: a crash, or out of memory; leave the sample out, "
                    "or decode in fewer processes (data.num_workers)"
                ) from None
        if "rejected" in answer:
            raise SampleError(answer["rejected"])
        if "bug" in answer:
            raise RuntimeError(f"in the decode process:\n{answer['bug']}")
        return answer, content

    def _exchange(
        self, parts: Mapping[str, bytes], conversation: bytes, **more: Any
    ) -> tuple[dict[str, Any], bytes]:
        if self._connection is None:
            self._connect()
        assert self._connection is not None
        self._connection.send(Request(conversation, self._mailbox.put(parts), self._seconds, **more))
        if not self._connection.poll(self._seconds):
            os.kill(self._pid, signal.SIGKILL)
            self.close()
            raise SampleError(
                f"decoding took longer than data.decode_seconds={self._seconds:g} and was ended; raise that "
                "limit, or make the media smaller"
            )
        answer: dict[str, Any] = json.loads(self._connection.recv_bytes())
        return answer, self._mailbox.take({"": answer.pop("content")})[""]

    def _connect(self) -> None:
        with socket.socket(socket.AF_UNIX) as connected:
            try:
                connected.connect(self._address)
            except OSError as error:
                raise RuntimeError(
                    "the decode server is gone: the run is ending, or it was killed"
                ) from error
            socket.send_fds(connected, [b"m"], [self._memory.fileno(), self._mail.fileno()])
            self._connection = Connection(connected.detach())
        self._pid = int(self._connection.recv_bytes())
