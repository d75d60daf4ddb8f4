"""The options of the sections ``optim`` and ``adapter``: how weights are updated, or low-rank ones in their place."""

from __future__ import annotations

from dataclasses import dataclass, field

from vl3train.config.choices import AdapterInit, AdapterKind, Base4Bit, Dtype, MasterDtype, Schedule


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW, its schedule, clipping, and steps that it leaves out."""

    learning_rate: float | None = None
    """Peak learning rate of all that trains, parts and adapters, in place of the rates of stage, model and adapter.
    What is written closer wins: a part's own rate (stage.learning_rates.projector) over this one in the same file or
    command line, and the command line over a file. Unset: those rates."""

    weight_decay: float = 0.0
    """Decoupled weight decay; not applied to biases and norms."""

    beta1: float = 0.9
    """Decay of AdamW's first moment (of gradients)."""

    beta2: float = 0.999
    """Decay of AdamW's second moment (of squared gradients)."""

    eps: float = 1e-8
    """AdamW's epsilon."""

    state_dtype: Dtype = Dtype.float32
    """Format of AdamW's two moments. float32 takes 8 bytes for each trained parameter; bfloat16 takes 4, with
    stochastic rounding so that small changes are not lost (needs zero_stage 1 or more)."""

    master_dtype: MasterDtype = MasterDtype.float32
    """Master copy of trained bfloat16 weights. float32: 4 bytes for each weight. split: the same values in 2 bytes,
    the 16 bits that the weight lacks (needs machine.offload_optimizer=true). bfloat16: no masters, the weights
    themselves are rounded stochastically (needs zero_stage=1 and state_dtype=bfloat16)."""

    schedule: Schedule = Schedule.cosine
    """cosine falls to min_lr_fraction at the last step; constant keeps the peak."""

    warmup_fraction: float = 0.03
    """Share of the steps in which the learning rates rise linearly."""

    min_lr_fraction: float = 0.0
    """Learning rate at the end of the cosine, as a share of the peak."""

    max_grad_norm: float = 1.0
    """Gradients of the whole model are scaled down to at most this L2 norm. 0: no clipping."""

    spike_limit: float = 20.0
    """A step whose loss or gradient norm is this many deviations above the median of the last 64 steps is skipped: it
    changes nothing. A step that is not finite always is (docs/bad_numbers.md). 0: no limit."""

    max_skipped_steps: int = 8
    """After this many skipped steps in a row the run goes back to a checkpoint, and passes over them and as many steps
    before them. A second time at the same place it ends."""


@dataclass(kw_only=True, slots=True)
class AdapterConfig:
    """Low-rank adapters (LoRA) in place of full weights. Options that peft has too carry peft's names."""

    kind: AdapterKind = AdapterKind.none
    """none trains the parts in full. lora trains adapters on ``parts`` and nothing else, unless you name more in
    ``modules_to_save`` or give a part a rate in stage.learning_rates."""

    parts: list[str] = field(default_factory=lambda: ["language_model"])
    """Parts that get adapters: language_model, vision_encoder."""

    target_modules: list[str] | None = None
    """Linear layers of these parts that get one: names, as q_proj, or regular expressions for full names, as
    .*layers\\.[0-9]\\.mlp.*. Unset: all of attention and MLP."""

    modules_to_save: list[str] = field(default_factory=list)
    """What trains in full beside the adapters: vision_encoder, projector, or modules by name, as lm_head. They are
    saved with the adapters. A part takes its rate in stage.learning_rates, else ``learning_rate``."""

    rank: int = 64
    """Rank of each adapter."""

    part_ranks: dict[str, int] = field(default_factory=dict)
    """Rank of one part's adapters in place of ``rank``, as {vision_encoder: 16}."""

    alpha: float | None = None
    """The adapter's output is scaled by alpha / rank, with ``use_rslora`` by alpha / sqrt(rank). Unset: a scale of 2,
    which is alpha = 2 x rank. (LLaMA-Factory takes the same where none is given, and arXiv:2405.09673 advises it.)"""

    part_alphas: dict[str, float] = field(default_factory=dict)
    """Alpha of one part's adapters in place of ``alpha``."""

    dropout: float = 0.0
    """Dropout on the adapter's input. Compiled layers need 0."""

    learning_rate: float | None = 1e-4
    """Learning rate of the adapters, unless you write stage.learning_rates for the part that they are on. null: the
    stage's rate of that part. (1e-4 is the rate of LLaMA-Factory's LoRA recipes.)"""

    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) (rank-stabilized LoRA, arXiv:2312.03732)."""

    use_dora: bool = False
    """Train a magnitude for each output beside the adapter (DoRA, arXiv:2402.09353). Slower: compiled layers do not
    fuse it."""

    init: AdapterInit = AdapterInit.default
    """First weights. default: A random, B zero (peft's Kaiming uniform). gaussian: A normal. pissa: the principal parts
    of the weights (arXiv:2404.02948), by an exact SVD. pissa_niter_16: by a fast SVD, for models of billions."""

    base_4bit: Base4Bit = Base4Bit.none
    """QLoRA (arXiv:2305.14314). nf4: the frozen linear layers of ``base_4bit_parts`` are held in 4 bits, with quantized
    scales (4.13 bits a weight), and dequantized inside each layer's forward and backward pass (docs/adapters.md)."""

    base_4bit_parts: list[str] = field(default_factory=lambda: ["language_model"])
    """Parts held in 4 bits: language_model, vision_encoder."""
