"""Numbers of the command line, refused where they mean nothing."""

from __future__ import annotations

from argparse import ArgumentTypeError


def count(text: str) -> int:
    """A whole number of at least 1; ``1e9`` is one, too.

    >>> count("1e9")
    1000000000
    """
    try:
        number = int(float(text))
    except (ValueError, OverflowError) as error:
        raise ArgumentTypeError(f"{text!r} is no whole number") from error
    if number < 1:
        raise ArgumentTypeError(f"{text} must be at least 1")
    return number


def share(text: str) -> float:
    """A number above 0, at most 1.

    >>> share("0.5")
    0.5
    """
    try:
        number = float(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is no number") from error
    if not 0 < number <= 1:
        raise ArgumentTypeError(f"{text} must be above 0 and at most 1")
    return number
