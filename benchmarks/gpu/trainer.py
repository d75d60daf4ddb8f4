"""peft and Hugging Face's Trainer over the same samples in the same steps, at their best fair settings.

bfloat16 weights under autocast with float32 adapters, as peft makes them; PyTorch's SDPA; layers recomputed; fused
AdamW; samples of like length beside one another; liger's kernels in the language model where there is a GPU; with
4 bits, bitsandbytes' NF4 with quantized scales, computing in bfloat16. The Trainer packs nothing: it pads rows.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils.data import SequentialSampler

from benchmarks.gpu.engine import RATE
from benchmarks.gpu.model import build_model
from benchmarks.gpu.rows import Row
from benchmarks.gpu.stock import apply_liger, padded_inputs
from vl3train.contracts.records import RenderedSample
from vl3train.contracts.tokens import IGNORE_INDEX
from vl3train.model.adapter_targets import PART_LAYERS

CPU = torch.device("cpu")


def measure_trainer(
    row: Row, work: Any, warm_up: int, device: torch.device, tell: Callable[[dict[str, Any]], None]
) -> tuple[list[float], list[float]]:
    """Seconds and losses of each step. ``work`` has the samples of the steps (measure.Work); ``tell`` gets seconds."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model = trainer_model(row, device)
    steps = [[sample for pack in step["packs"] for sample in pack] for step in work.steps]
    counts = [len(samples) for samples in steps]
    in_a_step = min(math.ceil(max(counts) / row.stock_rows), min(counts))  # every micro-batch has a sample
    micro_batches = [part for samples in steps for part in chunks(samples, in_a_step)]
    times: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if device.type == "cuda":
                torch.cuda.current_stream().synchronize()
            times.append(time.perf_counter())
            if len(times) > warm_up:
                tell({"step_seconds": [late - early for early, late in pairwise(times)]})

        def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
            if "loss" in logs:
                losses.append(logs["loss"])

    class InOrder(Trainer):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=1,  # an item is a micro-batch already
            gradient_accumulation_steps=in_a_step,
            max_steps=len(steps),
            learning_rate=RATE,
            lr_scheduler_type="constant",
            bf16=True,
            use_cpu=device.type == "cpu",
            optim="adamw_torch_fused" if device.type == "cuda" else "adamw_torch",
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            remove_unused_columns=False,
            dataloader_num_workers=0,
            disable_tqdm=True,
        )
        trainer = InOrder(
            model=model,
            args=arguments,
            train_dataset=micro_batches,
            data_collator=lambda items: shifted_back(padded_inputs(items[0], CPU, work.clip_id)),
            callbacks=[Clock()],
        )
        started = time.perf_counter()
        trainer.train()
    return [late - early for early, late in zip([started, *times], times, strict=False)], losses


def trainer_model(row: Row, device: torch.device) -> Any:
    """The row's model with peft's adapters on the language model; its linear layers by bitsandbytes where in 4 bits."""
    from peft import LoraConfig, get_peft_model

    model = build_model(row.model, device).requires_grad_(False)
    if row.base_4bit:
        put_into_bitsandbytes(model.model.language_model.layers, device)
        model.is_loaded_in_4bit = True
    if row.liger:
        apply_liger(model)
    config = LoraConfig(r=row.rank, lora_alpha=2 * row.rank, target_modules=PART_LAYERS["language_model"])
    adapted = get_peft_model(model, config)
    adapted.enable_input_require_grads()  # without it recomputed layers would have no gradient
    return adapted


def put_into_bitsandbytes(layers: nn.Module, device: torch.device) -> None:
    """Replace the linear layers, as transformers' BitsAndBytesConfig(load_in_4bit=True, ...) does when it loads."""
    import bitsandbytes as bnb

    for parent in list(layers.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is not nn.Linear:
                continue
            with_bias = linear.bias is not None
            held = bnb.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=with_bias,
                compute_dtype=torch.bfloat16,
                compress_statistics=True,
                quant_type="nf4",
            )
            held.weight = bnb.nn.Params4bit(
                linear.weight.data.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4"
            )
            if with_bias:
                held.bias = linear.bias
            setattr(parent, name, held.to(device))


def chunks(samples: list[RenderedSample], number: int) -> list[list[RenderedSample]]:
    """``number`` micro-batches of samples of like length; the largest has as few tokens, padding included, as it may.

    Raises ValueError for fewer samples than micro-batches.
    """
    if number > len(samples):
        raise ValueError(f"{len(samples)} samples do not make {number} micro-batches")
    ordered = sorted(samples, key=lambda sample: len(sample.input_ids))
    lengths = [len(sample.input_ids) for sample in ordered]
    # least[n][i]: padded tokens of the largest of n micro-batches of the first i samples; start[n][i]: its last one's.
    least = [[math.inf] * (len(ordered) + 1) for _ in range(number + 1)]
    start = [[0] * (len(ordered) + 1) for _ in range(number + 1)]
    least[0][0] = 0
    for n in range(1, number + 1):
        for i in range(n, len(ordered) + 1):
            for j in range(n - 1, i):
                largest = max(least[n - 1][j], (i - j) * lengths[i - 1])
                if largest < least[n][i]:
                    least[n][i], start[n][i] = largest, j
    found, end = [], len(ordered)
    for n in range(number, 0, -1):
        found.append(ordered[start[n][end] : end])
        end = start[n][end]
    return found[::-1]


def shifted_back(inputs: dict[str, Any]) -> dict[str, Any]:
    """Labels as transformers takes them: it shifts them itself."""
    labels = torch.full_like(inputs["labels"], IGNORE_INDEX)
    labels[:, 1:] = inputs["labels"][:, :-1]
    return {**inputs, "labels": labels}
