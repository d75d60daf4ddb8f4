"""Ask a trained model about images, videos and text. Answers are greedy unless you give a temperature.

examples:
  vl3train generate --model runs/stage4 --image cat.jpg --prompt "What is this?"
  vl3train generate --model export --image a.png --image b.png --prompt "What changed?"
  vl3train generate --model export --video clip.mp4 --fps 2 --prompt "What happens?"
  vl3train generate --model export --batch requests.jsonl --out answers.jsonl

A line of requests.jsonl (only prompt is required):
  {"prompt": "How many?", "image": "a.jpg", "video": ["b.mp4", "c.mp4"], "system": "Be brief."}
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vl3train.config.choices import FrameSampling
from vl3train.inference.requests import parse_request, read_requests

if TYPE_CHECKING:
    from vl3train.inference.requests import Request


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``vl3train generate``."""
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="an export, a run folder or a checkpoint"
    )
    parser.add_argument("--prompt", help="the question")
    parser.add_argument(
        "--image", nargs="+", action="extend", default=[], metavar="FILE", help="one or several files"
    )
    parser.add_argument(
        "--video", nargs="+", action="extend", default=[], metavar="FILE", help="one or several files"
    )
    parser.add_argument("--system", help="a system turn before the question")
    parser.add_argument("--batch", metavar="JSONL", help="file of many requests, one on each line")
    parser.add_argument("--out", metavar="JSONL", help="file for the answers to --batch; must not exist")
    parser.add_argument(
        "--media-root",
        default=".",
        metavar="DIR",
        help="folder of relative paths in --batch (default .)",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, help="longest answer (default %(default)s)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default 0)")
    parser.add_argument(
        "--fps", type=float, help="frames sampled from each second of a video (default: as in training)"
    )
    parser.add_argument(
        "--frame-sampling",
        choices=[one.value for one in FrameSampling],
        help="the training's data.frame_sampling; an export does not say it (default: a run's own, else transformers)",
    )
    parser.add_argument("--max-frames", type=int, help="most frames of a video (default: as in training)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is a GPU)")


def main(args: argparse.Namespace) -> int:
    """Answer one request, or a file of them; returns 0.

    Raises ValueError naming everything that is wrong with the requests, before the first is answered.
    """
    requests = requests_of(args)
    if args.out is not None and Path(args.out).exists():
        raise FileExistsError(f"{args.out} exists; nothing was written. Give another file or remove that one")

    from vl3train.inference.answer import Asker, write_answers

    asker = Asker.load(
        args.model,
        device=args.device,
        fps=args.fps,
        frame_sampling=args.frame_sampling,
        max_frames=args.max_frames,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
    )
    problems = [where + problem for where, request in requests for problem in asker.problems(request)]
    if problems:
        raise ValueError("\n".join(problems))
    if args.batch is None:
        (answer,) = asker.answers([requests[0][1]], lambda piece: print(piece, end="", flush=True))
        print("" if answer else "(empty answer)")
        return 0
    for done in write_answers(asker, [request for _, request in requests], Path(args.out)):
        print(f"{done} of {len(requests)} answered", file=sys.stderr)
    return 0


def requests_of(args: argparse.Namespace) -> list[tuple[str, Request]]:
    """The requests that the options make, each with its place in the file.

    Raises ValueError naming every mistake at once.
    """
    if args.batch is not None:
        if args.prompt is not None or args.image or args.video or args.system:
            raise ValueError(
                "--batch has its own prompts and media; leave --prompt, --image, --video and --system out"
            )
        if args.out is None:
            raise ValueError("--batch needs --out FILE for the answers")
        return read_requests(Path(args.batch), Path(args.media_root))
    if args.prompt is None:
        raise ValueError("give --prompt, or --batch FILE with many requests")
    if args.out is not None:
        raise ValueError("--out belongs to --batch; a single answer is printed")
    fields = {"prompt": args.prompt, "image": args.image, "video": args.video, "system": args.system}
    request, problems = parse_request(fields, Path("."))
    if request is None:
        raise ValueError("\n".join(problems))
    return [("", request)]
