"""What a decoding library raises becomes a rejected sample; what our own code raises stays a bug."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vl3train.contracts.records import SampleError


@contextmanager
def library_call(what: str, reason: Callable[[Exception], str] = str) -> Iterator[None]:
    """Turn whatever the calls in this block raise into a SampleError: ``{what} cannot be read: {reason}``.

    Decoders promise no class: damaged files made Pillow raise OSError, SyntaxError, struct.error, TypeError and
    AttributeError. So keep the block to the library's calls; an error of our own code in it would be hidden.

    Args:
        what: the medium, such as ``image of 812 bytes``.
        reason: what to say of an error.
    """
    try:
        yield
    except SampleError:
        raise
    except MemoryError as error:
        way_out = "make it smaller, or decode in fewer processes at a time (data.num_workers)"
        raise SampleError(f"{what} cannot be read: there is not enough memory for it; {way_out}") from error
    except Exception as error:
        said = reason(error) or type(error).__name__  # some are raised without a word
        way_out = "" if "; " in said else "; fetch it again, or save it again if a viewer shows it"
        raise SampleError(f"{what} cannot be read: {said}{way_out}") from error
