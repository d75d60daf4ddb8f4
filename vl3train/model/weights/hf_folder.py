"""Weights and processor in Hugging Face form: built, written and read back.

What is written here loads with plain ``from_pretrained``: names in memory are the names in the file.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vl3train.config.paths import MODEL_TYPES, is_run_folder, latest_checkpoint, model_type, resolve_weights
from vl3train.contracts.tokens import (
    END_OF_TEXT,
    IM_END,
)
from vl3train.model.weights.damaged import refuse_damaged


class WrongExport(ValueError):  # noqa: N818 - says what it is
    """What was written is not what should have been."""


def save_weights(
    hf_model: Any,
    processor: Any,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write model, processor, chat template and generation settings as one Hugging Face folder.

    Everything goes to a folder beside it first, which is renamed at the end: ``folder`` is whole or absent.

    Args:
        hf_model: A ``VideoLlama3ForConditionalGeneration``; its config is written, and its weights unless
            ``state_dict`` is given.
        processor: The processor that belongs to it.
        folder: Must not exist.
        dtype: Floating tensors are cast to it; None keeps them as they are.
        state_dict: Full weights under the model's own names, where the model itself holds only a partition.

    Raises:
        FileExistsError: ``folder`` exists.
    """
    from huggingface_hub import save_torch_state_dict
    from transformers import GenerationConfig

    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; nothing was written. Give another folder or remove that one")
    weights = stored_weights(hf_model, state_dict, dtype)
    config = copy.deepcopy(hf_model.config)
    config.architectures = [type(hf_model).__name__]
    config.text_config.use_cache = True  # training turns it off; generate() without it is quadratic
    stored_dtype = dtype if dtype is not None else next(iter(weights.values())).dtype
    for part in (config, config.text_config, config.vision_config):
        part.dtype = stored_dtype

    partial = folder.with_name(f".{folder.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)  # of a run that was killed while it wrote
    partial.mkdir(parents=True)
    save_torch_state_dict(weights, partial, metadata={"format": "pt"})
    config.save_pretrained(partial)
    tokenizer = processor.tokenizer
    GenerationConfig(
        eos_token_id=tokenizer.convert_tokens_to_ids(IM_END),
        pad_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
        do_sample=False,
    ).save_pretrained(partial)
    processor.save_pretrained(partial)
    for file in partial.rglob("*"):
        if file.is_file():
            sync_to_disk(file)
    partial.rename(folder)
    sync_to_disk(folder.parent)
    return folder


def stored_weights(
    hf_model: Any, state_dict: Mapping[str, Tensor] | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The tensors that a weight file holds: on the CPU, cast to ``dtype``, a tied head left out."""
    state = hf_model.state_dict() if state_dict is None else state_dict
    tied = {"lm_head.weight"} if hf_model.config.tie_word_embeddings else set()
    return {
        name: tensor.detach()
        .to(device="cpu", dtype=dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype)
        .contiguous()
        for name, tensor in state.items()
        if name not in tied
    }


def sync_to_disk(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def verify_export(folder: str | Path, live_state: Mapping[str, Tensor]) -> Any:
    """Load ``folder`` as a stranger would and compare it with the weights it should hold.

    Args:
        folder: A Hugging Face folder.
        live_state: The weights under the model's names, in any dtype; they are compared after the cast to the
            dtype of the file. A tied head may be in it or not.

    Returns:
        The loaded ``VideoLlama3ForConditionalGeneration``, in evaluation mode on the CPU.

    Raises:
        WrongExport: A key is missing, unexpected or of another shape, or a tensor differs; all are listed.
    """
    from transformers import VideoLlama3ForConditionalGeneration

    loaded_pair: Any = VideoLlama3ForConditionalGeneration.from_pretrained(
        str(folder), dtype="auto", output_loading_info=True
    )
    model, info = loaded_pair
    problems = [
        f"{what.replace('_', ' ')}: {', '.join(map(str, sorted(info[what])))}"
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info[what]
    ]
    loaded = model.state_dict()
    if absent := sorted(loaded.keys() - live_state.keys() - {"lm_head.weight"}):
        problems.append(f"not among the live weights: {', '.join(absent)}")
    for name, live in live_state.items():
        if name not in loaded:
            problems.append(f"not in the file: {name}")
        elif not torch.equal(loaded[name], live.detach().to("cpu", loaded[name].dtype)):
            problems.append(f"differs: {name}")
    if problems:
        shown = "\n  ".join(problems[:20])
        raise WrongExport(
            f"{folder} does not hold the weights it should ({len(problems)} problems):\n  {shown}"
        )
    return model


def locate_trained(folder: str | Path) -> tuple[Path, Path | None]:
    """Folders of the weights and of the adapters on them that ``folder`` means.

    ``folder`` is a run (its latest checkpoint is taken), a checkpoint, or a Hugging Face folder. A run with
    adapters keeps the weights they sit on once, in ``base``, and adapters alone in each checkpoint.

    Raises:
        FileNotFoundError, ValueError: Something is missing or damaged, or no such model; the text says which.
    """
    if is_run_folder(checkpoint := Path(folder).expanduser()):
        checkpoint = latest_checkpoint(checkpoint)
    adapter = checkpoint / "adapter"
    if not (adapter / "adapter_config.json").is_file():
        weights = resolve_weights(checkpoint)
        if (found := model_type(weights)) != MODEL_TYPES[0]:
            raise ValueError(
                f"{weights} holds a {found} model; a stage can start from it, and what that stage trains can be "
                "exported and asked"
            )
        refuse_damaged(weights)
        return weights, None
    base = checkpoint.parent.parent / "base"
    if not base.is_dir():
        raise FileNotFoundError(f"{base} is missing: the weights that the adapters in {adapter} belong to")
    refuse_damaged(weights := resolve_weights(base), adapter)
    return weights, adapter


def load_trained(folder: str | Path, *, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Model and processor of a run, a checkpoint or an export, ready to answer; adapters are merged.

    Args:
        folder: What ``locate_trained`` takes.
        dtype: Of the weights in memory; None takes that of the file.

    Returns:
        A ``VideoLlama3ForConditionalGeneration`` in evaluation mode on the CPU, and its processor.
    """
    from transformers import AutoProcessor, VideoLlama3ForConditionalGeneration

    weights, adapter = locate_trained(folder)
    model: Any = VideoLlama3ForConditionalGeneration.from_pretrained(
        str(weights), dtype=dtype if dtype is not None else "auto"
    )
    if adapter is not None:
        from vl3train.model.adapters import load_adapter, merge_adapter

        model = merge_adapter(load_adapter(model, adapter, is_trainable=False))
    return model.eval(), AutoProcessor.from_pretrained(str(weights))
