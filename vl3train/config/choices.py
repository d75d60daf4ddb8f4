"""Options that take one of a few words: a wrong one is refused with the right ones listed."""

from __future__ import annotations

from enum import Enum


class Dtype(Enum):
    """Number format of weights and activations in training."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class MasterDtype(Enum):
    """How masters of bfloat16 weights are kept; ``split`` is float32 too, its upper half being the weight."""

    float32 = "float32"
    split = "split"
    bfloat16 = "bfloat16"


class Attention(Enum):
    """Kernel for variable-length attention (model/attention/backends.py)."""

    auto = "auto"
    flash_attn_4 = "flash_attn_4"
    flash_attn = "flash_attn"
    torch_varlen = "torch_varlen"
    reference = "reference"


class GemmBackend(Enum):
    """Who makes the matrix products of compiled layers (model/kernels/check.py)."""

    auto = "auto"
    quack = "quack"
    torch = "torch"


class Recompute(Enum):
    """What a layer computes again in the backward pass instead of keeping it; each keeps less than the one before.

    Bytes a layer keeps for each row of width H with an MLP of width I (bfloat16): nothing about 2 (9 H + 3 I),
    elementwise 2 (6 H + I) in the encoder and 2 (5 H + 2 I) in the language model, mlp the same without I, layer 2 H,
    offload none: what ``layer`` keeps waits in the host's memory. Compiled layers keep at ``nothing`` what they keep at
    elementwise, and with quack's products the rows that enter the last product of the MLP, 2 I.
    """

    nothing = "nothing"
    elementwise = "elementwise"
    mlp = "mlp"
    layer = "layer"
    offload = "offload"


class Memory(Enum):
    """Who says what each layer computes again."""

    given = "given"
    auto = "auto"


class Device(Enum):
    """Where the model runs."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Schedule(Enum):
    """Shape of the learning rate after warm-up."""

    cosine = "cosine"
    constant = "constant"


class AdapterKind(Enum):
    """How a part is trained."""

    none = "none"
    lora = "lora"


class Tracker(Enum):
    """Where figures go besides the console and metrics.jsonl."""

    none = "none"
    wandb = "wandb"


class WandbMode(Enum):
    """``auto`` is online when a key is set, else offline: ``wandb sync`` uploads it later."""

    auto = "auto"
    online = "online"
    offline = "offline"
