"""One GPU: useful work a second of real training steps, under the engine that users run.

    python -m benchmarks.one_gpu                       # every row
    python -m benchmarks.one_gpu --rows 2b stock_2b    # some of them
    python -m benchmarks.one_gpu --list

Each row is a process of its own: the model with random weights, four packs a step through vl3train's collate,
Zero and train_step (DeepSpeed ZeRO-1, float32 masters and states, clipping), one step to warm up, the others timed
by wall-clock. ``stock`` rows drive transformers' own forward over the same samples. Useful work is
vl3train.model.flops: padding, recomputation and the optimizer count nothing. One JSON line a figure goes to
benchmarks/results/one_gpu.jsonl (or $OUT), a Markdown table to the console.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import VideoLlama3Config, VideoLlama3ForConditionalGeneration

from benchmarks.packs import draw_packs, pack_batch
from vl3train.config.choices import AdapterKind, Dtype, Recompute
from vl3train.config.schema import AdapterConfig, MachineConfig, OptimConfig
from vl3train.engine.meter import measure_product
from vl3train.model.flops import flop_rates

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
ALL_PARTS = ("vision_encoder", "projector", "language_model")
PACKS_A_STEP = 4


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    model: str = "2b"
    attention: str = "auto"
    recompute_vision: str = "elementwise"
    recompute_language: str = "mlp"
    compile_layers: bool = True
    trains: tuple[str, ...] = ALL_PARTS
    image_merge_size: int = 2
    max_tokens: int = 16384
    lora: bool = False
    stock: bool = False
    stock_rows: int = 4  # samples a padded micro-batch
    steps: int = 4
    packs_a_step: int = PACKS_A_STEP
    figures: dict[str, str] = field(default_factory=dict)  # what the issue calls this row's figures


STAGE_1 = dict(trains=("vision_encoder", "projector"), image_merge_size=1)
ROWS: dict[str, Row] = {
    "2b": Row(figures={"tflops": "useful_tflops_2b", "peak_gib": "peak_gib_2b"}),
    "2b_eager": Row(compile_layers=False, recompute_vision="layer", recompute_language="layer"),
    "2b_torch_varlen": Row(attention="torch_varlen"),
    "2b_recompute_layer": Row(recompute_vision="layer", recompute_language="layer"),
    "2b_recompute_mlp": Row(recompute_vision="mlp", recompute_language="mlp"),
    "2b_elementwise": Row(recompute_vision="elementwise", recompute_language="elementwise"),
    "stock_2b": Row(stock=True, steps=2, packs_a_step=2),
    "stage1_2b": Row(**STAGE_1),
    "stock_stage1_2b": Row(**STAGE_1, stock=True, steps=2, packs_a_step=1),
    "7b_lora": Row(
        model="7b", lora=True, recompute_language="layer", figures={"tflops": "useful_tflops_7b_lora"}
    ),
    "longest_2b": Row(
        max_tokens=131072,
        recompute_vision="layer",
        recompute_language="layer",
        packs_a_step=1,
        steps=2,
        figures={"tokens_a_pack": "longest_pack_2b"},
    ),
}

TEXT = {
    "2b": (1536, 8960, 12, 2, 151936),
    "7b": (3584, 18944, 28, 4, 152064),
}
TEXT_KEYS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")


def build_model(size: str, device: torch.device) -> Any:
    """VideoLLaMA3 of the published shape with random bfloat16 weights."""
    tied = size == "2b"
    config = VideoLlama3Config(
        text_config={
            "model_type": "qwen2",
            "num_hidden_layers": 28,
            "max_position_embeddings": 131072,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "tie_word_embeddings": tied,
            "use_cache": False,
            **dict(zip(TEXT_KEYS, TEXT[size], strict=True)),
        },
        vision_config={
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "num_channels": 3,
            "patch_size": 14,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
        },
        image_token_id=151655,
        video_token_id=151656,
        tie_word_embeddings=tied,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with torch.device(device):
        model = VideoLlama3ForConditionalGeneration(config)
    for parameter in model.parameters():  # buffers of RoPE stay float32
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


def engine_step(row: Row, hf_model: Any, device: torch.device) -> Any:
    """A function that trains one step on a list of batches, through the engine of a run."""
    from vl3train.engine.optim import build_optimizer
    from vl3train.engine.ranks import join
    from vl3train.engine.step import train_step
    from vl3train.engine.zero import Zero
    from vl3train.model.attention import choose_attention
    from vl3train.model.packed_forward import PackedModel, head_dims
    from vl3train.model.trainable import parameter_groups

    machine = MachineConfig(dtype=Dtype.bfloat16, zero_stage=1)
    attention = choose_attention(row.attention, device, head_dims(hf_model), torch.bfloat16)
    print(f"attention: {attention.name} ({attention.reason})", flush=True)
    rates = dict.fromkeys(ALL_PARTS, 1e-6)
    groups = parameter_groups(hf_model, {p: r for p, r in rates.items() if trains_in(hf_model, p)}, 0.0)
    packed = PackedModel(
        hf_model,
        attention.name,
        recompute_vision=Recompute(row.recompute_vision),
        recompute_language=Recompute(row.recompute_language),
        compile_layers=row.compile_layers,
    )
    rank = join(machine)
    engine = Zero(
        packed,
        build_optimizer(groups, OptimConfig(), device),
        machine=machine,
        optim=OptimConfig(),
        num_micro_batches=row.packs_a_step,
        rank=rank,
        save_frozen=not row.lora,
    )
    engine.train(True)

    def step(batches: list[Any]) -> float:
        num_supervised = sum(len(batch.supervised_positions) for batch in batches)
        result = train_step(
            engine, batches, num_supervised_tokens=num_supervised, num_sources=1, stop_requested=False
        )
        return result.loss

    return step


def trains_in(hf_model: Any, part: str) -> bool:
    """Whether any weight of the part trains."""
    from vl3train.model.trainable import count_parameters

    return count_parameters(hf_model)[part][0] > 0


def stock_step(row: Row, hf_model: Any, device: torch.device) -> Any:
    """A function that trains one step on lists of samples, with transformers' forward on padded rows.

    Best fair settings: sdpa, bfloat16 weights and states, fused AdamW, recomputation of every layer (without it
    four padded rows do not fit), samples of like length beside one another, the loss over the whole step.
    """
    hf_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    hf_model.train()
    trained = [p for p in hf_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.0, fused=True)

    def step(samples: list[Any]) -> float:
        samples = sorted(samples, key=lambda sample: len(sample.input_ids))
        total = torch.zeros((), device=device)
        parts = [samples[i : i + row.stock_rows] for i in range(0, len(samples), row.stock_rows)]
        for part in parts:
            output = hf_model(**padded(part, device))
            (output.loss / len(parts)).backward()
            total += output.loss.detach() / len(parts)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(total)

    return step


def padded(samples: list[Any], device: torch.device) -> dict[str, Any]:
    """What transformers' collators make: rows padded to the longest, pictures end to end."""
    longest = max(len(sample.input_ids) for sample in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.int64)
    labels = torch.full((len(samples), longest), -100)
    mask = torch.zeros(len(samples), longest, dtype=torch.int64)
    for row, sample in enumerate(samples):
        length = len(sample.input_ids)
        ids[row, :length] = torch.from_numpy(sample.input_ids)
        labels[row, 1:length] = torch.from_numpy(sample.labels[:-1])
        mask[row, :length] = 1
    inputs: dict[str, Any] = dict(
        input_ids=ids.to(device), labels=labels.to(device), attention_mask=mask.to(device), use_cache=False
    )
    for prefix, pixels, kind in (
        ("image", "pixel_values", "image"),
        ("video", "pixel_values_videos", "clip"),
    ):
        shown = [s for s in samples if s.key.endswith(kind)]
        if not shown:
            continue
        patches = torch.cat([torch.from_numpy(s.patches) for s in shown]).to(device)
        inputs[pixels] = (patches.float() / 127.5 - 1).to(torch.bfloat16)
        inputs[f"{prefix}_grid_thw"] = torch.cat([torch.from_numpy(s.grids) for s in shown]).to(device)
        inputs[f"{prefix}_merge_sizes"] = torch.cat([torch.from_numpy(s.merge_sizes) for s in shown]).to(
            device
        )
        if prefix == "video":
            inputs["video_compression_mask"] = torch.cat([torch.from_numpy(s.keep_mask) for s in shown]).to(
                device
            )
    return inputs


