"""Rows of benchmarks/one_gpu.py: what each trains, how, and what the issue calls its figures."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from vl3train.config.schema import PARTS

WAYS = ("engine", "plain_loop", "padded", "packed_stock", "command", "trainer")
"""engine: vl3train's train_step under DeepSpeed. plain_loop: the same under a loop of plain PyTorch. padded:
transformers' forward on padded rows. packed_stock: the same forward on one packed row with position_ids. command:
the whole training loop, from shards on disk. trainer: peft and Hugging Face's Trainer (gpu/trainer.py)."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    way: str = "engine"
    model: str = "2b"
    attention: str = "auto"
    memory: str = "auto"  # or given: every layer as the next two say
    recompute_vision: str = "layer"
    recompute_language: str = "layer"
    compile_layers: bool = True
    gemm_backend: str = "auto"
    trains: tuple[str, ...] = PARTS
    image_merge_size: int = 2
    max_tokens: int = 16384
    fill: bool = False  # packs to the last token, with a text
    lora: bool = False
    lora_dropout: float = 0.0
    rank: int = 64  # of the adapters
    base_4bit: bool = False  # the language model's frozen weights in NF4
    state_dtype: str = "float32"  # of AdamW's moments
    master_dtype: str = "float32"  # of what it updates
    offload_optimizer: bool = False  # AdamW's moments, between updates
    zero_stage: int = 1
    ranks: int = 1  # processes, a GPU each
    liger: bool = False  # ways of transformers: liger's kernels in the language model, its fused loss
    stock_recompute: str = "all"  # ways of transformers: layers recomputed, all or those of vision
    stock_rows: int = 4  # padded: samples a micro-batch
    cudnn_attention: bool = True  # padded: whether torch may choose cuDNN's, as it does on Hopper
    steps: int = 4  # that are timed
    packs_a_step: int = 4  # on each rank
    gpu_gib: float | None = None
    """As if each GPU had no more memory than this: 79.1 makes a larger one hold what an H100 of 80 GB holds."""
    host_syncs: bool = False  # count the waits of one more step
    max_seconds: float = 900.0
    """Then its processes are ended, and the row says so. On a new machine all kernels are compiled first: row 2b was
    not at its first step after 330 s."""
    figures: dict[str, str] = field(default_factory=dict)  # what the issue calls this row's figures


ONE_H100: dict[str, Any] = dict(offload_optimizer=True)
"""What configs/machine/one_h100.yaml says beside compiled layers and memory=auto, as every row has them."""
KEPT_80_GB: dict[str, Any] = dict(recompute_vision="elementwise", recompute_language="mlp")
"""What 80 GB hold of the largest pack of the 2B with one choice for all layers of a tower."""
STAGE_1: dict[str, Any] = dict(trains=("vision_encoder", "projector"), image_merge_size=1)
ROWS: dict[str, Row] = {
    "2b": Row(
        **ONE_H100,
        host_syncs=True,
        figures={"tflops": "useful_tflops_2b", "peak_gib": "peak_gib_2b", "recompiles": "recompiles"},
    ),
    "2b_train_command": Row(
        **ONE_H100,
        way="command",
        steps=8,
        figures={"tflops": "useful_tflops_2b_train_command"},
    ),
    "2b_plain_loop": Row(way="plain_loop", memory="given", **KEPT_80_GB),
    "2b_given": Row(memory="given", **KEPT_80_GB),  # beside the plain loop: what DeepSpeed costs
    "stock_2b": Row(way="padded", steps=3, packs_a_step=2),
    "stock_2b_no_cudnn": Row(way="padded", steps=3, packs_a_step=2, cudnn_attention=False),
    "2b_liger": Row(way="padded", liger=True, steps=3, packs_a_step=2),
    "2b_liger_no_cudnn": Row(way="padded", liger=True, steps=3, packs_a_step=2, cudnn_attention=False),
    "2b_position_ids": Row(way="packed_stock", liger=True, steps=3, packs_a_step=2),
    "2b_position_ids_vision_again": Row(
        way="packed_stock", liger=True, stock_recompute="vision", steps=3, packs_a_step=2
    ),
    "stage1_2b": Row(**ONE_H100, **STAGE_1),
    "stock_stage1_2b": Row(**STAGE_1, way="padded", steps=3, packs_a_step=2),
    "stock_stage1_2b_no_cudnn": Row(**STAGE_1, way="padded", steps=3, packs_a_step=2, cudnn_attention=False),
    "7b_lora": Row(
        **ONE_H100,
        model="7b",
        lora=True,
        figures={"tflops": "useful_tflops_7b_lora"},
    ),
    "longest_2b": Row(
        **ONE_H100,
        max_tokens=131072,
        fill=True,
        packs_a_step=1,
        steps=2,
        figures={"tokens_a_pack": "longest_pack_2b"},
    ),
    "longest_7b_lora": Row(
        **ONE_H100,
        model="7b",
        lora=True,
        max_tokens=65536,
        fill=True,
        packs_a_step=1,
        steps=2,
        figures={"tokens_a_pack": "longest_pack_7b_lora"},
    ),
    "7b_one_gpu": Row(  # needs 139 GiB
        model="7b",
        **ONE_H100,
        master_dtype="split",
        figures={"tflops": "useful_tflops_7b", "peak_gib": "peak_gib_7b"},
    ),
    "7b": Row(model="7b", ranks=2),
    "7b_states_on_host": Row(model="7b", ranks=2, **ONE_H100),
    "7b_train_command": Row(
        way="command",
        model="7b",
        ranks=2,
        steps=6,
        figures={"tflops": "useful_tflops_7b_train_command"},
    ),
    "7b_zero2": Row(model="7b", ranks=2, zero_stage=2),
    "2b_bfloat16_optimizer": Row(state_dtype="bfloat16", master_dtype="bfloat16"),
    "2b_states_on_gpu": Row(),
    "2b_torch_products": Row(memory="given", gemm_backend="torch", **KEPT_80_GB),  # beside 2b_given
    "2b_eager": Row(compile_layers=False, memory="given"),
    "2b_torch_varlen": Row(attention="torch_varlen"),
    "2b_recompute_layer": Row(memory="given"),
}

COMPARED = {
    "ratio_to_stock_2b": ("2b", "stock_2b", "stock_2b_no_cudnn"),
    "ratio_to_stock_2b_as_shipped": ("2b", "stock_2b"),
    "ratio_to_stock_2b_given": ("2b_given", "stock_2b", "stock_2b_no_cudnn"),
    "ratio_to_liger_2b": ("2b", "2b_liger", "2b_liger_no_cudnn"),
    "ratio_to_position_ids_2b": ("2b", "2b_position_ids", "2b_position_ids_vision_again"),
    "ratio_to_stock_stage1": ("stage1_2b", "stock_stage1_2b", "stock_stage1_2b_no_cudnn"),
    "ratio_to_stock_stage1_as_shipped": ("stage1_2b", "stock_stage1_2b"),
}
"""Figures that are one row's useful TFLOP/s over the best of the others, which all have to be in the run."""


def tiny(row: Row) -> Row:
    """The row on a model of two layers, for a CPU: small packs, nothing compiled, none of liger's (Triton) kernels."""
    return replace(
        row,
        model="tiny",
        max_tokens=512,
        compile_layers=False,
        liger=False,
        steps=min(row.steps, 3),
        packs_a_step=2,
    )


def quick(row: Row) -> Row:
    """One timed step after those that warm up, and no count of waits."""
    return replace(row, steps=1, host_syncs=False)
