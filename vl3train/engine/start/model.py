"""The third step of a start: the model, what of it trains, its adapters, its kernels.

model/adapters.py is imported where there are adapters: peft imports bitsandbytes where that is installed, and this the
compiler, a third of all that a start imports.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from vl3train.config.choices import AdapterInit, AdapterKind, Base4Bit, Dtype
from vl3train.config.paths import encoder_folder, is_tuned_encoder, resolve_start, starts_from_parts
from vl3train.config.rules import adapter_rates, full_rates
from vl3train.config.schema import TrainConfig
from vl3train.engine.checkpoints.find import refuse_damaged
from vl3train.engine.monitor.console import Console
from vl3train.engine.ranks import Rank, RunError
from vl3train.engine.start.folder import OutputFolder, load_processor
from vl3train.engine.start.kernels import Kernels, choose_kernels
from vl3train.model.kernels.prove import Proving
from vl3train.model.layers.nf4_linear import digest_in_4_bits, hold_in_4_bits
from vl3train.model.packed_forward import PackedModel
from vl3train.model.trainable import count_parameters, parameter_groups, set_trainable
from vl3train.model.weights.from_parts import init_from_parts, load_model
from vl3train.model.weights.headers.faults import refuse
from vl3train.model.weights.headers.manifest import write_manifest
from vl3train.model.weights.headers.run_files import manifest_digest
from vl3train.model.weights.headers.vocabulary import read_vocabulary, vocabulary_faults
from vl3train.model.weights.hf_folder import save_weights

transformers_logging.disable_progress_bar()  # one bar a rank, for a second


@dataclass(frozen=True, slots=True, kw_only=True)
class RunModel:
    """The model of a run on its device, not yet under DeepSpeed."""

    hf_model: Any  # VideoLlama3ForConditionalGeneration of transformers
    peft_model: Any | None  # the same model with its adapters, as peft holds it
    base_digest: str | None  # of the weights under the adapters, where they are held in 4 bits
    base_manifest: str | None  # digest of the list of the base's files, where there are adapters
    packed: PackedModel
    counts: dict[str, tuple[int, int]]  # trained and all parameters of each part
    rates: dict[str, float]  # peak learning rate of each part that trains
    groups: list[dict[str, Any]]  # for the optimizer
    kernels: Kernels

    def write(self, partial: Path, processor_dir: Path, state: Mapping[str, Tensor]) -> None:
        """Write the adapter below ``partial``, or the weights with their processor. ``state`` is the whole model's."""
        if self.peft_model is not None:
            from vl3train.model.adapters import save_adapter

            save_adapter(self.peft_model, partial / "adapter", state_dict=dict(state))
        else:
            save_weights(
                self.hf_model, load_processor(processor_dir), partial / "weights", state_dict=dict(state)
            )


def start_model(
    cfg: TrainConfig, folder: OutputFolder, rank: Rank, console: Console, proving: Proving
) -> RunModel:
    """Build the model, choose what trains, add adapters, choose and check kernels. All ranks call it.

    Raises RunError on every rank where the weights cannot be read or have another size than model=NAME says, or
    where a kernel that the config asks for cannot be used.
    """
    refuse_damaged_start(cfg, folder, rank)
    hf_model: Any = None
    problem = None
    try:
        hf_model = build_model(cfg, folder.checkpoint, folder.processor_dir)
    except (OSError, ValueError) as error:
        problem = f"the model cannot be built: {error}"
    rank.agree(problem)
    refuse_other_size(cfg, count_parameters(hf_model))
    full, low_rank = full_rates(cfg), adapter_rates(cfg)
    rates = {**full, **low_rank}
    set_trainable(hf_model, full)
    peft_model = base_digest = None
    if cfg.adapter.kind is AdapterKind.lora:
        peft_model, base_digest = start_adapters(cfg, hf_model, folder, rank)
    counts = count_parameters(hf_model)
    groups = parameter_groups(hf_model, rates, cfg.optim.weight_decay)
    hf_model.to(rank.device)
    if rank.device.type == "cuda":
        console.message(
            "checking kernels against float64, where this machine has not done so before; a minute and more where they "
            "must be compiled first"
        )
    kernels = choose_kernels(cfg.machine, hf_model, rank, proving, shares_prefix=cfg.data.share_prefix)
    packed = PackedModel(
        hf_model,
        kernels.attention.name,
        recompute_vision=cfg.machine.recompute_vision,
        recompute_language=cfg.machine.recompute_language,
        compile_layers=cfg.machine.compile_layers,
        gemm_backend=kernels.gemm_backend.name,
        partitioned_weights=cfg.machine.zero_stage == 3,
    )
    return RunModel(
        hf_model=hf_model,
        peft_model=peft_model,
        base_digest=base_digest,
        base_manifest=None if peft_model is None else manifest_digest(folder.path / "base"),
        packed=packed,
        counts=counts,
        rates=rates,
        groups=groups,
        kernels=kernels,
    )


def refuse_damaged_start(cfg: TrainConfig, folder: OutputFolder, rank: Rank) -> None:
    """Raise RunError on every rank where weights that a run wrote, to start from or as a base, are damaged."""
    as_trained = "copy it again from where it was; the adapters were trained on exactly these weights"
    if folder.checkpoint is not None:
        # The checkpoint itself was read when it was found. That the base is missing is told when it is loaded.
        base, adapters = folder.path / "base", folder.checkpoint / "adapter"
        if base.is_dir() and adapters.is_dir():
            refuse_damaged(base, adapters, rank, way_out={base: as_trained})
    elif starts_from_parts(cfg):
        if is_tuned_encoder(encoder := cfg.model.vision_encoder_from):
            weights = encoder_folder(str(encoder))
            refuse_damaged(weights, None, rank, way_out={weights: "copy it again"})
    elif cfg.stage.init_from is not None:
        weights, adapter = resolve_start(cfg.stage.init_from)
        older = (
            "copy it again, or name an older checkpoint (vl3train verify-checkpoint tells which are whole)"
        )
        way_out = {weights: older} if adapter is None else {weights: as_trained, adapter: older}
        refuse_damaged(weights, adapter, rank, way_out=way_out)


