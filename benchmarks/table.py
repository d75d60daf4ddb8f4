"""Makes benchmarks/README.md from benchmarks/results/*.jsonl: ``python benchmarks/table.py``; ``--check`` compares."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

AIMS = {
    "images_per_second_core": 120,
    "images_vs_hf_ratio": 4,
    "stored_frames_per_second_core": 500,
    "data_wait_share": 0.05,
    "useful_tflops_2b": 475,
    "useful_tflops_2b_train_command": 475,
    "useful_tflops_7b": 500,
    "useful_tflops_7b_train_command": 500,
    "ratio_to_stock_stage1": 7,
    "ratio_to_stock_stage1_as_shipped": 7,
    "useful_tflops_7b_lora": 450,
    "longest_pack_2b": 131072,
    "longest_pack_7b_lora": 65536,
    "deepspeed_overhead": 0.05,
    "data_wait_fraction_2b_train_command": 0.05,
    "data_wait_fraction_7b_train_command": 0.05,
    "host_syncs": 1,
}
"""Aims of figures whose line in the results has none."""

KNOWN = {"figure", "value", "unit", "better", "aim", "reached", "note", "machine", "versions", "command"}
LONG = {"settings", "more", "row"}
"""Keys that the page leaves out."""

ROWS_HEAD = (
    "| row | useful TFLOP/s a GPU | aim | ms a pack | tokens/s | patches/s | peak GiB | recompiles | steps | machine |",
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
)
IN_ROWS = ("peak_gib_", "tokens_a_pack_", "recompiles_", "graph_breaks_")
"""Figures that the table of rows already has. ``recompiles`` alone is a figure of its own."""

FOLDER = Path(__file__).resolve().parent
HEAD = """# Figures

`python benchmarks/table.py` makes this page from `results/*.jsonl`. The commands below wrote those files. Aims come
from the project's issues. A figure without an aim is there for comparison. `--quick` makes a short run that keeps
nothing; scripts that train have `--tiny` for that (two layers, on a CPU).

- [log.md](log.md) is the history: what was tried on GPUs, what was predicted, and what came out.
- `vl3train kernels --check` compares a machine's kernels with float64. `python -m benchmarks.profile` shows where the
  time of a step goes. [docs/numerics.md](../docs/numerics.md) explains the loss curves.

## How to read the GPU rows

Useful TFLOP/s are those of whole training steps on one GPU. Padding and recomputation do not count. vl3train runs
under DeepSpeed with clipping, transformers in plain PyTorch. [gpu/rows.py](gpu/rows.py) defines each row.

- `stock_...` is transformers on padded rows, and `..._no_cudnn` the same without cuDNN attention. `2b_position_ids...`
  is transformers on one packed row with position ids and liger. `7b_...` and `2b_...` without these words are
  vl3train.
- Rows with `gpu_gib=79.1` in their note ran on an H200 held to 79.1 GiB, the memory of an 80 GB card.
- The work that the last layer would do on unsupervised tokens does not count since round ten. It is 1.2 % of the 2B's
  work and 1.5 % of stage 1's. These rows are older and still count it: `stock_2b`, `stock_2b_no_cudnn`, `2b_given`,
  `2b_plain_loop`, `longest_2b`, `2b_liger`, `2b_torch_...`, `2b_states_on_gpu`, `2b_position_ids...`.
- `2b_position_ids...` (243 TFLOP/s), `2b_torch_...` and `2b_states_on_gpu` reused the same packs. The other rows had
  new packs in each step.
- The 2B's 471 is one card. By the count before round ten, that card gives 477, and three others gave 478, 475 and 461.
  `stock_2b` (74) and `stock_2b_no_cudnn` (99) ran on the card of 461. Stage 1 is 7.5 times transformers as shipped and
  5.4 times its best setting on one card, 6.8 and 5.2 times on another.
- Batches wait in memory, except in the rows `..._train_command`. These read JPEGs from shards, with W&B offline, and
  wait for the loader 0.03 % of the time (2B) and 0.01 % (7B).
- `deepspeed_overhead` is negative: a step under DeepSpeed is 0.8 % shorter than in a loop of plain PyTorch.
- Each row is of the code of its day. The note of a figure names the commit.

