"""Answer OpenAI's chat API with a trained model. Only this machine can reach the server unless you say otherwise.

examples:
  vl3train serve export
  vl3train serve runs/a runs/b --port 8001           two models; requests name theirs
  vl3train serve export --media-root clips           requests may name files below clips/
  vl3train serve export --host 0.0.0.0               for the network; there is no password

The address is http://127.0.0.1:8000/v1; docs/serving.md has examples in curl and Python.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from vl3train.cli.serving_options import add_serving_arguments, serve_models


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of ``vl3train serve``."""
    parser.add_argument(
        "models", nargs="+", type=Path, metavar="MODEL", help="a run, a checkpoint or an export"
    )
    add_serving_arguments(parser)


def main(args: Namespace) -> int:
    """Serve until Ctrl-C; returns 0. Raises ValueError or OSError for what cannot be served."""
    serve_models(args.models, args, with_page=False)
    return 0
