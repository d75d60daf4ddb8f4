"""Fine-tuning on one GPU held to less memory: adapters, beside peft with Hugging Face's Trainer on the same samples.

    python -m benchmarks.finetune                      # every row, on a GPU of more memory than the row may have
    python -m benchmarks.finetune --rows qlora_7b      # some
    python -m benchmarks.finetune --debug              # two-layer models on the CPU; nothing is kept

A row runs in a process of its own that has ``gpu_gib`` of the GPU's memory. It trains adapters of rank 64 on all linear
layers of the language model, and nothing else: vl3train on packs, the Trainer on padded rows with each number of rows
a micro-batch that fits, of which the fastest counts. Both get the same samples in the same steps. Lines are appended to
benchmarks/results/finetune.jsonl (or $OUT) when a row is done.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.measure import child
from benchmarks.gpu.process import in_own_processes
from benchmarks.gpu.rows import Row, quick, tiny
from benchmarks.markdown import table_head, table_row
from benchmarks.one_gpu import results_folder, setting

TRAINS: dict[str, Any] = dict(lora=True, trains=(), steps=3, packs_a_step=2)
ROWS = {
    "qlora_7b": Row(**TRAINS, model="7b", base_4bit=True, max_tokens=8192, gpu_gib=23.0),
    "lora_7b": Row(**TRAINS, model="7b", max_tokens=16384, gpu_gib=39.0),
    "lora_2b": Row(**TRAINS, model="2b", max_tokens=16384, gpu_gib=15.0),
}
"""23, 39 and 15 GiB: what cards of 24, 40 and 16 GB leave to a process."""

ROWS_A_MICRO_BATCH = (1, 2, 4, 8)
"""Of the Trainer, until they do not fit or are slower than fewer."""

COLUMNS = (
    "tokens/s",
    "useful TFLOP/s",
    "ms a pack",
    "peak GiB",
    "reserved GiB",
    "of GiB",
    "Trainer",
    "ratio",
)


def main() -> None:
    """Run rows, append figures, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--debug", action="store_true", help="two-layer models on the CPU; nothing is kept")
    parser.add_argument("--quick", action="store_true", help="one timed step a row; nothing is kept")
    parser.add_argument("--alone", action="store_true", help="without the Trainer")
    parser.add_argument(
        "--set", nargs="*", default=[], type=setting, metavar="KEY=VALUE", help="change every row"
    )
    args = parser.parse_args()
    if not args.debug and not torch.cuda.is_available():
        parser.error("rows need a CUDA device, and there is none; --debug runs them small on the CPU")
    keep = not (args.quick or args.debug)
    table, ratios = [table_head("row", *COLUMNS, numbers=len(COLUMNS))], {}
    with (results_folder() / "finetune.jsonl" if keep else Path(os.devnull)).open(
        "a", encoding="utf-8"
    ) as file:
        for name in args.rows:
            row = replace(changed(ROWS[name], args), **dict(args.set))
            own = in_own_processes(child, name, row, args.debug)
            theirs = {} if args.alone else best_of_trainer(name, row, args.debug)
            if "failed" not in own and theirs.get("tokens_a_second"):
                ratios[name] = own["tokens_a_second"] / theirs["tokens_a_second"]
            lines = lines_of(name, row, own, theirs)
            table.append(shown(name, row, own, theirs, ratios.get(name)))
            if name == args.rows[-1] and ratios:
                lines.append(ratio_line(ratios))
            for line in lines:
                file.write(json.dumps({**line, **origin(args.debug)}) + "\n")
                file.flush()
                if not keep:
                    print(json.dumps(line), flush=True)
            print(table[-1], flush=True)
            if stopped := own.get("stopped") or theirs.get("stopped"):
                sys.exit(stopped)
    print("\n".join(table))


def changed(row: Row, args: argparse.Namespace) -> Row:
    """The row, smaller where the command line asks for it."""
    row = quick(row) if args.quick else row
    return replace(tiny(row), rank=8) if args.debug else row


