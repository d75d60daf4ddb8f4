"""Make one page of runs: losses, held-out figures, speed, and answers step by step with their pictures.

The command writes report.html, a page that needs no other file, no network and no server. It replaces an earlier
report. A run that started from another one of them is drawn behind it, runs of the same start over each other.

examples:
  vl3train report runs/1 runs/2 runs/3 runs/4 --out report
  vl3train report runs/1 runs/2 --out report --answers answers.jsonl --expected expected.jsonl

`vl3train generate --batch` writes answers.jsonl. expected.jsonl has the right answer to each of its lines, in order:
  {"source": "count", "key": "0001", "answer": "3"}
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vl3train.report.run_log import read_run, read_samples


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``vl3train report``."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folders of runs")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--answers", metavar="JSONL", help="answers to show, with their pictures")
    parser.add_argument("--expected", metavar="JSONL", help="the right answers, one line for each answer")


def main(args: argparse.Namespace) -> int:
    """Read the logs, draw the figures, write the page; returns 0.

    Raises ValueError that names everything that is missing or wrong in the files to read.
    """
    problems: list[str] = []
    runs = [run for folder in args.runs if (run := read_run(Path(folder), problems)) is not None]
    if (args.answers is None) != (args.expected is None):
        problems.append("--answers and --expected go together")
    samples = []
    if args.answers is not None and args.expected is not None:
        samples = read_samples(Path(args.answers), Path(args.expected), problems)
    if problems:
        raise ValueError("\n".join(problems))

    from vl3train.report.make import make_report

    print(f"wrote {make_report(runs, Path(args.out), samples)}")
    return 0
