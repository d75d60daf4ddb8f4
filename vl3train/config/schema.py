"""Every option: type, default and meaning. Defaults are written here only; YAML says what differs.

The section ``data`` is in config/data_options.py, ``optim`` and ``adapter`` in config/optim_options.py,
``finetune`` in config/finetune_options.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from vl3train.config.choices import (
    Attention,
    BestFigure,
    Device,
    Dtype,
    GemmBackend,
    Memory,
    Recompute,
    Tracker,
    WandbMode,
)
from vl3train.config.data_options import DataConfig
from vl3train.config.finetune_options import FinetuneConfig
from vl3train.config.optim_options import AdapterConfig, OptimConfig

PARTS = ("vision_encoder", "projector", "language_model")
"""Parts of the model that a stage may train, each with its own learning rate."""


@dataclass(kw_only=True, slots=True)
class StageConfig:
    """What a stage of VideoLLaMA3 trains, and on what."""

    number: int = MISSING
    """1 to 4, in the order of the paper (arXiv:2501.13106, section 3)."""

    name: str = MISSING
    """Name of the stage's file, and of its runs in reports."""

    recipe: str = MISSING
    """Data mixture of the paper for this stage; ``data.recipe`` replaces it."""

    learning_rates: dict[str, float] = MISSING
    """Peak learning rate of each part that this stage trains. A part without a rate is frozen, with its tied head:
    stage.learning_rates.vision_encoder=null (or 0) takes its rate away. optim.learning_rate sets all rates at once."""

    image_merge_size: int = 1
    """Images: side of the square of patches that is merged into one visual token."""

    video_merge_size: int = 2
    """Clips: the same side."""

    prune_frames: bool = False
    """Drop visual tokens of a clip that repeat the frame before (DiffFP, section 2.2 of the paper)."""

    init_from: str | None = None
    """Folder to start from: the output folder of the stage before, or any video_llama_3 checkpoint in Hugging Face
    form. Required in stages 2 to 4, unless model.vision_encoder_from is a VideoLLaMA3. Not allowed in stage 1, which
    starts from model.vision_encoder_from and model.language_model_from."""


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The model's size, and the published parts that stage 1 builds it from."""

    name: str = MISSING
    """Size: debug, smollm2, 2b or 7b."""

    vision_encoder_from: str | None = None
    """Stage 1: SigLIP checkpoint in Hugging Face form (folder or hub name), or a VideoLLaMA3 (folder or run), whose
    encoder is taken. With a VideoLLaMA3 a later stage may start so too, without stage.init_from: the paper's 7B has the
    tuned encoder of the 2B."""

    language_model_from: str | None = None
    """Stage 1: Qwen2 or Qwen2.5 checkpoint in Hugging Face form (folder or hub name)."""

    tokenizer_from: str | None = None
    """Folder or hub name of the tokenizer. Unset: language_model_from in stage 1, else stage.init_from."""

    learning_rates: dict[str, float] = field(default_factory=dict)
    """Replaces the stage's rate of a part that the stage trains, unless you write stage.learning_rates for that part
    yourself. For models with random weights: the published rates are for pretrained weights."""

    initializer_range: float = 0.02
    """Standard deviation of the projector's random weights in stage 1."""

    num_parameters: dict[str, int] = field(default_factory=dict)
    """Parameters of each part, for tables and estimates. A run checks them when it builds the model."""

    costs: dict[str, int] = field(
        default_factory=lambda: {"token": 3_087_000, "token_pair": 86, "patch": 824_000, "patch_pair": 124}
    )
    """Costs by which packs are balanced: of a token and of a pair of tokens in one sample (language model), of a
    patch and of a pair of patches in one frame (encoder). Whole numbers in any unit. The defaults are kFLOP of a
    forward pass of the 2B: twice the parameters; for a pair 2 x layers x hidden_size (causal attention needs half)."""


@dataclass(kw_only=True, slots=True)
class StepConfig:
    """The global batch of one optimizer step. It does not depend on the number of ranks."""

    max_tokens: int = 16384
    """Most tokens of one pack, and so of one sample."""

    max_patches: int = 65536
    """Most encoder patches of one pack."""

    max_visual_items: int | None = None
    """Most images and clips of one pack. null: as many as its tokens and patches allow."""

    global_packs: int = 16
    """Packs of one step, over all ranks; a multiple of the number of ranks."""

    max_samples: int | None = 128
    """Most samples of one step; a step also ends when its packs are full. null: only then."""

    fill: float = 0.95
    """Share of the packs' tokens and patches that a step aims to use; the rest leaves room to balance the packs."""


