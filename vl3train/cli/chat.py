"""Talk to a trained model in the browser: upload pictures and clips, see which frames and tokens it sees.

examples:
  vl3train chat export
  vl3train chat runs/a runs/b                        two models side by side

Open the address that it prints. Only this machine can reach it unless you say otherwise. The page's server answers
OpenAI's chat API, too, as `vl3train serve` does.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from vl3train.cli.serving_options import add_serving_arguments, serve_models


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of ``vl3train chat``."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="a run, a checkpoint or an export")
    parser.add_argument("other", nargs="?", type=Path, metavar="MODEL2", help="another one, beside the first")
    add_serving_arguments(parser)


def main(args: Namespace) -> int:
    """Serve the page until Ctrl-C; returns 0. Raises ValueError or OSError for what cannot be served."""
    serve_models([args.model, *([args.other] if args.other else [])], args, with_page=True)
    return 0
