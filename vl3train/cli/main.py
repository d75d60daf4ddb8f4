"""``vl3train COMMAND``: each command is a module with ``add_arguments(parser)`` and ``main(args) -> int``.

We import a module when its command is chosen, so that ``--help`` and ``check`` do not wait for torch.
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
    "demo": Command("vl3train.demo.command", "draw the images and videos of the demo, and make a tiny model"),
    "parts": Command(
        "vl3train.cli.parts", "make a small model's parts: a Llama as a Qwen2, and a new encoder"
    ),
    "options": Command("vl3train.cli.options", "list the options with type, default and meaning"),
    "shards": Command("vl3train.cli.make_shards", "write annotations and media into webdataset shards"),
    "index": Command("vl3train.cli.build_index", "measure every sample of a recipe once, before training"),
    "check": Command(
        "vl3train.cli.check", "show what a run would train, or everything that is wrong with its config"
    ),
    "plan": Command(
        "vl3train.cli.plan", "show the steps and packs of a run, with estimates of time and memory"
    ),
    "inspect": Command(
        "vl3train.cli.inspect", "show one step of a run: samples, packs, ranks, pictures, text"
    ),
    "verify": Command("vl3train.cli.verify", "test your data and model before a run"),
    "checkpoint": Command(
        "vl3train.cli.checkpoint", "list a run's checkpoints: size, files, ranks, ZeRO stage; delete old ones"
    ),
    "verify-checkpoint": Command(
        "vl3train.cli.verify_checkpoint", "read checkpoints whole and name each damaged file"
    ),
    "calibrate": Command("vl3train.cli.calibrate", "measure what tokens and patches cost on this machine"),
    "finetune": Command("vl3train.cli.finetune", "from your records to a fine-tuned model, in one command"),
    "train": Command("vl3train.cli.train", "train one stage on all GPUs of this machine"),
    "evaluate": Command("vl3train.cli.evaluate", "compute loss and accuracy of a model on held-out samples"),
    "export": Command("vl3train.cli.export", "write a trained model as a Hugging Face folder"),
    "convert": Command(
        "vl3train.cli.convert", "turn the original code's checkpoints into Hugging Face form, and back"
    ),
    "generate": Command("vl3train.cli.generate", "ask a trained model about images, videos or text"),
    "serve": Command("vl3train.cli.serve", "answer OpenAI's chat API with a trained model"),
    "chat": Command("vl3train.cli.chat", "talk to one or two models in the browser, and see what they see"),
    "kernels": Command("vl3train.cli.kernels", "show this machine's kernels, and compare them with float64"),
    "warm": Command(
        "vl3train.cli.warm", "fill a node's caches ahead of a job: compiled code, kernels, index"
    ),
    "report": Command("vl3train.cli.report", "make one page of runs: loss, accuracy, sample answers"),
}

EXAMPLES = """examples:
  vl3train finetune my.jsonl --model VideoLLaMA3-2B
  vl3train shards my.jsonl --out data/mine --media-root media
  vl3train check stage=1 model=debug data=demo machine=cpu
  vl3train check stage=4 model=7b stage.init_from=runs/7b/3_multitask_finetuning machine.zero_stage=3
  vl3train train stage=2 model=2b stage.init_from=runs/2b/1_encoder_adaptation
  vl3train generate --model DIR --image a.jpg --prompt "What is this?"

Options are written as key=value; `vl3train options WORD` tells what they mean. `vl3train COMMAND --help` explains a
command. Set VL3TRAIN_TRACEBACK=1 to see where an error came from."""


def help_text() -> str:
    """What ``vl3train --help`` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.about}" for name, command in COMMANDS.items()]
    usage = (
        "usage: vl3train COMMAND [arguments]\n\nTrains VideoLLaMA3 through its four stages.\n\ncommands:\n"
    )
    return usage + "\n".join(lines) + "\n\n" + EXAMPLES


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code: 1 for an error that we foresaw, 2 for a wrong call, 130 for Ctrl-C."""
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
        hint = f"did you mean {likely[0]}?" if likely else f"the commands are {', '.join(COMMANDS)}"
        print(f"vl3train: no command {name}; {hint}", file=sys.stderr)
        return 2
    try:
        return run(name, arguments)
    except KeyboardInterrupt:
        print(f"\nvl3train {name}: stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("VL3TRAIN_TRACEBACK") or not is_foreseen(error):
            raise
        if not is_said_elsewhere(error):
            print(f"vl3train {name}: {error}", file=sys.stderr)
        return 1


def run(name: str, arguments: Sequence[str]) -> int:
    """Parse a command's arguments and run it."""
    module = import_module(COMMANDS[name].module)
    parser = ArgumentParser(
        prog=f"vl3train {name}", description=module.__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    module.add_arguments(parser)
    return int(module.main(parser.parse_intermixed_args(arguments)))


def is_foreseen(error: BaseException) -> bool:
    """Whether ``error`` is a message to the user: our own code raised it, or one of their files cannot be used.

    An OSError with a file name says what the system refused: no such file, no permission, not a folder. A ValueError
    from within a library is taken as a bug, and keeps its traceback, as does a RuntimeError that is no RunError.
    """
    if isinstance(error, RuntimeError):
        ranks = sys.modules.get("vl3train.engine.ranks")  # nothing else raises one; importing it costs torch
        return ranks is not None and isinstance(error, ranks.RunError)
    if isinstance(error, FileNotFoundError) or (isinstance(error, OSError) and error.filename is not None):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(PACKAGE)


def is_said_elsewhere(error: BaseException) -> bool:
    """Whether the first rank says the same: it is raised on every rank, unless it is of one."""
    ranks = sys.modules.get("vl3train.engine.ranks")
    of_all = (
        ranks is not None and isinstance(error, ranks.RunError) and not isinstance(error, ranks.OneRankError)
    )
    return of_all and os.environ.get("RANK", "0") != "0"


if __name__ == "__main__":
    sys.exit(main())
