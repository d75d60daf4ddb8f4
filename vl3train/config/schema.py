"""Every option: its type, its default, its meaning. The only home of a default; YAML says what differs.

Those of ``data`` stand in config/data_options.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from vl3train.config.choices import (
    AdapterKind,
    Attention,
    Device,
    Dtype,
    GemmBackend,
    MasterDtype,
    Memory,
    Recompute,
    Schedule,
    Tracker,
    WandbMode,
)
from vl3train.config.data_options import DataConfig

PARTS = ("vision_encoder", "projector", "language_model")
"""Parts of the model that a stage may train, each with a learning rate of its own."""


@dataclass(kw_only=True, slots=True)
class StageConfig:
    """What a stage of VideoLLaMA3 trains, and on what."""

    number: int = MISSING
    """1 to 4, in the order of the paper (arXiv:2501.13106, section 3)."""

    name: str = MISSING
    """The stage's file name; runs and reports are called so."""

    recipe: str = MISSING
    """Data mixture the paper uses here; ``data.recipe`` replaces it."""

    learning_rates: dict[str, float] = MISSING
    """Peak learning rate of each part this stage trains. A part not named is frozen, a tied head too."""

    image_merge_size: int = 1
    """Side of the patch square merged into one visual token of an image."""

    video_merge_size: int = 2
    """The same for a clip."""

    prune_frames: bool = False
    """Drop visual tokens of a clip that repeat the frame before (DiffFP, section 2.2 of the paper)."""

    init_from: str | None = None
    """Folder to start from: an output folder of the stage before, or any video_llama_3 checkpoint in Hugging
    Face form. Must be unset in stage 1, which starts from model.vision_encoder_from and
    model.language_model_from; must be set in stages 2 to 4."""


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The architecture and the published parts it is put together from."""

    name: str = MISSING
    """Size: debug, 2b or 7b."""

    vision_encoder_from: str | None = None
    """Stage 1: SigLIP checkpoint in Hugging Face form (folder or hub name)."""

    language_model_from: str | None = None
    """Stage 1: Qwen2 or Qwen2.5 checkpoint in Hugging Face form (folder or hub name)."""

    tokenizer_from: str | None = None
    """Folder or hub name of the tokenizer. Unset: language_model_from in stage 1, else stage.init_from."""

    learning_rates: dict[str, float] = field(default_factory=dict)
    """Replaces the stage's rate of a part that the stage trains. For models that start from random weights:
    the published rates are for pretrained ones."""

    initializer_range: float = 0.02
    """Standard deviation of the projector's random weights in stage 1."""

    num_parameters: dict[str, int] = field(default_factory=dict)
    """Parameters of each part, for tables and estimates; checked against the model when it is built."""

    costs: dict[str, int] = field(
        default_factory=lambda: {"token": 3_087_000, "token_pair": 86, "patch": 824_000, "patch_pair": 124}
    )
    """Work by which packs are balanced: of a token and of a pair of tokens of one sample (language model), of a
    patch and of a pair of patches of one frame (encoder). Whole numbers of any unit. These are kFLOP of a forward
    pass of the 2B: twice the parameters; 2 x layers x width for a pair, of which causal attention needs half."""


@dataclass(kw_only=True, slots=True)
class StepConfig:
    """The global batch of one optimizer step. It does not depend on the number of ranks."""

    max_tokens: int = 16384
    """Tokens of one pack; also the longest sample."""

    max_patches: int = 65536
    """Encoder patches of one pack."""

    max_visual_items: int | None = None
    """Images and clips of one pack. null: as many as its tokens and patches allow."""

    global_packs: int = 16
    """Packs in one step, over all ranks. Must divide by the number of ranks."""

    max_samples: int | None = 128
    """Samples in one step; a step also closes when its packs are full. null: only then."""

    fill: float = 0.95
    """Share of the packs' tokens and patches that a step aims at; the rest is room for balance."""


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW, its schedule and clipping."""

    weight_decay: float = 0.0
    """Decoupled weight decay; not applied to biases and norms."""

    beta1: float = 0.9
    """Decay of AdamW's mean of gradients."""

    beta2: float = 0.999
    """Decay of AdamW's mean of squares."""

    eps: float = 1e-8
    """AdamW's epsilon."""

    state_dtype: Dtype = Dtype.float32
    """AdamW's two moments: float32 takes 8 bytes for each trained parameter; bfloat16 takes 4, with stochastic
    rounding so that small changes are not lost (needs zero_stage 1 or more)."""

    master_dtype: MasterDtype = MasterDtype.float32
    """Under machine.dtype=bfloat16: float32 keeps masters of the trained weights, 4 bytes each; split keeps the same
    masters as the weights and the 16 bits that these lack, 2 bytes each (needs machine.offload_optimizer=true);
    bfloat16 keeps none and rounds the weights themselves at random (needs zero_stage=1 and state_dtype=bfloat16)."""

    schedule: Schedule = Schedule.cosine
    """cosine falls to min_lr_fraction at the last step; constant stays."""

    warmup_fraction: float = 0.03
    """Share of the steps in which the rates rise linearly."""

    min_lr_fraction: float = 0.0
    """Where the cosine ends, as a share of the peak."""

    max_grad_norm: float = 1.0
    """Gradients of the whole model are scaled down to this L2 norm. 0 turns clipping off."""


