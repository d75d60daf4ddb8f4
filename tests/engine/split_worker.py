"""One process of tests/engine/zero/test_engine.py: the gradient of one global batch, split in a given way.

Run as ``torchrun --nproc-per-node N split_worker.py MODEL_DIR OUT DTYPE``. The optimizer is plain SGD with rate 1,
so the change of the weights is the gradient.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from tests.engine.packs import behind_a_prefix, collate_samples, random_samples, with_others
from vl3train.config.choices import Dtype, Recompute
from vl3train.config.optim_options import OptimConfig
from vl3train.config.schema import MachineConfig
from vl3train.engine.ranks import Rank, join, leave
from vl3train.engine.zero.engine import Zero
from vl3train.model.packed_forward import PackedModel
from vl3train.model.trainable import parameter_groups, set_trainable
from vl3train.model.weights.from_parts import load_model


def gradient(
    model_dir: Path,
    rank: Rank,
    *,
    zero_stage: int,
    accumulation: int,
    dtype: Dtype = Dtype.float32,
    max_grad_norm: float = 0.0,
    trainable: tuple[str, ...] = ("vision_encoder", "projector", "language_model"),
    families: bool | None = None,
    compile_layers: bool = False,
    recompute: Recompute = Recompute.nothing,
) -> tuple[dict[str, torch.Tensor], float, dict[str, float]]:
    """The change of every weight after one SGD step at rate 1, negated, and the gradient norms that were reported.

    ``families``: each picture and clip has two records; True lets them share a prefix, False does not.
    """
    torch.manual_seed(0)
    hf_model = load_model(model_dir, dtype=torch.float32 if dtype is Dtype.float32 else torch.bfloat16)
    set_trainable(hf_model, trainable)
    before = {name: p.detach().clone().double() for name, p in hf_model.named_parameters()}
    packed = PackedModel(
        hf_model,
        "reference",
        recompute_vision=recompute,
        recompute_language=recompute,
        compile_layers=compile_layers,
        partitioned_weights=zero_stage == 3,
    )
    groups = parameter_groups(hf_model, dict.fromkeys(trainable, 1.0), weight_decay=0.1)  # two for each part
    for group in groups:
        group["weight_decay"] = 0.0
    machine = MachineConfig(zero_stage=zero_stage, dtype=dtype)
    engine = Zero(
        packed,
        torch.optim.SGD(groups, lr=1.0),
        machine=machine,
        optim=OptimConfig(max_grad_norm=max_grad_norm),
        num_micro_batches=accumulation,
        rank=rank,
    )
    samples = random_samples(hf_model.config, count=8)
    units = [[sample] for sample in samples] if families is None else with_others(samples)
    total = sum(int((sample.labels != -100).sum()) for unit in units for sample in unit)
    num_packs = rank.dp_size * accumulation
    mine = [
        collate_samples(
            [part for unit in units[p::num_packs] for part in (behind_a_prefix(unit) if families else unit)]
        )
        for p in range(rank.index * accumulation, (rank.index + 1) * accumulation)
    ]
    for position, batch in enumerate(mine):
        output = engine.forward(batch)
        if zero_stage == 3 and position == 0:  # later, DeepSpeed keeps what it will gather again soon
            held = sum(p.numel() for p in hf_model.model.language_model.layers.parameters())
            assert held == 0, "what a layer keeps for its backward pass is not its whole weights"
        engine.backward(output.loss_sum / total)
        if position < len(mine) - 1:
            engine.finish_micro_batch()
    norm, *part_norms = engine.step(torch.zeros(0)).wait()
    after = engine.full_state_dict(hf_model)
    changes = {name: before[name] - after[name].double() for name in after}
    return changes, norm, dict(zip(engine.parts, part_norms, strict=True))


def main() -> None:
    """Every ZeRO stage with one and two micro-batches a rank, and with families; rank 0 writes the gradients.

    With a third word, compiled layers under ZeRO-3 instead.
    """
    model_dir, out = Path(sys.argv[1]), Path(sys.argv[2])
    rank = join(MachineConfig())
    results = compiled_gradients(model_dir, rank) if sys.argv[3:] else all_gradients(model_dir, rank)
    if rank.is_first:
        torch.save(results, out)
    leave()


def compiled_gradients(model_dir: Path, rank: Rank) -> dict[Any, Any]:
    """Two levels of recomputation."""
    return {
        recompute.value: gradient(
            model_dir, rank, zero_stage=3, accumulation=2, compile_layers=True, recompute=recompute
        )
        for recompute in (Recompute.nothing, Recompute.mlp)
    }


def all_gradients(model_dir: Path, rank: Rank) -> dict[Any, Any]:
    """Each stage and number of micro-batches."""
    results: dict[Any, Any] = {}
    for zero_stage in (0, 1, 2, 3):
        for accumulation in (1, 2):
            results[zero_stage, accumulation] = gradient(
                model_dir, rank, zero_stage=zero_stage, accumulation=accumulation
            )
    for accumulation in (1, 2):
        results["bfloat16", accumulation] = gradient(
            model_dir, rank, zero_stage=1, accumulation=accumulation, dtype=Dtype.bfloat16
        )
    for zero_stage in (0, 1, 2, 3):
        results["families", zero_stage] = gradient(
            model_dir, rank, zero_stage=zero_stage, accumulation=2, families=True
        )
    return results


if __name__ == "__main__":
    main()