Recorded figures keep the words of their day: *states* and *means* are AdamW's moments (`states_on_host` is
`machine.offload_optimizer`), *products* are matrix products (`machine.gemm_backend`), *again* is recomputed, a
*rehearsal* is the kernel warm-up, and *firewall* and *walled* mean the decode sandbox. *Refused* samples are rejected
ones.
"""


def table() -> str:
    """The whole page: machine, command, versions and figures of each results file, GPU rows in their own table."""
    parts = [HEAD]
    for file in sorted((FOLDER / "results").glob("*.jsonl")):
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        figures, faults = [[line for line in lines if key in line] for key in ("figure", "fault")]
        first = next(line for line in figures if "versions" in line)
        versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
        command = first.get("command", f"python -m benchmarks.{file.stem}")
        parts += [f"\n## {file.stem}\n", f"`{command}` on {first['machine']}; {versions}.\n"]
        if rows := [line for line in figures if "seconds_a_pack" in line.get("more", {}) and _is_speed(line)]:
            parts += [*ROWS_HEAD, *map(_gpu_row, rows), ""]
            figures = [line for line in figures if not line["figure"].startswith(IN_ROWS)]
        parts += ["| figure | value | unit | better | aim | what |", "|---|---:|---|---|---|---|"]
        parts += [_row(line, first["machine"]) for line in figures]
        if faults:
            parts += [
                "\n### Planted faults\n",
                "| fault | samples | used | rejected | message |",
                "|---|---:|---:|---:|---|",
            ]
            parts += [
                f"| {line['fault']} | {line['samples']} | {line['used']} | {line['refused']} | {_cell(line['said'])} |"
                for line in faults
            ]
    return "\n".join(parts) + "\n"


def _is_speed(line: dict[str, Any]) -> bool:
    return line["figure"].removeprefix("useful_").startswith("tflops_")


def _gpu_row(line: dict[str, Any]) -> str:
    """A row of benchmarks/one_gpu.py in one line. The figures below say how it was measured."""
    name, more = line["figure"].removeprefix("useful_").removeprefix("tflops_"), line["more"]
    if line["figure"].startswith("useful_"):
        name = line["row"]  # the figure's name in the issue may leave out how it was measured
    peak, aim = more["peak_gib"], AIMS.get(line["figure"], "")
    gpus = f"{ranks} x " if (ranks := line.get("settings", {}).get("ranks", 1)) > 1 else ""
    return (
        f"| {name} | {line['value']:.4g} | {aim} | {more['seconds_a_pack'] * 1e3:,.0f} | "
        f"{more['tokens_a_second']:,.0f} | {more['patches_a_second']:,.0f} | "
        f"{'' if peak is None else f'{peak:.1f}'} | {more.get('recompiles', '')} | {len(more['step_seconds'])} | "
        f"{gpus}{line['machine'].removeprefix('NVIDIA ').partition(' ')[0]} |"
    )


def _row(line: dict[str, Any], machine: str) -> str:
    if line["value"] is None:
        return f"| {line['figure']} | none | | | | {_cell(line.get('failed', line.get('note', '')))} |"
    aim = line.get("aim", AIMS.get(line["figure"]))
    reached = ""
    if aim is not None:
        met = line["value"] <= aim if line["better"] == "lower" else line["value"] >= aim
        reached = f"{aim:g}, {'reached' if met else '**not reached**'}"
    more = [f"{key} {value}" for key, value in line.items() if key not in KNOWN | LONG]
    elsewhere = [f"on {line['machine']}"] if line.get("machine", machine) != machine else []
    what = _cell("; ".join([*elsewhere, *([line["note"]] if line.get("note") else []), *more]))
    return f"| {line['figure']} | {line['value']:,.4g} | {line['unit']} | {line['better']} | {reached} | {what} |"


def _cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def main() -> int:
    """Write the page; with ``--check`` only say whether it is up to date."""
    page = FOLDER / "README.md"
    if "--check" in sys.argv[1:]:
        current = page.exists() and page.read_text(encoding="utf-8") == table()
        print("up to date" if current else "out of date: run `python benchmarks/table.py`")
        return int(not current)
    page.write_text(table(), encoding="utf-8")
    print(f"wrote {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