@dataclass(kw_only=True, slots=True)
class MachineConfig:
    """How the work is laid on the machine."""

    device: Device = Device.auto
    """auto is cuda where there is one."""

    dp_size: int = 1
    """Data-parallel ranks that the run will have: what ``torchrun --nproc-per-node`` times nodes gives."""

    zero_stage: int = 1
    """DeepSpeed ZeRO: 0 nothing is partitioned, 1 optimizer states, 2 gradients too, 3 weights too."""

    dtype: Dtype = Dtype.bfloat16
    """Weights and activations; masters and the optimizer's states are float32 unless optim says otherwise."""

    attention: Attention = Attention.auto
    """auto takes the first that can serve: flash_attn_4, flash_attn, torch_varlen, reference."""

    gemm_backend: GemmBackend = GemmBackend.auto
    """Who makes the matrix products of compiled layers: quack with what follows them (Hopper GPUs), torch, or auto, the
    first of them that serves and is right here."""

    memory: Memory = Memory.given
    """given: every layer computes again what recompute_vision and recompute_language say. auto: the least for which
    each pack fits the GPU's memory, chosen layer by layer (docs/memory.md); the two options are not read then."""

    recompute_vision: Recompute = Recompute.layer
    """What each encoder layer computes again in the backward pass: nothing; elementwise (keeps the results of
    matrix products and attention); mlp (as elementwise, and the products that widen the row); layer (everything);
    offload (everything, and its input waits in the host's memory)."""

    recompute_language: Recompute = Recompute.layer
    """The same for each language-model layer."""

    offload_optimizer: bool = False
    """AdamW's two means wait in the host's page-locked memory, 8 bytes for each trained parameter, and cross the link
    twice a step: activations may use that memory of the GPU (docs/memory.md). Needs zero_stage=1, dtype=bfloat16 and
    optim.state_dtype=float32; best with memory=auto."""

    compile_layers: bool = False
    """torch.compile each layer: a minute or two at a first start, less where torch still has its graphs on disk; then
    far fewer kernels. Not with zero_stage=3."""

    loss_chunk_tokens: int = 2048
    """Supervised tokens whose logits exist at one time."""


@dataclass(kw_only=True, slots=True)
class AdapterConfig:
    """Low-rank adapters instead of full weights."""

    kind: AdapterKind = AdapterKind.none
    """none trains the parts in full; lora adds adapters to ``parts`` and freezes their full weights."""

    parts: list[str] = field(default_factory=lambda: ["language_model"])
    """Parts that get adapters: language_model, vision_encoder. Other parts of the stage train in full."""

    rank: int = 64
    """Rank of each adapter."""

    alpha: int = 16
    """The adapter's output is scaled by alpha / rank."""

    dropout: float = 0.05
    """Dropout on the adapter's input."""

    learning_rate: float | None = None
    """Rate of the adapters. Unset: the stage's rate of the part they sit on."""


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """Where figures go besides the console and metrics.jsonl."""

    kind: Tracker = Tracker.none
    """none or wandb."""

    project: str = "vl3train"
    """W&B project."""

    entity: str | None = None
    """W&B team or user."""

    mode: WandbMode = WandbMode.auto
    """W&B mode."""


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """One run: its length, its folder, what it keeps."""

    output_dir: str = MISSING
    """Folder of this run: checkpoints, metrics.jsonl, config.yaml, ledger. A run found there is resumed."""

    seed: int = 0
    """Order of the data and random weights follow from it."""

    num_epochs: float = 1.0
    """Virtual epochs to train; a fraction is allowed. num_steps replaces it."""

    num_steps: int | None = None
    """Steps to train. Unset: what num_epochs makes."""

    save_steps: int = 1000
    """A checkpoint is written every so many steps, and after the last."""

    keep_checkpoints: int = 2
    """Older checkpoints beyond this many are deleted after a newer one is complete."""

    log_steps: int = 1
    """Figures are logged every so many steps."""

    evaluate_at_start: bool = False
    """Evaluate on the recipe's held-out samples before the first step."""

    evaluate_at_end: bool = True
    """Evaluate on them after the last step."""

    evaluate_steps: int = 0
    """Evaluate every so many steps as well. 0: never in between."""

    stop_after_steps: int | None = None
    """Save and stop cleanly after this many steps of this launch: for time-limited queues. The schedule is
    that of the whole run."""


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """A whole training run."""

    stage: StageConfig = field(default_factory=StageConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    step: StepConfig = field(default_factory=StepConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    run: RunConfig = field(default_factory=RunConfig)