@dataclass(kw_only=True, slots=True)
class MachineConfig:
    """How the run uses the machine: devices, number formats, kernels, memory."""

    device: Device = Device.auto
    """auto takes cuda where there is a GPU, else the CPU."""

    dp_size: int = 1
    """Data-parallel ranks that the run will have: processes of a node times nodes. A launch sets it itself."""

    zero_stage: int = 1
    """What DeepSpeed partitions over the ranks. 0: nothing, 1: optimizer state, 2: gradients too, 3: weights too."""

    dtype: Dtype = Dtype.bfloat16
    """Format of weights and activations. Masters and optimizer state are float32 unless optim says otherwise."""

    attention: Attention = Attention.auto
    """auto takes the first that works on this machine: flash_attn_4, flash_attn, torch_varlen, reference."""

    gemm_backend: GemmBackend = GemmBackend.auto
    """Library for the matrix products of compiled layers. quack: with fused epilogues, on Hopper GPUs. auto: quack
    where it works and its results are right on this machine, else torch."""

    memory: Memory = Memory.given
    """given: layers recompute what recompute_vision and recompute_language say. auto: the run ignores these two options
    and chooses for each pack, layer by layer, the least recomputation that fits the GPU's memory (docs/memory.md)."""

    recompute_vision: Recompute = Recompute.layer
    """What each encoder layer recomputes in the backward pass. nothing. elementwise: all but matrix products and
    attention. mlp: that, and the first matrix products of the MLP. layer: everything. offload: everything, and the
    layer's input waits in the host's memory."""

    recompute_language: Recompute = Recompute.layer
    """The same for each layer of the language model."""

    offload_optimizer: bool = False
    """AdamW's two moments stay in the host's page-locked memory, 8 bytes for each trained parameter, and are copied to
    the GPU and back in each step. Activations can use the freed GPU memory (docs/memory.md). Needs zero_stage=1,
    dtype=bfloat16 and optim.state_dtype=float32; best with memory=auto."""

    compile_layers: bool = False
    """torch.compile each layer: fewer and faster kernels. The first start takes a minute or two longer, a later one
    less while torch's cache is on disk. Not with zero_stage=3."""

    loss_chunk_tokens: int = 2048
    """Supervised tokens whose logits are in memory at one time."""


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """Where metrics go, besides the console and metrics.jsonl."""

    kind: Tracker = Tracker.none
    """none, wandb or tensorboard."""

    project: str = "vl3train"
    """W&B project."""

    entity: str | None = None
    """W&B team or user."""

    mode: WandbMode = WandbMode.auto
    """Of W&B: online, offline, or auto: online when it has a key, else offline."""

    table_rows: int = 8
    """Held-out samples of each source whose pictures and generated answers the tracker shows after each evaluation. 0:
    none. With machine.zero_stage=3 none are generated."""


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """One run: its length, its folder, what it saves."""

    output_dir: str = MISSING
    """Folder of this run: checkpoints, metrics.jsonl, config.yaml, ledger. A run that is there is resumed."""

    seed: int = 0
    """Seed of the order of the data and of random weights."""

    num_epochs: float = 1.0
    """Virtual epochs to train, or a fraction of one. num_steps replaces it."""

    num_steps: int | None = None
    """Steps to train. Unset: num_epochs decides."""

    save_steps: int = 1000
    """Steps between checkpoints; the last step also writes one."""

    save_in_background: bool = True
    """Write checkpoints while training goes on, from a copy of the state in host memory, which is set aside at the
    start. false: training waits, and no memory is needed."""

    upload_to: str | None = None
    """Folder elsewhere that gets a copy of this run's folder after each save, while training goes on:
    s3://bucket/runs/mine, or a path on another disk (docs/reliability.md). null: none."""

    keep_checkpoints: int = 2
    """Number of checkpoints to keep. Older ones are deleted after a newer one is complete, except the newest that is
    2 x optim.max_skipped_steps old (or the oldest, where none is): a run may go back to it."""

    keep_every_steps: int = 0
    """Also keep every checkpoint whose step is a multiple of this. 0: none."""

    best_figure: BestFigure = BestFigure.none
    """Held-out figure by which the best checkpoint is told: loss, accuracy, or none. It is saved, kept beside the last
    ones, and named in best.json. Needs evaluate_steps or evaluate_at_end, and held-out samples."""

    patience: int | None = None
    """End the run early when this many evaluations in a row are no better than the best. Needs best_figure and
    evaluate_steps. null: never."""

    log_steps: int = 1
    """Metrics are logged every this many steps."""

    evaluate_at_start: bool = False
    """Evaluate on the recipe's held-out samples before the first step."""

    evaluate_at_end: bool = True
    """Evaluate on them after the last step."""

    evaluate_steps: int = 0
    """Also evaluate every this many steps. 0: not during the run."""

    evaluate_max_new_tokens: int = 256
    """Longest generated answer of an evaluation, in tokens; for sources whose recipe names metrics."""

    stop_after_steps: int | None = None
    """Save a checkpoint and stop after this many steps of this launch. The learning-rate schedule stays that of the
    whole run. 0: stop when the first step could begin."""

    max_hours: float | None = None
    """Save a checkpoint and stop at the end of the first step after this many hours of this launch: for queues with a
    time limit. Leave room for one step and one save."""

    silence_seconds: float = 300.0
    """Seconds without progress after which the run reports, once, what each rank and each loader worker is doing
    (docs/silence.md). It waits on. More than the longest step takes."""

    start_silence_seconds: float = 1800.0
    """The same until the first step is done, which may compile, and while a checkpoint is saved."""

    collective_timeout_seconds: float = 3600.0
    """Seconds after which a rank that waits for another one in a step fails, and the job ends. Before the first step it
    is 4 hours, because rank 0 may index shards."""


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
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