def measure(name: str, row: Row, profile: bool) -> dict[str, Any]:
    """Train the row's steps; returns its figures."""
    device = torch.device("cuda")
    torch.cuda.set_device(0)
    hf_model = build_model(row.model, device)
    from vl3train.model.trainable import set_trainable

    set_trainable(hf_model, row.trains)
    if row.lora:
        from vl3train.model.adapters import add_adapters

        add_adapters(hf_model, AdapterConfig(kind=AdapterKind.lora))
    rates = flop_rates(hf_model)
    count = row.packs_a_step * min(row.steps, 2)
    packs = draw_packs(count, max_tokens=row.max_tokens, image_merge_size=row.image_merge_size)
    batches = [pack_batch(pack) for pack in packs]
    work = [rates.of(batch) for batch in batches]
    train = stock_step(row, hf_model, device) if row.stock else engine_step(row, hf_model, device)
    batches = [batch.pin_memory() for batch in batches]
    seconds, loss, tokens, patches, flops, graphs = [], 0.0, 0, 0, 0, 0
    for number in range(row.steps):
        at = number * row.packs_a_step % count
        chosen = range(at, at + row.packs_a_step)
        data: list[Any] = [batches[i] for i in chosen]
        if row.stock:
            data = [sample for i in chosen for sample in packs[i]]
        torch.cuda.synchronize()
        started = time.perf_counter()
        if profile and number == row.steps - 1:
            with profiled(name):
                train(data)
        else:
            loss = train(data)
        torch.cuda.synchronize()
        took = time.perf_counter() - started
        now = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        print(f"{name} step {number}: {took:.2f} s, loss {loss:.4f}, graphs {now}", flush=True)
        if number == 0:
            warm_up, graphs = took, now
            if row.steps > 1:
                continue
        if profile and number == row.steps - 1:
            continue
        seconds.append(took)
        tokens += sum(batches[i].num_planned_tokens for i in chosen)
        patches += sum(len(batches[i].pixel_values) for i in chosen)
        flops += sum(work[i] for i in chosen)
    total = sum(seconds)
    return {
        "tflops": flops / total / 1e12,
        "seconds_a_pack": total / (len(seconds) * row.packs_a_step),
        "work_a_pack_tflop": flops / len(seconds) / row.packs_a_step / 1e12,
        "tokens_a_second": tokens / total,
        "patches_a_second": patches / total,
        "tokens_a_pack": max(batch.num_planned_tokens for batch in batches),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        "warm_up_seconds": warm_up,
        "recompiles": torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs,
        "step_seconds": seconds,
        "loss": loss,
    }


