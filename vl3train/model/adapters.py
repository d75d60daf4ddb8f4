"""Low-rank adapters: the door to peft, which puts them into the model's own modules.

PackedModel keeps driving the same modules, so it is given the model that lies within the PeftModel.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import VideoLlama3ForConditionalGeneration

from vl3train.config.choices import AdapterKind
from vl3train.config.schema import AdapterConfig
from vl3train.model.trainable import count_parameters

# peft asks transformers 5.23 by a name that it renames: nothing a user can act on.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)

TARGETS = {
    "language_model": r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj",
    "vision_encoder": r"model\.vision_model\.encoder\.layers\.\d+\.(self_attn\.([qkv]|out)_proj|mlp\.fc[12])",
}
"""The linear layers that get an adapter. Full paths: plain names such as "q_proj" are found in both
towers."""

FULL_MODULES = {"projector": "projector", "vision_encoder": "vision_model"}
"""Parts that may train in full beside adapters, by the name peft finds them under. peft trains a copy,
saves it in the adapter's folder and puts it in place on merging."""

ADAPTER_NAME = "default"
"""peft's own name for the only adapter of a model."""


def add_adapters(hf_model: VideoLlama3ForConditionalGeneration, adapter: AdapterConfig) -> PeftModel:
    """Put adapters on ``adapter.parts`` and freeze their weights.

    Call it after set_trainable: other parts that train then go on training in full. Changes ``hf_model`` in
    place, so PackedModel is given ``hf_model``; keep the PeftModel for save_adapter. The first weights are
    drawn from torch's global generator. Raises ValueError for parts that cannot be so combined.
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
            f"{', '.join(impossible)} cannot train in full beside adapters; "
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
    # Adapters in the dtype of the weights they sit on: the engine keeps float32 masters of everything that
    # trains.
    return get_peft_model(hf_model, config, adapter_name=ADAPTER_NAME, autocast_adapter_dtype=False)


def save_adapter(
    model: PeftModel, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Write adapters and fully trained parts, and nothing else, for ``PeftModel.from_pretrained(base,
    folder)``.

    ``state_dict`` are weights gathered elsewhere (ZeRO-3), by the names of the model within; unset, the
    model's own.
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
    """``base`` with the adapters of ``folder``; changes ``base`` in place."""
    return PeftModel.from_pretrained(
        base, str(folder), is_trainable=is_trainable, autocast_adapter_dtype=False
    )


def merge_adapter(model: PeftModel) -> VideoLlama3ForConditionalGeneration:
    """The plain model with adapters folded into its weights and fully trained parts in place. ``model`` is
    used up."""
    return model.merge_and_unload()
