"""List the options: what each takes, its default, its meaning. Words that other programs use lead to ours.

examples:
  vl3train options                       all of them, a line each
  vl3train options lr                    what sets the learning rate
  vl3train options adapter               a whole section
  vl3train options batch_size max_length
"""

from __future__ import annotations

import shutil
import textwrap
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator

from vl3train.config.input.meanings import Meaning, meanings
from vl3train.config.input.options import RENAMED, SECTIONS, suggest
from vl3train.config.input.other_words import by_other_words, like_other_words

WHERE = (
    "Any of them may be written as key=value in a command line, in a YAML file for --config, nested or with dots, and "
    "in a file of a group of your own (--config-dir). The command line wins over --config, and --config over groups."
)


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of ``vl3train options``."""
    parser.add_argument(
        "words",
        nargs="*",
        metavar="WORD",
        help="an option, a section, or any word: what another program calls it, or a word of its meaning",
    )


def main(args: Namespace) -> int:
    """Print the options that the words mean; returns 1 where a word means none."""
    width = min(120, shutil.get_terminal_size().columns)
    if not args.words:
        print("\n".join(short_list(width)))
        return 0
    missed = 0
    for word in args.words:
        found = matching(word)
        if found:
            print("\n\n".join(described(one, width) for one in found), end="\n\n")
        else:
            missed += 1
            print(f"{word}: no option has this word; {suggest(word)}\n")
    print(textwrap.fill(WHERE, width))
    return int(missed > 0)


def short_list(width: int) -> Iterator[str]:
    """Every option in one line with its default and what it takes, by sections."""
    for section, cls in SECTIONS.items():
        yield f"{section}: {' '.join((cls.__doc__ or '').split())}"
        for one in meanings().values():
            if one.key.startswith(f"{section}."):
                line = f"{one.key}={one.default} ({one.takes}): {one.meaning}"
                yield "  " + textwrap.shorten(line, width=width - 2, placeholder=" ...")
        yield ""
    yield textwrap.fill(f"`vl3train options WORD` tells the whole meaning. {WHERE}", width)


def matching(word: str) -> list[Meaning]:
    """The options that a word means: its full or last name, a section, another program's word, part of a meaning."""
    every = meanings()
    word = word.partition("=")[0].lstrip("-~").replace("-", "_")
    word = RENAMED.get(word, word)
    if word in every:
        return [every[word]]
    if word in SECTIONS:
        return [one for key, one in every.items() if key.startswith(f"{word}.")]
    owner, _, last = word.rpartition(".")
    if owner in every:  # an entry of a dict, as stage.learning_rates.projector
        return [every[owner]]
    named = [one for key, one in every.items() if key.partition(".")[2] == last.lower()]
    meant = [every[key] for key in by_other_words(last)]
    if named or meant:
        return list(dict.fromkeys([*named, *meant]))
    part_of = [one for key, one in every.items() if last.lower() in key]
    told = [one for one in every.values() if last.replace("_", " ").lower() in one.meaning.lower()]
    found = list(dict.fromkeys([*part_of, *told])) if len(last) > 2 else []
    return found or [every[key] for key in like_other_words(last)]


def described(one: Meaning, width: int) -> str:
    """An option with all that is known of it, over several lines."""
    lines = [one.key, f"  takes    {one.takes}", f"  default  {one.default}"]
    if one.set_by:
        lines.append(f"  set by   {', '.join(one.set_by)}")
    wrapped = (textwrap.wrap(line, width, subsequent_indent=" " * 11) for line in lines)
    meaning = textwrap.wrap(one.meaning, width, initial_indent="  ", subsequent_indent="  ")
    return "\n".join([*(line for part in wrapped for line in part), *meaning])
