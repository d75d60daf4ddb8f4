"""Test your data and model before a run, and say whether the run may start, with reasons.

The command decodes samples drawn at random in the decode sandbox. It compares the supervised text with what the
assistant says, and divides a step over every possible number of ranks. Then it runs the model: each sample must have
the same loss and gradients packed and alone, and the loss that transformers' own forward pass gives. With
data.share_prefix=true samples of the first step that share a prefix are compared with themselves alone, too. The recipe
must have an index: run `vl3train index` first.

examples:
  vl3train verify stage=1 model=debug data=demo machine=cpu
  vl3train verify stage=3 model=2b stage.init_from=runs/2b/2_alignment --samples 500 --no-model
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from rich.console import Console
from rich.text import Text

from vl3train.cli.arguments import count
from vl3train.config.load import add_config_arguments
from vl3train.preview.check_config import opened
from vl3train.preview.step_samples import decoding
from vl3train.preview.verify_data import (
    REASONS_SHOWN,
    Verdict,
    check_decoding,
    check_labels,
    check_splits,
    drawn_rows,
    first_family,
)
from vl3train.preview.verify_model import (
    check_family,
    check_packed,
    check_stock,
    fitting,
    packed_model,
)

MODEL_SAMPLES = 16


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of ``vl3train verify``."""
    add_config_arguments(parser)
    parser.add_argument(
        "--samples", type=count, default=64, metavar="N", help="samples drawn at random (default 64)"
    )
    parser.add_argument("--no-model", action="store_true", help="test the data only")


def main(args: Namespace) -> int:
    """Print the verdicts; returns 0 when all passed, else 1."""
    from vl3train.data.render.chat_tokens import ChatTokenizer

    console = Console(highlight=False, soft_wrap=True)
    verdicts: list[Verdict] = []

    def show(verdict: Verdict) -> None:
        verdicts.append(verdict)
        word, style = ("passed", "green") if verdict.passed else ("FAILED", "bold red")
        console.print(Text.assemble((word, style), f"  {verdict.name}: {verdict.found}"))
        for reason in verdict.reasons[:REASONS_SHOWN]:
            console.print(Text(f"        {reason}"))
        if len(verdict.reasons) > REASONS_SHOWN:
            console.print(f"        and {len(verdict.reasons) - REASONS_SHOWN} more")

    with opened(args) as (cfg, data):
        tokenizer = ChatTokenizer.from_folder(data.tokenizer_dir)
        rows = drawn_rows(data, args.samples, cfg.run.seed)
        with decoding(data) as decoder:
            decoded, samples = check_decoding(data, rows, decoder)
            family = first_family(data, decoder)
        show(decoded)
        show(check_labels(data, samples, tokenizer))
        show(check_splits(data))
        if not args.no_model:
            limits = (cfg.step.max_tokens, cfg.step.max_patches)
            chosen = fitting(list(samples.values())[:MODEL_SAMPLES], limits)
            model = packed_model(cfg, data.tokenizer_dir)
            show(check_packed(model, chosen))
            if len(family) > 1:
                show(check_family(model, family))
            show(check_stock(model, chosen))
    failed = [verdict.name for verdict in verdicts if not verdict.passed]
    summary = f"do not start this run yet: {', '.join(failed)} failed" if failed else "this run may start"
    console.print(Text(summary, style="bold red" if failed else "bold green"))
    return int(bool(failed))
