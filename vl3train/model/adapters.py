"""Low-rank adapters: the door to peft, which puts them into the model's own modules.

PackedModel runs the same modules, so it takes the model inside the PeftModel.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor
from transformers import VideoLlama3ForConditionalGeneration

from vl3train.config.choices import AdapterInit, AdapterKind
from vl3train.config.optim_options import AdapterConfig
from vl3train.contracts.files import write_whole
from vl3train.contracts.strict_json import json_text
from vl3train.model.adapter_targets import PART_LAYERS, alpha_of, full_modules, target_pattern
from vl3train.model.layers.nf4_linear import round_to_4_bits, sizes_in_4_bits
from vl3train.model.trainable import REPLACED, count_parameters, part_of
from vl3train.model.weights.from_parts import load_model

# peft uses a name that transformers 5.23 has renamed: a user can do nothing about it.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)

FULL_MODULES = {"projector": "projector", "vision_encoder": "vision_model"}
"""Parts that may train in full together with adapters, and the module names by which peft finds them. peft trains a
copy of the module, saves it in the adapter's folder, and replaces the module by it when adapters are merged."""

INITS: dict[AdapterInit, Any] = {
    AdapterInit.default: True,
    AdapterInit.gaussian: "gaussian",
    AdapterInit.pissa: "pissa",
    AdapterInit.pissa_niter_16: "pissa_niter_16",
}
"""peft's ``init_lora_weights``."""

ADAPTER_NAME = "default"
"""peft's own name for the only adapter of a model."""


def add_adapters(
    hf_model: VideoLlama3ForConditionalGeneration, adapter: AdapterConfig, *, is_new: bool = True
) -> PeftModel:
    """Put adapters on ``adapter.parts`` and freeze their weights.

    Call it after set_trainable: other parts that train at that time still train in full. Changes ``hf_model`` in place:
    PackedModel takes ``hf_model``, save_adapter takes the PeftModel. The first weights are drawn from torch's global
    generator. With PiSSA the frozen weights change too, unless ``is_new`` is false: then they were changed before, and
    the adapters are those of a checkpoint to come. Raises ValueError for what cannot be combined, or is not in the
    model.
    """
    if adapter.kind is not AdapterKind.lora:
        raise ValueError(f"adapter.kind={adapter.kind.value}: add_adapters knows lora")
    training = {part for part, (trainable, _) in count_parameters(hf_model).items() if trainable}
    full_parts = sorted(training - set(adapter.parts))
    if impossible := sorted(set(full_parts) - set(FULL_MODULES)):
        raise ValueError(
            f"{', '.join(impossible)} cannot train in full together with adapters; "
            f"name it in adapter.parts, or leave it out of stage.learning_rates"
        )
    full = [FULL_MODULES[part] for part in full_parts]
    full += full_modules(
        [
            name
            for name, module in hf_model.named_modules()
            if name and any(True for _ in module.parameters())
        ],
        [name for name in adapter.modules_to_save if name not in FULL_MODULES],
        tied=hf_model.config.tie_word_embeddings,
    )
    special = [part for part in adapter.parts if part in {**adapter.part_ranks, **adapter.part_alphas}]
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=alpha_of(adapter, None),  # type: ignore[arg-type] # peft only divides it by the rank
        rank_pattern={PART_LAYERS[part]: rank for part, rank in adapter.part_ranks.items()},
        alpha_pattern={PART_LAYERS[part]: alpha_of(adapter, part) for part in special},
        lora_dropout=adapter.dropout,
        bias="none",
        target_modules=target_pattern([name for name, _ in hf_model.named_modules()], adapter),
        modules_to_save=full or None,
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        init_lora_weights=INITS[adapter.init] if is_new else True,
    )
    # Adapters have the dtype of the weights they are added to: the engine keeps float32 masters of all that trains.
    model = get_peft_model(hf_model, config, adapter_name=ADAPTER_NAME, autocast_adapter_dtype=False)
    # Whoever loads the adapters puts them on the weights as they are now. peft would change these once more.
    config.init_lora_weights = True
    for layer in model.modules():
        if isinstance(layer, LoraLayer):  # PiSSA of bfloat16 weights leaves float32 adapters
            dtype: Any = layer.get_base_layer().weight.dtype
            layer.lora_A.to(dtype)
            layer.lora_B.to(dtype)
    return model