def best_of_trainer(name: str, row: Row, tiny_model: bool) -> dict[str, Any]:
    """The Trainer's figures at its best number of rows a micro-batch, within the same memory; ``tried`` has all."""
    tried: dict[int, str] = {}
    best: dict[str, Any] = {}
    for rows in ROWS_A_MICRO_BATCH[: 2 if tiny_model else None]:
        of_trainer = replace(row, way="trainer", stock_rows=rows, liger=not tiny_model)
        found = in_own_processes(child, f"{name}_trainer_{rows}", of_trainer, tiny_model)
        if "tokens_a_second" not in found:
            tried[rows] = str(found.get("failed") or found.get("ended_early"))
            break  # more rows take more memory
        tried[rows] = f"{found['tokens_a_second']:.0f} tokens/s"
        if found["tokens_a_second"] > best.get("tokens_a_second", 0):
            best = {**found, "rows_a_micro_batch": rows}
        else:
            break  # rows of like length are padded more the more there are
        if "stopped" in found:
            break
    return {**best, "tried": tried}


def lines_of(name: str, row: Row, own: dict[str, Any], theirs: dict[str, Any]) -> list[dict[str, Any]]:
    """JSON lines of one row: its peak, and its rate beside the Trainer's."""
    peak = {"figure": f"{name}_peak_gib", "unit": "GiB", "better": "lower", "aim": row.gpu_gib}
    if "failed" in own:
        return [{**peak, "value": None, "failed": own["failed"]}]
    settings = {key: value for key, value in asdict(row).items() if key != "figures"}
    peak["note"] = f"allocated, in a process that has {row.gpu_gib} GiB; reserved {own['reserved_gib']} GiB"
    rate = {"unit": "tokens/s", "better": "higher"}
    found = [
        {**peak, "value": own["peak_gib"], "settings": settings, "more": own},
        {"figure": f"{name}_tokens_a_second", "value": own["tokens_a_second"], **rate},
    ]
    if theirs:
        line = {"figure": f"{name}_trainer_tokens_a_second", "value": theirs.get("tokens_a_second"), **rate}
        found.append({**line, "note": f"rows a micro-batch: {theirs['tried']}", "more": theirs})
    return found


def ratio_line(ratios: dict[str, float]) -> dict[str, Any]:
    """The smallest ratio of tokens a second, and all of them."""
    note = "the smallest of " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
    line = {"figure": "lora_ratio_to_trainer", "value": min(ratios.values()), "unit": "", "better": "higher"}
    return {**line, "aim": 3, "note": note}


def shown(name: str, row: Row, own: dict[str, Any], theirs: dict[str, Any], ratio: float | None) -> str:
    """One row of the Markdown table."""
    if "failed" in own:
        return table_row(name, own["failed"], *[""] * (len(COLUMNS) - 1))
    tried: dict[int, str] = theirs.get("tried", {})
    gib = ["" if own[key] is None else f"{own[key]:.1f}" for key in ("peak_gib", "reserved_gib")]
    return table_row(
        name,
        f"{own['tokens_a_second']:.0f}",
        f"{own['tflops']:.4g}",
        f"{own['seconds_a_pack'] * 1e3:.0f}",
        *gib,
        f"{row.gpu_gib:g}" if row.gpu_gib else "",
        f"{theirs['tokens_a_second']:.0f}" if "tokens_a_second" in theirs else "; ".join(tried.values()),
        "" if ratio is None else f"{ratio:.2f}",
    )


def origin(debug: bool) -> dict[str, Any]:
    """Machine, versions and command, for every line."""
    packages = ("torch", "transformers", "deepspeed", "peft", "bitsandbytes")
    command = f"python -m benchmarks.finetune {' '.join(sys.argv[1:])}".strip()
    machine = "CPU" if debug else torch.cuda.get_device_name()
    return {"machine": machine, "versions": {name: version(name) for name in packages}, "command": command}


if __name__ == "__main__":
    main()