def build_model(cfg: TrainConfig, checkpoint: Path | None, processor_dir: Path) -> Any:
    """The transformers model: from the checkpoint to resume, the stage before, or the published parts.

    Raises OSError or ValueError where weights are missing, damaged or of another model.
    """
    dtype = torch.bfloat16 if cfg.machine.dtype is Dtype.bfloat16 else torch.float32
    model = _load(cfg, checkpoint, processor_dir, dtype)
    refuse_other_tokens(model.config, processor_dir)
    return model


def _load(cfg: TrainConfig, checkpoint: Path | None, processor_dir: Path, dtype: torch.dtype) -> Any:
    if checkpoint is not None:
        return load_model(resolve_start(checkpoint)[0], dtype=dtype)
    if cfg.stage.init_from is not None:
        weights, adapter = resolve_start(cfg.stage.init_from)
        if adapter is not None:
            from vl3train.model.adapters import load_merged

            return load_merged(weights, adapter, dtype)
        return load_model(weights, dtype=dtype, tokenizer_from=processor_dir)
    assert cfg.model.vision_encoder_from is not None, "config rules refuse this"
    assert cfg.model.language_model_from is not None, "config rules refuse this"
    processor = load_processor(processor_dir)
    return init_from_parts(
        cfg.model.vision_encoder_from,
        cfg.model.language_model_from,
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        initializer_range=cfg.model.initializer_range,
        seed=cfg.run.seed,
        dtype=dtype,
    )


def start_adapters(
    cfg: TrainConfig, hf_model: Any, folder: OutputFolder, rank: Rank
) -> tuple[Any, str | None]:
    """Keep the base, add adapters, put the base into 4 bits. All ranks call it.

    Checkpoints hold adapters only; ``<output_dir>/base`` holds what they are on, once. PiSSA takes the principal parts
    out of the weights first, so its base is what is left, and every rank takes that from the folder.

    Returns the PeftModel, and a digest of the weights in 4 bits: a run that goes on must have the same.

    Raises RunError on every rank where the model has no such modules.
    """
    from vl3train.model.adapters import add_adapters, take_base

    adapter, is_new = cfg.adapter, folder.checkpoint is None
    in_4_bits = adapter.base_4bit is Base4Bit.nf4
    if in_4_bits and rank.device.type == "cuda" and find_spec("bitsandbytes") is None:
        raise RunError("adapter.base_4bit=nf4 needs bitsandbytes on a GPU: pip install 'vl3train[qlora]'")
    base = folder.path / "base"
    hf_model.name_or_path = str(base.resolve())  # adapters name it as their base
    changes_base = is_new and adapter.init in (AdapterInit.pissa, AdapterInit.pissa_niter_16)
    problem = peft_model = None
    if not changes_base:
        keep_base(hf_model, folder, rank)
    try:
        peft_model = add_adapters(hf_model, adapter, is_new=is_new)
    except ValueError as error:
        problem = str(error)
    rank.agree(problem)
    if changes_base:
        keep_base(hf_model, folder, rank)
        if not rank.is_first:
            take_base(hf_model, base)
    digest = None
    if in_4_bits:
        hold_in_4_bits(hf_model, adapter.base_4bit_parts, rank.device)
        digest = digest_in_4_bits(hf_model)
        different = len(set(rank.gather(digest))) > 1
        rank.agree("the ranks' weights in 4 bits differ: are their GPUs of one kind?" if different else None)
    return peft_model, digest


def keep_base(hf_model: Any, folder: OutputFolder, rank: Rank) -> None:
    """Write the weights that adapters are on to ``<output_dir>/base``, once."""
    from vl3train.model.adapters import base_state

    base = folder.path / "base"
    if rank.is_first and not base.exists():
        save_weights(hf_model, load_processor(folder.processor_dir), base, state_dict=base_state(hf_model))
        write_manifest(base)
    rank.barrier()


def refuse_other_tokens(hf_config: Any, processor_dir: Path) -> None:
    """Raise ValueError where the run's tokenizer has ids without a row in the embedding, or other placeholders.

    Folders on this machine were compared before the start (model/weights/headers/start.py). This is for names on the
    hub, whose folders are read after their download.
    """
    text = hf_config.text_config
    ids = {"image_token_id": hf_config.image_token_id, "video_token_id": hf_config.video_token_id}
    ids |= {
        name: found
        for name in ("eos_token_id", "pad_token_id")
        if (found := getattr(text, name, None)) is not None
    }
    vocabulary, faults = read_vocabulary(processor_dir)
    if vocabulary is not None:
        faults = vocabulary_faults(vocabulary, text.vocab_size, ids)
    refuse("the tokenizer", faults)


def refuse_other_size(cfg: TrainConfig, counts: dict[str, tuple[int, int]]) -> None:
    """Raise RunError where the weights have another size than model=NAME says, as with model=2b and a 7B checkpoint."""
    wrong = [
        f"  {part}: {counts[part][1]:,} parameters in the weights, {size:,} in model={cfg.model.name}"
        for part, size in cfg.model.num_parameters.items()
        if counts[part][1] != size
    ]
    if wrong:
        raise RunError(
            "\n".join(["the weights to start from have another size:", *wrong, "choose another model="])
        )
