"""Media of records decoded before they become shards, in the decode sandbox, several at a time."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from vl3train.contracts.records import SampleError
from vl3train.data.media.clips import DecodeLimits
from vl3train.data.prepare.annotated_records import Found, medium_bytes
from vl3train.data.render.decode_client import Decoder, decode_server


@dataclass(frozen=True, slots=True)
class MediaCheck:
    """How media are decoded."""

    limits: DecodeLimits
    seconds: float  # wall-clock limit of one record
    num_workers: int


def check_media(
    records: Iterator[tuple[str, Found]], media_check: MediaCheck, remarks: Counter[str]
) -> Iterator[tuple[str, Found]]:
    """The same records in their order; one whose media cannot be decoded becomes its reason.

    ``remarks`` counts the records whose images are read, but odd or not as they are meant, by kind.
    """
    own, counting = threading.local(), threading.Lock()

    def check(found: Found) -> Found:
        if isinstance(found, str) or not found[1]:
            return found
        if not hasattr(own, "decoder"):
            own.decoder = Decoder(address, media_check.seconds)
        try:
            # Named by kind: a clip called .bin is a clip all the same.
            parts = {
                f"{number}.{medium.kind}": medium_bytes(medium) for number, medium in enumerate(found[1])
            }
            found_remarks = own.decoder.check(parts)
        except SampleError as error:
            number, colon, reason = str(error).partition(": ")
            place = number.partition(".")[0]
            named = colon and place.isdigit() and found[1][int(place)].path
            return f"{named}: {reason}" if named else str(error)
        with counting:
            remarks.update(found_remarks)
        return found

    with decode_server(None, None, media_check.limits) as address:
        pool = ThreadPoolExecutor(media_check.num_workers, thread_name_prefix="check")
        try:
            waiting: list[tuple[str, Future[Found]]] = []
            for where, found in records:
                waiting.append((where, pool.submit(check, found)))
                if len(waiting) >= 4 * media_check.num_workers:
                    first, future = waiting.pop(0)
                    yield first, future.result()
            for where, future in waiting:
                yield where, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # those at work end with the decode server
