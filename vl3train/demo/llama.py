"""A Llama as a Qwen2, which has the same layers, and biases of queries, keys and values beside: they become zero."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

from vl3train.contracts.tokens import END_OF_TEXT, IM_END, IM_START
from vl3train.model.weights.headers.faults import Fault, refuse
from vl3train.model.weights.processor import prepare_tokenizer

COPIED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "attention_dropout",
    "hidden_act",
)
"""Fields that mean the same in both configs."""
PROBE = f"{IM_START}user\nHow many 3 x 14 pixels? Größe: 2.50{IM_END}\n"
WITHOUT = "take a Llama without it: SmolLM2 and TinyLlama fit"


def write_language_model(source: str, out: Path) -> int:
    """Write the Llama in ``source`` and its tokenizer into the folder ``out`` as a Qwen2; returns its parameters.

    The written folder is read again and compared with the source: tokens, and logits in its own dtype.

    Args:
        source: a .gguf file, a folder in Hugging Face form, or a hub name.
        out: an empty folder.

    Raises:
        ValueError: the source cannot be read, is no Llama, has what a Qwen2 has not, or lacks ChatML's tokens.
    """
    place, more = _opened(source)
    config: Any = _read(source, AutoConfig, place, **more)
    refuse(source, faults_of(config))
    tokenizer: Any = _read(source, AutoTokenizer, place, **more)
    # This class keeps what tokenizer.json says. Qwen2's own would cut text into words by Qwen2's pattern.
    FastTokenizer(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(out)
    prepared = prepare_tokenizer(out)
    prepared.save_pretrained(out)
    dtype = torch.float32 if more else "auto"
    llama: Any = _read(source, AutoModelForCausalLM, place, dtype=dtype, **more)
    qwen2 = as_qwen2(llama.eval(), num_tokens=len(prepared))
    qwen2.config.eos_token_id = prepared.convert_tokens_to_ids(IM_END)
    qwen2.config.pad_token_id = prepared.convert_tokens_to_ids(END_OF_TEXT)
    qwen2.generation_config.update(
        eos_token_id=qwen2.config.eos_token_id, pad_token_id=qwen2.config.pad_token_id
    )
    qwen2.save_pretrained(out)
    compare(llama, tokenizer, out)
    return qwen2.num_parameters()


def faults_of(config: Any) -> list[Fault]:
    """What keeps a model from being a Qwen2."""
    if config.model_type == "qwen2":
        return [Fault("it is a Qwen2 already", "name it in model.language_model_from")]
    if config.model_type != "llama":
        return [Fault(f"it is a {config.model_type}, not a Llama", "take a Llama or a Qwen2")]
    faults = []
    if config.attention_bias:
        faults.append(
            Fault("its attention has a bias behind the output (attention_bias), a Qwen2 has none", WITHOUT)
        )
    if config.mlp_bias:
        faults.append(Fault("its MLP has biases (mlp_bias), a Qwen2 has none", WITHOUT))
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        what = (
            f"its {config.num_attention_heads} heads of {config.head_dim} are not hidden_size="
            f"{config.hidden_size} together (head_dim), in a Qwen2 they are"
        )
        faults.append(Fault(what, WITHOUT))
    if config.hidden_act != "silu":
        faults.append(Fault(f"its MLP has {config.hidden_act} (hidden_act), a Qwen2 has silu", WITHOUT))
    return faults


def as_qwen2(llama: Any, *, num_tokens: int) -> Any:
    """A Qwen2 with the weights of ``llama``, in the same dtype, and a row for each of ``num_tokens`` tokens at least.

    New rows of embedding and head are the mean of the others, so that no new token is likely before it is trained.
    """
    rows = math.ceil(max(num_tokens, llama.config.vocab_size) / 64) * 64
    config = Qwen2Config(
        **{name: getattr(llama.config, name) for name in COPIED}, vocab_size=rows, bos_token_id=None
    )
    weights = dict(llama.state_dict())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        matrix = weights[name]
        mean = matrix.mean(0, dtype=torch.float32).to(matrix.dtype)
        weights[name] = torch.cat((matrix, mean.expand(rows - len(matrix), -1)))
    for layer in range(llama.config.num_hidden_layers):
        for name in ("q_proj", "k_proj", "v_proj"):
            prefix = f"model.layers.{layer}.self_attn.{name}"
            weights[f"{prefix}.bias"] = torch.zeros(len(weights[f"{prefix}.weight"]))
    qwen2 = Qwen2ForCausalLM(config).to(llama.dtype)
    qwen2.load_state_dict(weights)
    return qwen2.eval()


def compare(llama: Any, tokenizer: Any, folder: Path) -> None:
    """Raise ValueError where ``folder`` reads a text or continues it otherwise than ``llama`` does."""
    written = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    ids = tokenizer(PROBE, return_tensors="pt", add_special_tokens=False).input_ids
    if ids.tolist()[0] != written(PROBE, add_special_tokens=False).input_ids:
        raise ValueError(f"the tokenizer in {folder} cuts {PROBE!r} into other tokens than the source")
    qwen2: Any = Qwen2ForCausalLM.from_pretrained(folder, dtype=llama.dtype)
    with torch.no_grad():
        expected = llama(input_ids=ids).logits.float()
        found = qwen2.eval()(input_ids=ids).logits[..., : expected.shape[-1]].float()
    difference = float((found - expected).abs().max())
    # Kernels may add in another order where shapes differ; a wrong mapping changes the logits as a whole.
    if difference > 16 * torch.finfo(llama.dtype).eps * float(expected.abs().max()):
        raise ValueError(f"the Qwen2 in {folder} has other logits than the source, by up to {difference:.3g}")


def _opened(source: str) -> tuple[str, dict[str, str]]:
    """What transformers' ``from_pretrained`` takes for ``source``."""
    file = Path(source)
    if file.suffix != ".gguf":
        return source, {}
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    if find_spec("gguf") is None:
        raise ValueError(f"{file} needs a package to be read: pip install gguf")
    return str(file.parent), {"gguf_file": file.name}


def _read(source: str, auto_class: Any, place: str, **more: Any) -> Any:
    """``from_pretrained``, whose many kinds of error for a wrong or damaged source become one."""
    try:
        return auto_class.from_pretrained(place, trust_remote_code=False, **more)
    except (ValueError, OSError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{source} cannot be read as a language model ({' '.join(str(error).split())[:300]}). SOURCE is a folder "
            "with config.json, tokenizer.json and weights, a .gguf file, or a hub name; where there is no network, "
            f"download it elsewhere: hf download {source} --local-dir FOLDER"
        ) from error
