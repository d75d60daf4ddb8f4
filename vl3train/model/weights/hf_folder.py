"""Weights and processor as a Hugging Face folder: written, checked and read back.

What is written here loads with plain ``from_pretrained``: weights have the same names in memory and in the file.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vl3train.config.paths import MODEL_TYPES, model_type, resolve_start
from vl3train.contracts.files import whole_folder
from vl3train.contracts.tokens import END_OF_TEXT, IM_END
from vl3train.model.weights.headers.faults import refuse
from vl3train.model.weights.headers.files import adapter_faults
from vl3train.model.weights.headers.folder import Kind, inspect_folder
from vl3train.model.weights.headers.run_files import faults_of_start


class WrongExport(ValueError):  # noqa: N818 - its name says what it is
    """A written folder does not hold the weights that it should."""


def save_weights(
    hf_model: Any,
    processor: Any,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write model, processor, chat template and generation settings as one Hugging Face folder, whole or absent.

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
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; nothing was written. Give another folder or remove that one")
    with whole_folder(folder) as partial:
        write_folder(hf_model, processor, partial, dtype=dtype, state_dict=state_dict)
    return folder


def write_folder(
    hf_model: Any,
    processor: Any,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """What ``save_weights`` writes, into ``folder`` itself."""
    from huggingface_hub import save_torch_state_dict

    weights = stored_weights(hf_model, state_dict, dtype)
    stored_dtype = dtype if dtype is not None else next(iter(weights.values())).dtype
    save_torch_state_dict(weights, folder, metadata={"format": "pt"})
    _stored_config(hf_model, stored_dtype).save_pretrained(folder)
    _generation_config(processor.tokenizer).save_pretrained(folder)
    processor.save_pretrained(folder)


def _stored_config(hf_model: Any, dtype: torch.dtype) -> Any:
    config = copy.deepcopy(hf_model.config)
    config.architectures = [type(hf_model).__name__]
    config.text_config.use_cache = True  # training turns it off; generate() without it is quadratic
    for part in (config, config.text_config, config.vision_config):
        part.dtype = dtype
    return config


def _generation_config(tokenizer: Any) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        eos_token_id=tokenizer.convert_tokens_to_ids(IM_END),
        pad_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
        do_sample=False,
    )


def stored_weights(
    hf_model: Any, state_dict: Mapping[str, Tensor] | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The tensors that a weight file holds: on the CPU, cast to ``dtype``, without a tied head."""
    state = hf_model.state_dict() if state_dict is None else state_dict
    tied = {"lm_head.weight"} if hf_model.config.tie_word_embeddings else set()
    return {
        name: tensor.detach()
        .to(device="cpu", dtype=dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype)
        .contiguous()
        for name, tensor in state.items()
        if name not in tied
    }


def verify_export(folder: str | Path, live_state: Mapping[str, Tensor]) -> Any:
    """Load ``folder`` with plain transformers and compare it with the weights it should hold.

    Args:
        folder: A Hugging Face folder.
        live_state: The weights under the model's names, in any dtype: they are cast to the dtype of the file
            first. A tied head may be in it or not.

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
    """The folder of the weights that ``folder`` stands for, and that of the adapters, or None without adapters.

    ``folder`` is a run (its latest checkpoint is taken), a checkpoint, or a Hugging Face folder. A run with
    adapters stores the frozen weights once, in ``base``, and only adapters in each checkpoint.

    Raises:
        FileNotFoundError, ValueError: Something is missing or damaged, or is another model; the message says what.
    """
    weights, adapter = resolve_start(folder)
    if (found := model_type(weights)) != MODEL_TYPES[0]:
        raise ValueError(
            f"{weights} holds a {found} model; a stage can start from it, but only what that stage trains "
            "can be exported or asked"
        )
    refuse(weights, inspect_folder(weights, Kind.whole).faults)
    if adapter is not None:
        refuse(adapter, adapter_faults(adapter))
    return weights, adapter


def refuse_damaged(folder: str | Path) -> None:
    """Read every file of what ``locate_trained`` finds that a run wrote, with a digest in its manifest.

    An export has no manifest and passes. Raises ValueError where a file is not what was written.
    """
    found = faults_of_start(*resolve_start(folder))
    if found:
        lines = [f"{part} is damaged: {'; '.join(faults)}" for part, faults in found.items()]
        way_out = (
            "copy it again, or name an older checkpoint (vl3train verify-checkpoint tells which are whole)"
        )
        raise ValueError("\n".join(lines) + f"; {way_out}")


def load_trained(folder: str | Path, *, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Model and processor of a run, a checkpoint or an export, ready to answer.

    Adapters stay beside their weights, as in training: merged in bfloat16, most of a small change is lost.

    Args:
        folder: What ``locate_trained`` takes.
        dtype: Of the weights in memory; None takes that of the file.

    Returns:
        A ``VideoLlama3ForConditionalGeneration`` in evaluation mode on the CPU, and its processor.
    """
    from transformers import AutoProcessor, VideoLlama3ForConditionalGeneration

    weights, adapter = locate_trained(folder)
    refuse_damaged(folder)
    model: Any = VideoLlama3ForConditionalGeneration.from_pretrained(
        str(weights), dtype=dtype if dtype is not None else "auto"
    )
    if adapter is not None:
        from vl3train.model.adapters import load_adapter, round_base

        round_base(model, adapter)
        model = load_adapter(model, adapter, is_trainable=False).get_base_model()
    return model.eval(), AutoProcessor.from_pretrained(str(weights), trust_remote_code=False)
