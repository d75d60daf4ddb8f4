"""``vl3train COMMAND``: each command is a module with ``add_arguments(parser)`` and ``main(args) -> int``.

A module is imported when its command is chosen, so that ``--help`` and ``check`` wait for no torch.
"""

from __future__ import annotations

import difflib
import os
import sys
import traceback
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import vl3train

PACKAGE = Path(vl3train.__file__).parent


class Command(NamedTuple):
    """Where a command lives, and one line on what it does."""

    module: str
    about: str


COMMANDS = {
    "demo": Command("vl3train.demo.command", "draw the demo's images and videos, and make a tiny model"),
    "shards": Command("vl3train.cli.make_shards", "write annotations and media into webdataset shards"),
    "index": Command("vl3train.cli.build_index", "measure every sample of a recipe, once, before training"),
    "check": Command("vl3train.cli.check", "show what a config would train, or everything wrong with it"),
    "plan": Command("vl3train.cli.plan", "show a run's steps, packs, lengths and estimates, from the index"),
    "inspect": Command("vl3train.cli.inspect", "show one step: its samples, packs, ranks, pictures and text"),
    "verify": Command(
        "vl3train.cli.verify", "try your data and model: packed equals alone, labels, decoding"
    ),
    "calibrate": Command("vl3train.cli.calibrate", "measure what the planner balances by, on this machine"),
    "train": Command("vl3train.cli.train", "train one stage, in as many processes as the machine has"),
    "evaluate": Command("vl3train.cli.evaluate", "measure a checkpoint on a recipe's held-out samples"),
    "export": Command("vl3train.cli.export", "write a run's model as a Hugging Face folder"),
    "generate": Command("vl3train.cli.generate", "ask a model about images, videos or text"),
    "kernels": Command("vl3train.cli.kernels", "compare this machine's attention kernels with float64"),
    "report": Command("vl3train.cli.report", "draw the curves and predictions of runs on one page"),
}

EXAMPLES = """examples:
  vl3train check stage=1 model=debug data=demo machine=cpu
  vl3train check stage=4 model=7b stage.init_from=runs/7b/3_multitask_finetuning machine.zero_stage=3
  torchrun --nproc-per-node 8 -m vl3train.train stage=2 stage.init_from=runs/2b/1_encoder_adaptation
  vl3train generate --model DIR --image a.jpg --prompt "What is this?"

`vl3train COMMAND --help` explains a command. VL3TRAIN_TRACEBACK=1 shows where an error came from."""


def help_text() -> str:
    """What ``vl3train --help`` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.about}" for name, command in COMMANDS.items()]
    usage = (
        "usage: vl3train COMMAND [arguments]\n\nTrains VideoLLaMA3 through its four stages.\n\ncommands:\n"
    )
    return usage + "\n".join(lines) + "\n\n" + EXAMPLES


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 1 for an error that was foreseen, 2 for a wrong call."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"vl3train {vl3train.__version__}")
        return 0
    name, *arguments = words
    if name not in COMMANDS:
        likely = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {likely[0]}?" if likely else f"there is {', '.join(COMMANDS)}"
        print(f"vl3train: no command {name}; {hint}", file=sys.stderr)
        return 2
    try:
        return run(name, arguments)
    except KeyboardInterrupt:
        print(f"\nvl3train {name}: stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if os.environ.get("VL3TRAIN_TRACEBACK") or not is_foreseen(error):
            raise
        print(f"vl3train {name}: {error}", file=sys.stderr)
        return 1


def run(name: str, arguments: Sequence[str]) -> int:
    """Parse a command's arguments and run it."""
    module = import_module(COMMANDS[name].module)
    parser = ArgumentParser(
        prog=f"vl3train {name}", description=module.__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    module.add_arguments(parser)
    return int(module.main(parser.parse_args(arguments)))


def is_foreseen(error: BaseException) -> bool:
    """Whether our own code raised ``error`` to say something to the user, or a file of theirs cannot be used.

    An OSError that names a file says what the system refused there: no such file, no permission, no folder.

    A ValueError from within a library is a bug until shown otherwise, and keeps its traceback.
    """
    if isinstance(error, FileNotFoundError) or (isinstance(error, OSError) and error.filename is not None):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(PACKAGE)


if __name__ == "__main__":
    sys.exit(main())