class profiled:  # noqa: N801 - read as a word: with profiled(...)
    """Writes a table of the kernels of what runs within, by time."""

    def __init__(self, name: str) -> None:
        self.path = results_folder() / f"profile_{name}.txt"
        kinds = [torch.profiler.ProfilerActivity.CUDA]
        self.profiler = torch.profiler.profile(activities=kinds)

    def __enter__(self) -> None:
        self.profiler.__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.cuda.synchronize()
        self.profiler.__exit__(*error)
        table = self.profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=60)
        self.path.write_text(table)


def results_folder() -> Path:
    """Where figures go: $OUT if set, else benchmarks/results."""
    return Path(os.environ.get("OUT") or Path(__file__).parent / "results")


def run_row(name: str, row: Row, profile: bool, pipe: Any) -> None:
    """In a process of its own: send the figures, or the reason why there are none."""
    try:
        if name == "matmul":
            product = measure_product(torch.device("cuda"))
            pipe.send({"matmul_tflops": product, "machine": torch.cuda.get_device_name()})
            return
        pipe.send(measure(name, row, profile))
    except Exception as error:
        traceback.print_exc(limit=-6)
        pipe.send({"failed": f"{type(error).__name__}: {str(error)[:200]}"})


def figure_lines(name: str, row: Row, found: dict[str, Any], machine: str) -> Iterator[dict[str, Any]]:
    """The JSON lines of one row."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    units = {"tflops": "TFLOP/s", "peak_gib": "GiB", "tokens_a_pack": "tokens", "recompiles": ""}
    settings = {key: value for key, value in asdict(row).items() if key != "figures"}
    for key, unit in units.items():
        yield {
            "figure": row.figures.get(key, f"{key}_{name}"),
            "value": found[key],
            "unit": unit,
            "better": "lower" if key in ("peak_gib", "recompiles") else "higher",
            "machine": machine,
            "versions": versions,
            "settings": settings,
            "more": found,
        }


def main() -> None:
    """Run rows, write figures, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", default=list(ROWS))
    parser.add_argument("--list", action="store_true", help="name the rows and stop")
    parser.add_argument("--profile", action="store_true", help="profile the last step of each row, untimed")
    parser.add_argument("--set", nargs="*", default=[], help="change every row: key=value")
    parser.add_argument("--tag", default="", help="put behind every row's name")
    args = parser.parse_args()
    if args.list:
        print("\n".join(f"{name}: {row}" for name, row in ROWS.items()))
        return
    changes = {key: json.loads(value) for key, value in (text.split("=", 1) for text in args.set)}
    context = multiprocessing.get_context("fork" if os.environ.get("VL3_BENCH_FORK") else "spawn")
    out = results_folder() / "one_gpu.jsonl"
    table = [
        "| row | useful TFLOP/s | ms a pack | tokens/s | patches/s | peak GiB | recompiles |",
        "|---|---|---|---|---|---|---|",
    ]
    machine = "unknown"
    with out.open("a", encoding="utf-8") as file:
        for name in ["matmul", *args.rows]:
            row = replace(ROWS.get(name, Row()), **changes)
            label = name if name == "matmul" else name + args.tag
            found = in_own_process(context, label, row, args.profile)
            machine = found.get("machine", machine)
            if "failed" in found:
                lines = [{"figure": f"tflops_{label}", "value": None, "failed": found["failed"]}]
                table.append(f"| {label} | {found['failed']} | | | | | |")
            elif name == "matmul":
                lines = [
                    {
                        "figure": "matmul_tflops",
                        "value": found["matmul_tflops"],
                        "unit": "TFLOP/s",
                        "better": "higher",
                        "machine": machine,
                    }
                ]
                table.append(f"| matrix product of 8192^3 | {found['matmul_tflops']:.0f} | | | | | |")
            else:
                lines = list(figure_lines(label, row, found, machine))
                table.append(
                    f"| {label} | {found['tflops']:.0f} | {found['seconds_a_pack'] * 1e3:.0f} | "
                    f"{found['tokens_a_second']:.0f} | {found['patches_a_second']:.0f} | "
                    f"{found['peak_gib']:.1f} | {found['recompiles']} |"
                )
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            print(table[-1], flush=True)
    print("\n".join(table))


def in_own_process(context: Any, name: str, row: Row, profile: bool) -> dict[str, Any]:
    """The figures of one row; its memory and compiled code go with its process."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run_row, args=(name, row, profile, sender))
    process.start()
    sender.close()
    try:
        found: dict[str, Any] = receiver.recv()
    except EOFError:
        found = {"failed": "the process died"}
    process.join(20)
    if process.is_alive():
        process.kill()
    return found


if __name__ == "__main__":
    main()
