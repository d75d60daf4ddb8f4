"""Transformers' own forward over the same samples: as shipped, and with the fused kernels of others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.gpu.engine import RATE, Step, other_packs
from benchmarks.gpu.rows import Row
from vl3train.contracts.records import RenderedSample
from vl3train.contracts.tokens import IGNORE_INDEX
from vl3train.model.attention.backends import SEQLEN_STEP, Segments, attend, choose_attention
from vl3train.model.packed_forward import head_dims

TEXT_ATTENTION, VISION_ATTENTION = "varlen", "flash_varlen_vision"
"""transformers 5.23 gives the encoder's attention its bounds only where the name holds "flash"; in the language
model such a name would send it looking for the flash-attn package."""

STOCK_PACKS = 16
"""Steps of warm-up: padded, each is about ten micro-batches, all of different shapes."""


def stock_step(row: Row, hf_model: Any, device: torch.device) -> Step:
    """One step of transformers' forward on a list of samples (padded) or of lists of samples (packed_stock).

    Best fair settings: bfloat16 weights and states as people train it, fused AdamW, layers recomputed as far as
    memory asks for it, samples of like length beside one another, the loss over the step's supervised tokens, and
    torch's choice among its attention kernels with cuDNN's and without.
    """
    torch.backends.cuda.enable_cudnn_sdp(row.cudnn_attention)
    packed = row.way == "packed_stock"
    if packed:
        set_varlen_attention(hf_model, device)
    if row.liger:
        apply_liger(hf_model)
    keyword = dict(gradient_checkpointing_kwargs={"use_reentrant": False})
    where = hf_model if row.stock_recompute == "all" else hf_model.model.vision_model
    where.gradient_checkpointing_enable(**keyword)
    hf_model.train()
    trained = [p for p in hf_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=device.type == "cuda")

    def gradients(work: list[Any], num_supervised: int) -> Tensor:
        if packed:
            parts = work
        else:
            ordered = sorted(work, key=lambda sample: len(sample.input_ids))
            parts = [ordered[i : i + row.stock_rows] for i in range(0, len(ordered), row.stock_rows)]
        total = torch.zeros((), device=device)
        for part in parts:
            inputs = (packed_inputs if packed else padded_inputs)(
                part, device, hf_model.config.video_token_id
            )
            loss = (fused_loss if row.liger else full_loss)(hf_model, inputs) / num_supervised
            loss.backward()
            total += loss.detach()
        return total

    warm_up_stock(row, hf_model, gradients)
    optimizer.zero_grad()

    def step(work: list[Any], num_supervised: int) -> float:
        total = gradients(work, num_supervised)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(total)

    return step


def warm_up_stock(row: Row, hf_model: Any, gradients: Callable[[list[Any], int], Tensor]) -> None:
    """As engine/memory/warmup.py before a run of vl3train: other packs through the first layer of each tower.

    So that kernels which are loaded in the timed steps, and stop the GPU for it, are as few here as there.
    """
    packs = other_packs(row, STOCK_PACKS if torch.cuda.is_available() else 1)
    with first_layers(hf_model):
        for pack in packs:
            gradients([pack] if row.way == "packed_stock" else list(pack), 1)


@contextmanager
def first_layers(hf_model: Any) -> Iterator[None]:
    """Both towers with one layer each, for a while."""
    towers = (hf_model.model.vision_model.encoder, hf_model.model.language_model)
    whole = [tower.layers for tower in towers]
    try:
        for tower in towers:
            tower.layers = tower.layers[:1]
        yield
    finally:
        for tower, layers in zip(towers, whole, strict=True):
            tower.layers = layers


def full_loss(hf_model: Any, inputs: dict[str, Any]) -> Tensor:
    """Summed loss from the logits of every token, which transformers' forward makes."""
    labels = inputs.pop("labels")
    logits = hf_model(**inputs).logits
    return F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )


def fused_loss(hf_model: Any, inputs: dict[str, Any]) -> Tensor:
    """The same by liger's fused linear cross-entropy: no logits in memory."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    labels = inputs.pop("labels")
    hidden = hf_model.model(**inputs).last_hidden_state
    fused = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE_INDEX, reduction="sum")
    return fused(hf_model.lm_head.weight, hidden.flatten(0, 1), labels.flatten())


def apply_liger(hf_model: Any) -> None:
    """liger's RoPE, RMSNorm and SwiGLU in the language model.

    liger 0.8.5 has no entry for video_llama_3, so the one for Qwen2 is given the language model; its fused loss is
    called by ``fused_loss``. Raises RuntimeError where its kernels (Triton) cannot run.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("liger's kernels need a GPU")
    from liger_kernel.transformers import apply_liger_kernel_to_qwen2

    apply_liger_kernel_to_qwen2(
        rope=True,
        rms_norm=True,
        swiglu=True,
        cross_entropy=False,
        fused_linear_cross_entropy=False,
        model=hf_model.model.language_model,
    )


