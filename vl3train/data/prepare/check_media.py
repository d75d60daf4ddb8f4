"""Media of records checked before they become shards, in the decode sandbox, several at a time."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from vl3train.contracts.records import RenderSettings, SampleError
from vl3train.data.media.clips import DecodeLimits
from vl3train.data.prepare.annotated_records import Found, medium_bytes
from vl3train.data.render.decode_client import Decoder, decode_server


@dataclass(frozen=True, slots=True)
class MediaCheck:
    """How media are checked."""

    settings: RenderSettings
    limits: DecodeLimits
    seconds: float  # wall-clock limit of one record
    num_workers: int
    decode: bool  # every image and clip whole; else only images whose files do not look whole


def check_media(
    records: Iterator[tuple[str, Found]], media_check: MediaCheck, remarks: Counter[str]
) -> Iterator[tuple[str, Found]]:
    """The same records in their order; one whose media are damaged becomes its reason.

    ``remarks`` counts the records whose images are read, but odd or not as they are meant, by kind.
    """
    own, counting = threading.local(), threading.Lock()

    def check(found: Found) -> Found:
        if isinstance(found, str) or not found[1]:
            return found
        if not hasattr(own, "decoder"):
            own.decoder = Decoder(address, media_check.seconds)
        conversation, media = found
        try:
            # Named by kind: a clip called .bin is a clip all the same.
            names = [f"{number}.{medium.kind}" for number, medium in enumerate(media)]
            parts = dict(zip(names, map(medium_bytes, media), strict=True))
            found_remarks = own.decoder.check(conversation.to_json(names), parts, decode=media_check.decode)
        except SampleError as error:
            number, colon, reason = str(error).partition(": ")
            place = number.partition(".")[0]
            named = colon and place.isdigit() and media[int(place)].path
            return f"{named}: {reason}" if named else str(error)
        with counting:
            remarks.update(found_remarks)
        return found

    with contextlib.ExitStack() as stack:
        address = ""
        pool = ThreadPoolExecutor(media_check.num_workers, thread_name_prefix="check")
        try:
            waiting: list[tuple[str, Future[Found]]] = []
            for where, found in records:
                if not address and not isinstance(found, str) and found[1]:  # it takes a second to start
                    server = decode_server(media_check.settings, None, media_check.limits)
                    address = stack.enter_context(server)
                waiting.append((where, pool.submit(check, found)))
                if len(waiting) >= 4 * media_check.num_workers:
                    first, future = waiting.pop(0)
                    yield first, future.result()
            for where, future in waiting:
                yield where, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # those at work end with the decode server
