"""Low-rank adapters: the door to peft, which puts them into the model's own modules.

PackedModel runs the same modules, so it takes the model inside the PeftModel.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import VideoLlama3ForConditionalGeneration

from vl3train.config.choices import AdapterKind
from vl3train.config.schema import AdapterConfig
from vl3train.model.trainable import count_parameters

# peft uses a name that transformers 5.23 has renamed: a user can do nothing about it.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)

TARGETS = {
    "language_model": r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj",
    "vision_encoder": r"model\.vision_model\.encoder\.layers\.\d+\.(self_attn\.([qkv]|out)_proj|mlp\.fc[12])",
}
"""The linear layers that get an adapter. Full paths: plain names such as "q_proj" match in both towers."""

FULL_MODULES = {"projector": "projector", "vision_encoder": "vision_model"}
"""Parts that may train in full together with adapters, and the module names by which peft finds them. peft trains a
copy of the module, saves it in the adapter's folder, and replaces the module by it when adapters are merged."""

ADAPTER_NAME = "default"
"""peft's own name for the only adapter of a model."""


def add_adapters(hf_model: VideoLlama3ForConditionalGeneration, adapter: AdapterConfig) -> PeftModel:
    """Put adapters on ``adapter.parts`` and freeze their weights.

    Call it after set_trainable: other parts that train at that time still train in full. Changes ``hf_model`` in place:
    PackedModel takes ``hf_model``, save_adapter takes the PeftModel. The first weights are drawn from torch's global
    generator. Raises ValueError for parts that cannot be combined so.
    """
    if adapter.kind is not AdapterKind.lora:
        raise ValueError(f"adapter.kind={adapter.kind.value}: add_adapters knows lora")
    if not adapter.parts or (unknown := sorted(set(adapter.parts) - set(TARGETS))):
        named = ", ".join(unknown) if adapter.parts else "nothing"
        raise ValueError(f"adapter.parts names {named}; adapters go on {', '.join(TARGETS)}")
    training = {part for part, (trainable, _) in count_parameters(hf_model).items() if trainable}
    full_parts = sorted(training - set(adapter.parts))
    if impossible := sorted(set(full_parts) - set(FULL_MODULES)):
        raise ValueError(
            f"{', '.join(impossible)} cannot train in full together with adapters; "
            f"name it in adapter.parts, or leave it out of stage.learning_rates"
        )
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        bias="none",
        target_modules="|".join(TARGETS[part] for part in sorted(adapter.parts)),
        modules_to_save=[FULL_MODULES[part] for part in full_parts] or None,
    )
    # Adapters have the dtype of the weights they are added to: the engine keeps float32 masters of all that trains.
    return get_peft_model(hf_model, config, adapter_name=ADAPTER_NAME, autocast_adapter_dtype=False)


def save_adapter(
    model: PeftModel, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Write only the adapters and the parts trained in full, for ``PeftModel.from_pretrained(base, folder)``.

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


def load_adapter(
    base: VideoLlama3ForConditionalGeneration, folder: str | Path, is_trainable: bool
) -> PeftModel:
    """Put the adapters of ``folder`` on ``base``, which changes in place."""
    return PeftModel.from_pretrained(
        base, str(folder), is_trainable=is_trainable, autocast_adapter_dtype=False
    )


def merge_adapter(model: PeftModel) -> VideoLlama3ForConditionalGeneration:
    """The plain model, with adapters merged into its weights and fully trained parts in place; ``model`` is used up.

    The sum is taken in the dtype of the weights: load them as float32 where the change must survive.
    """
    return model.merge_and_unload()


def change_lost(model: PeftModel, dtype: torch.dtype) -> float:
    """The share of the adapters' change that ``dtype`` cannot keep, once merged into float32 weights and cast to it.

    The norm of what is lost over the norm of the change, all adapted layers together; 0 where nothing is changed.
    bfloat16 has 8 bits of a weight: a change below 1/512 of the weight is lost whole or comes out too large.
    """
    lost = changed = 0.0
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            weight = layer.get_base_layer().weight.data
            change = layer.get_delta_weight(ADAPTER_NAME)  # type: ignore[operator]
            merged = weight + change
            lost += (merged.to(dtype).float() - merged).square().sum(dtype=torch.float64).item()
            changed += change.square().sum(dtype=torch.float64).item()
    return (lost / changed) ** 0.5 if changed else 0.0
