"""Words of the command line: numbers that are checked, options by a former name, the step to inspect."""

from __future__ import annotations

from argparse import SUPPRESS, Action, ArgumentParser, ArgumentTypeError
from typing import Any


class FormerName(Action):
    """An option by its former name: it ends the command with the name that the option has now.

    ``add_argument("--old", action=FormerName, now="--new")``; help does not list it.
    """

    def __init__(self, option_strings: list[str], dest: str, now: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=SUPPRESS, help=SUPPRESS)
        self.now = now

    def __call__(self, parser: ArgumentParser, *args: Any, option_string: str | None = None) -> None:
        """Print what the option is called now and exit with code 2."""
        parser.error(f"{option_string or args[-1]} was renamed to {self.now}")


def count(text: str) -> int:
    """A whole number of at least 1; ``1e9`` is one, too.

    >>> count("1e9")
    1000000000
    """
    try:
        number = int(float(text))
    except (ValueError, OverflowError) as error:
        raise ArgumentTypeError(f"{text!r} is not a whole number") from error
    if number < 1:
        raise ArgumentTypeError(f"{text} must be at least 1")
    return number


def positives(text: str) -> tuple[float, ...]:
    """Numbers above 0, with commas between them.

    >>> positives("1e-4,3e-4")
    (0.0001, 0.0003)
    """
    return tuple(positive(one) for one in text.split(","))


def positive(text: str) -> float:
    """A number above 0.

    >>> positive("1e-4")
    0.0001
    """
    try:
        number = float(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is not a number") from error
    if not 0 < number < float("inf"):
        raise ArgumentTypeError(f"{text} must be above 0")
    return number


def share(text: str) -> float:
    """A number above 0, at most 1.

    >>> share("0.5")
    0.5
    """
    try:
        number = float(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is not a number") from error
    if not 0 < number <= 1:
        raise ArgumentTypeError(f"{text} must be above 0 and at most 1")
    return number


def split_step(overrides: list[str]) -> tuple[list[str], int | None]:
    """Overrides without ``step=N``, and N. Here ``step`` is a step of the run, not the section of the config.

    >>> split_step(["stage=1", "step=12", "step.fill=0.9"])
    (['stage=1', 'step.fill=0.9'], 12)
    """
    numbers = [word[5:] for word in overrides if word.startswith("step=") and word[5:].isdigit()]
    rest = [word for word in overrides if not (word.startswith("step=") and word[5:].isdigit())]
    return rest, int(numbers[-1]) if numbers else None
