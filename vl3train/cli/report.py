"""Draw the loss curves, the accuracies against chance and sample predictions of runs on one page.

Writes loss_curves.png, accuracy.png and report.html, which holds everything it shows and opens without a
network. A report that is there already is replaced.

examples:
  vl3train report runs/1 runs/2 runs/3 runs/4 --out report
  vl3train report runs/1 runs/2 --out report --answers answers.jsonl --expected expected.jsonl

answers.jsonl is what `vl3train generate --batch` wrote. Line for line, expected.jsonl says what is right:
  {"source": "count", "key": "0001", "answer": "3"}
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vl3train.report.run_log import milestones, read_run, read_samples


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``vl3train report``."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="output folders, in the order they were trained"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--answers", metavar="JSONL", help="answers to show beside their pictures")
    parser.add_argument("--expected", metavar="JSONL", help="the right answers, line for line")


def main(args: argparse.Namespace) -> int:
    """Read the logs, draw, write the page, and return 0.

    Raises ValueError naming everything that is missing or wrong in what is to be read.
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

    from vl3train.report.figures import draw_accuracies, draw_losses
    from vl3train.report.page import write_page

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    reached = milestones(runs)
    figures = {"loss_curves": {dark: draw_losses(runs, dark=dark) for dark in (False, True)}}
    if reached:
        figures["accuracy"] = {dark: draw_accuracies(reached, dark=dark) for dark in (False, True)}
    for name, of_theme in figures.items():
        (out / f"{name}.png").write_bytes(of_theme[False])
    write_page(out / "report.html", runs, reached, figures, samples)
    written = ", ".join([*(f"{name}.png" for name in figures), "report.html"])
    print(
        f"wrote {written} to {out}" + ("" if reached else "; no run was evaluated, so no accuracy is drawn")
    )
    return 0