BASE_FORM = "base_4bit.json"
"""Beside adapters that were trained on weights in 4 bits: which parts of the base these were."""


def save_adapter(
    model: PeftModel, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Write only the adapters and the parts trained in full, for ``PeftModel.from_pretrained(base, folder)``.

    Where the base is in 4 bits, ``base_4bit.json`` says so.

    ``state_dict`` are the full weights by the names of the model inside, where the model itself holds only a partition
    (ZeRO-3); None: the model's own.
    """
    state_dict = model.get_base_model().state_dict() if state_dict is None else state_dict
    # save_embedding_layers: peft's "auto" asks the hub for the base model's vocabulary.
    model.save_pretrained(
        str(folder),
        state_dict={f"base_model.model.{name}": tensor for name, tensor in state_dict.items()},
        save_embedding_layers=False,
    )
    if parts := sorted({part_of(name) for name, _ in sizes_in_4_bits(model)}):
        computed = str(next(iter(model.parameters())).dtype).removeprefix("torch.")
        form = {"quant_type": "nf4", "use_double_quant": True, "compute_dtype": computed, "parts": parts}
        write_whole(Path(folder) / BASE_FORM, json_text(form, indent=1))


def round_base(base: Any, folder: Path) -> None:
    """Give a plain model's weights the values that the adapters of ``folder`` were trained on; quantizing rounds.

    Call it before load_adapter, on weights in the dtype that the run had or in float32.
    """
    file = folder / BASE_FORM
    if file.is_file():
        form = json.loads(file.read_text(encoding="utf-8"))
        round_to_4_bits(base, form["parts"], getattr(torch, form["compute_dtype"]))


def load_adapter(
    base: VideoLlama3ForConditionalGeneration, folder: str | Path, is_trainable: bool
) -> PeftModel:
    """Put the adapters of ``folder`` on ``base``, which changes in place."""
    return PeftModel.from_pretrained(
        base, str(folder), is_trainable=is_trainable, autocast_adapter_dtype=False
    )


def load_merged(weights: Path, adapter: Path, dtype: torch.dtype) -> VideoLlama3ForConditionalGeneration:
    """The plain model of weights and the adapters on them: merged in float32 in memory, then cast to ``dtype``.

    Raises ValueError where the weights do not fit the model.
    """
    model = load_model(weights, dtype=torch.float32)
    round_base(model, adapter)
    merged, _ = merge_adapter(load_adapter(model, adapter, is_trainable=False))
    for parameter in merged.parameters():  # not merged.to(dtype): the rotary frequencies stay float32
        parameter.data = parameter.data.to(dtype)
    return merged


def base_state(hf_model: Any) -> dict[str, Tensor]:
    """The weights that adapters are on, under the names of the model without them."""
    state: dict[str, Tensor] = {}
    for name, tensor in hf_model.state_dict().items():
        if not re.search(r"\.(lora_\w+|modules_to_save)\.", name):
            state[name.replace(".base_layer.", ".").replace(REPLACED, ".")] = tensor
    return state


@torch.no_grad()
def take_base(hf_model: Any, folder: Path) -> None:
    """Copy the weights of a Hugging Face folder into the model that adapters are on."""
    state = base_state(hf_model)
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            state[name].copy_(tensor)


@torch.no_grad()
def merge_adapter(
    model: PeftModel, dtype: torch.dtype | None = None
) -> tuple[VideoLlama3ForConditionalGeneration, float]:
    """The plain model, with adapters merged into its weights and fully trained parts in place; ``model`` is used up.

    The sum is taken in the dtype of the weights: load them as float32 where the change must survive.

    Returns:
        The model, and the share of the adapters' change that ``dtype`` cannot keep once the sum is cast to it: the norm
        of what is lost over the norm of the change, all adapted layers together. 0 where nothing is changed, or without
        ``dtype``. bfloat16 has 8 bits of a weight: a change below 1/512 of the weight is lost whole or comes out too
        large.
    """
    lost = changed = 0.0
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            weight: Any = layer.get_base_layer().weight
            before = weight.detach().clone()
            layer.merge()
            if dtype is not None:
                lost += (weight.to(dtype).to(weight.dtype) - weight).square().sum(dtype=torch.float64).item()
                changed += (weight - before).square().sum(dtype=torch.float64).item()
    return model.unload(), (lost / changed) ** 0.5 if changed else 0.0
