"""Which modules of a model get adapters, which train in full beside them, how an adapter's output is scaled, and how
large all this is. Works on names and sizes; imports no torch.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence

from vl3train.config.choices import Base4Bit
from vl3train.config.optim_options import AdapterConfig
from vl3train.contracts.shapes import TowerShape, nf4_bytes

PART_LAYERS = {
    "language_model": r"model\.language_model\.layers\.\d+\.(?:self_attn\.[qkvo]|mlp\.(?:gate|up|down))_proj",
    "vision_encoder": r"model\.vision_model\.encoder\.layers\.\d+\.(?:self_attn\.(?:[qkv]|out)_proj|mlp\.fc[12])",
}
"""The linear layers of each part that can have an adapter, by full name: q_proj and others are in both towers."""

NO_RATIO = 2.0
"""What an adapter's output is multiplied with where no alpha is given: see adapter.alpha."""


def alpha_of(adapter: AdapterConfig, part: str | None) -> float:
    """peft's ``lora_alpha`` of a part's adapters; None: of parts that nothing is said about.

    >>> alpha_of(AdapterConfig(rank=8), None), alpha_of(AdapterConfig(rank=16, use_rslora=True), None)
    (16.0, 8.0)
    """
    given = adapter.part_alphas.get(part or "", adapter.alpha)
    if given is not None:
        return given
    rank = adapter.part_ranks.get(part or "", adapter.rank)
    return NO_RATIO * (math.sqrt(rank) if adapter.use_rslora else rank)


def target_pattern(modules: Sequence[str], adapter: AdapterConfig) -> str:
    """A regular expression for the full names of the layers that get adapters, as peft's ``target_modules``.

    ``modules`` are the full names of the model's modules. Raises ValueError for an entry of adapter.target_modules that
    no layer of the parts matches; it names near ones.
    """
    of_parts = "|".join(PART_LAYERS[part] for part in sorted(adapter.parts))
    if adapter.target_modules is None:
        return of_parts
    names = [name for name in modules if re.fullmatch(of_parts, name)]
    patterns = [_as_pattern(entry) for entry in adapter.target_modules]
    found = [
        f"adapter.target_modules has {entry!r}, which is no linear layer of {' or '.join(adapter.parts)}; "
        f"{_near(entry, names)}"
        for entry, pattern in zip(adapter.target_modules, patterns, strict=True)
        if not any(re.fullmatch(pattern, name) for name in names)
    ]
    if found:
        raise ValueError("\n".join(found))
    return f"(?=(?:{of_parts})$)(?:{'|'.join(patterns)})"


def full_modules(modules: Sequence[str], names: Sequence[str], *, tied: bool) -> list[str]:
    """Full names of modules that train in full beside adapters.

    ``modules`` are the full names of the model's modules that hold weights; ``tied`` says whether head and embedding
    are one tensor. Raises ValueError for a name that the model does not have, and for a head that is tied: peft would
    train a copy that only one of both uses.
    """
    found, problems = [], []
    for entry in names:
        matching = [name for name in modules if name == entry or name.endswith(f".{entry}")]
        if not matching:
            problems.append(
                f"adapter.modules_to_save has {entry!r}, which is no module; {_near(entry, modules)}"
            )
        elif entry.rpartition(".")[2] in ("lm_head", "embed_tokens") and tied:
            problems.append(
                f"adapter.modules_to_save has {entry!r}: this model's head and embedding are one tensor, and peft "
                "would train a copy that only one of them uses; leave it out"
            )
        found += matching
    if problems:
        raise ValueError("\n".join(problems))
    return found


def _as_pattern(entry: str) -> str:
    """A plain name stands for every layer whose last names it is."""
    return rf"(?:.*\.)?{re.escape(entry)}" if re.fullmatch(r"[\w.]+", entry) else f"(?:{entry})"


def _near(entry: str, names: Sequence[str]) -> str:
    """What may have been meant: full names, or their last words.

    >>> _near("qproj", ["layers.0.self_attn.q_proj", "layers.0.mlp.up_proj"])
    'near ones are q_proj'
    """
    last = sorted({name.rpartition(".")[2] for name in names})
    word = re.sub(r"[^\w.]+", "", entry).rpartition(".")[2]
    likely = difflib.get_close_matches(word, last, n=3) or difflib.get_close_matches(entry, names, n=2)
    return f"near ones are {', '.join(likely)}" if likely else f"there are {', '.join(last[:20])}"


def adapter_sizes(adapter: AdapterConfig, towers: Mapping[str, TowerShape]) -> dict[str, int]:
    """Parameters of the adapters of each part, for towers of these shapes."""
    layers = {
        name: (part, out, inner) for part, tower in towers.items() for name, out, inner in layers_of(tower)
    }
    pattern = target_pattern(list(layers), adapter)
    sizes = dict.fromkeys(adapter.parts, 0)
    for name, (part, out, inner) in layers.items():
        if re.fullmatch(pattern, name):
            rank = adapter.part_ranks.get(part, adapter.rank)
            sizes[part] += rank * (out + inner) + (out if adapter.use_dora else 0)
    return sizes


def layers_of(tower: TowerShape) -> Iterator[tuple[str, int, int]]:
    """Full name, outputs and inputs of each linear layer of a tower that can have an adapter or be held in 4 bits."""
    hidden, inner = tower.hidden_size, tower.intermediate_size
    heads, kv_heads = tower.num_heads * tower.head_dim, tower.num_kv_heads * tower.head_dim
    sizes = {"q_proj": (heads, hidden), "k_proj": (kv_heads, hidden), "v_proj": (kv_heads, hidden)}
    if tower.is_decoder:
        path, out = "model.language_model.layers", "o_proj"
        mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    else:
        path, out = "model.vision_model.encoder.layers", "out_proj"
        mlp = {"fc1": (inner, hidden), "fc2": (hidden, inner)}
    for number in range(tower.num_layers):
        for name, size in {**sizes, out: (hidden, heads)}.items():
            yield f"{path}.{number}.self_attn.{name}", *size
        for name, size in mlp.items():
            yield f"{path}.{number}.mlp.{name}", *size


def saved_in_4_bits(adapter: AdapterConfig, towers: Mapping[str, TowerShape], width: int) -> int:
    """Bytes that weights in 4 bits take less than weights of ``width`` bytes a value."""
    if adapter.base_4bit is Base4Bit.none:
        return 0
    values = [out * inner for part in adapter.base_4bit_parts for _, out, inner in layers_of(towers[part])]
    return sum(width * value - nf4_bytes(value) for value in values)
