"""Options that take one of a few words. A wrong word is refused, and the answer lists the right ones."""

from __future__ import annotations

from enum import Enum


class Dtype(Enum):
    """Number format of weights and activations in training."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class MasterDtype(Enum):
    """Format of the master copy of bfloat16 weights. ``split`` is float32 too: the weight is its upper 16 bits."""

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
    """Library for the matrix products of compiled layers (model/kernels/check.py)."""

    auto = "auto"
    quack = "quack"
    torch = "torch"


class FrameSampling(Enum):
    """Which frame stands for which time of a clip (docs/frame_sampling.md)."""

    transformers = "transformers"
    original = "original"


class Recompute(Enum):
    """What a layer recomputes in the backward pass. Each choice keeps less memory than the one before.

    Bytes that a layer keeps for each row in bfloat16, with H = hidden_size and I = intermediate_size:
    nothing: about 2 (9 H + 3 I).
    elementwise: 2 (6 H + I) in the encoder, 2 (5 H + 2 I) in the language model.
    mlp: the same without I. layer: 2 H. offload: none on the GPU; the 2 H of ``layer`` go to the host's memory.
    With ``nothing``, compiled layers keep what they keep with ``elementwise``; with machine.gemm_backend=quack also the
    input of the MLP's last product, 2 I.
    """

    nothing = "nothing"
    elementwise = "elementwise"
    mlp = "mlp"
    layer = "layer"
    offload = "offload"


class Memory(Enum):
    """Who decides what each layer recomputes: the options (given), or the run (auto)."""

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


class StreamSupervision(Enum):
    """What is learned of a streaming record besides its answers (data/render/stream_tokens.py)."""

    training = "training"
    released = "released"
    answers = "answers"


class AdapterKind(Enum):
    """How a part is trained."""

    none = "none"
    lora = "lora"


class AdapterInit(Enum):
    """First weights of adapters, in peft's words (``init_lora_weights``)."""

    default = "default"
    gaussian = "gaussian"
    pissa = "pissa"
    pissa_niter_16 = "pissa_niter_16"


class Base4Bit(Enum):
    """How the frozen weights under adapters are held."""

    none = "none"
    nf4 = "nf4"


class Grey16(Enum):
    """Grey of more than 8 bits. ``clip``: white over 255, as transformers; ``scale``: by the picture's own depth."""

    clip = "clip"
    scale = "scale"


class Transparent(Enum):
    """Transparent pixels. ``drop``: the colours behind show, as in transformers' load_image; ``white``: over white."""

    drop = "drop"
    white = "white"


class BestFigure(Enum):
    """The held-out figure by which the best checkpoint is told: of all held-out samples together."""

    none = "none"
    loss = "loss"
    accuracy = "accuracy"


class Tracker(Enum):
    """Where metrics go, besides the console and metrics.jsonl."""

    none = "none"
    wandb = "wandb"
    tensorboard = "tensorboard"


class WandbMode(Enum):
    """``auto`` is online when W&B has a key, else offline; ``wandb sync`` uploads an offline run later."""

    auto = "auto"
    online = "online"
    offline = "offline"