def set_varlen_attention(hf_model: Any, device: torch.device) -> None:
    """Variable-length kernels through transformers' own interface: the fastest right one for each head size.

    Its ``flash_attention_4`` would take the encoder's heads of 72 too, where that kernel's dq is wrong.
    """
    vision_dim, text_dim = head_dims(hf_model)
    vision, text = (
        choose_attention(wanted, device, [dim], torch.bfloat16)
        for wanted, dim in (
            ("torch_varlen" if device.type == "cuda" else "auto", vision_dim),
            ("auto", text_dim),
        )
    )
    print(f"attention: {vision.name} (encoder), {text.name} (language model)", flush=True)

    def text_attention(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        return _attend(q, k, v, text.name, True, **kwargs), None

    def vision_attention(module: Any, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        return _attend(q, k, v, vision.name, False, **kwargs), None

    ALL_ATTENTION_FUNCTIONS.register(TEXT_ATTENTION, text_attention)
    ALL_ATTENTION_FUNCTIONS.register(VISION_ATTENTION, vision_attention)
    hf_model.set_attn_implementation({"text_config": TEXT_ATTENTION, "vision_config": VISION_ATTENTION})


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    backend: str,
    causal: bool,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int | Tensor,
    scaling: float,
    **_: Any,
) -> Tensor:
    """(1, H, T, D) in, (1, T, H, D) out."""
    longest = -(-int(max_length_q) // SEQLEN_STEP) * SEQLEN_STEP
    lengths = tuple(cu_seq_lens_q.diff().tolist()) if backend == "reference" else ()
    segments = Segments(cu_seq_lens_q, lengths, longest, backend)
    q, k, v = (x.transpose(1, 2)[0] for x in (q, k, v))
    return attend(q, k, v, segments, causal=causal, scale=scaling)[None]


def padded_inputs(samples: Sequence[RenderedSample], device: torch.device, clip_id: int) -> dict[str, Any]:
    """What transformers' collators make: rows padded to the longest, pictures end to end."""
    longest = max(len(sample.input_ids) for sample in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.int64)
    labels = torch.full((len(samples), longest), IGNORE_INDEX)
    mask = torch.zeros(len(samples), longest, dtype=torch.int64)
    for row, sample in enumerate(samples):
        length = len(sample.input_ids)
        ids[row, :length] = torch.from_numpy(sample.input_ids)
        labels[row, :length] = torch.from_numpy(sample.labels)
        mask[row, :length] = 1
    rows = dict(input_ids=ids, labels=labels, attention_mask=mask)
    return {
        **{name: rows[name].to(device) for name in rows},
        "use_cache": False,
        **pictures(samples, device, clip_id),
    }


def packed_inputs(samples: Sequence[RenderedSample], device: torch.device, clip_id: int) -> dict[str, Any]:
    """One row of all samples, their bounds by the arguments that variable-length kernels take."""
    lengths = torch.tensor([len(sample.input_ids) for sample in samples])
    bounds = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32).to(device)
    ids, labels = (
        torch.cat([torch.from_numpy(getattr(sample, name)) for sample in samples])[None].to(device)
        for name in ("input_ids", "labels")
    )
    positions = torch.cat([torch.arange(length) for length in lengths.tolist()])[None].to(device)
    longest = int(lengths.max())
    return dict(
        input_ids=ids,
        labels=labels,
        position_ids=positions,
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=longest,
        max_length_k=longest,
        use_cache=False,
        **pictures(samples, device, clip_id),
    )


def pictures(samples: Sequence[RenderedSample], device: torch.device, clip_id: int) -> dict[str, Any]:
    """Patches of the images, then of the clips, each in the order of the samples; a sample has one or none."""

    def shows_clip(sample: RenderedSample) -> bool:
        return int(sample.input_ids[sample.placeholder_positions[0]]) == clip_id

    inputs: dict[str, Any] = {}
    for prefix, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        shown = [s for s in samples if len(s.grids) and shows_clip(s) == (prefix == "video")]
        if not shown:
            continue
        arrays = {
            f"{prefix}_grid_thw": [s.grids for s in shown],
            f"{prefix}_merge_sizes": [s.merge_sizes for s in shown],
            **({"video_compression_mask": [s.keep_mask for s in shown]} if prefix == "video" else {}),
        }
        inputs |= {
            name: torch.cat([torch.from_numpy(part) for part in parts]).to(device)
            for name, parts in arrays.items()
        }
        patches = torch.cat([torch.from_numpy(s.patches) for s in shown]).to(device)
        inputs[pixels] = patches.float() / 127.5 - 1
    return inputs
