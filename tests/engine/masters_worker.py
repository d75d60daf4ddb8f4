"""One process of tests/engine/zero/test_engine.py: a checkpoint of masters that are not float32.

Run as ``torchrun --nproc-per-node N masters_worker.py MODEL_DIR OUT``: OUT gets a folder for each master_dtype, and
found.pt, from rank 0, says how many parameters there are and which of the runs came back as they were saved.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.engine.packs import collate_samples, random_samples
from tests.engine.zero.states import write_state
from vl3train.config.choices import Dtype, MasterDtype
from vl3train.config.optim_options import OptimConfig
from vl3train.config.schema import MachineConfig
from vl3train.engine.optim.build import build_optimizer
from vl3train.engine.ranks import join, leave
from vl3train.engine.step import train_step
from vl3train.engine.zero.engine import Zero
from vl3train.model.packed_forward import PackedModel
from vl3train.model.weights.from_parts import load_model


def main() -> None:
    """Two steps, saved, one more, and back."""
    model_dir, out = Path(sys.argv[1]), Path(sys.argv[2])
    rank = join(MachineConfig())
    found: dict[str, object] = {}
    for master_dtype in (MasterDtype.bfloat16, MasterDtype.split):
        split = master_dtype is MasterDtype.split
        optim = OptimConfig(state_dtype=Dtype.float32 if split else Dtype.bfloat16, master_dtype=master_dtype)
        machine = MachineConfig(offload_optimizer=split, dp_size=rank.dp_size)
        packed = PackedModel(load_model(model_dir, dtype=torch.bfloat16), "reference")
        groups = [{"name": "all", "params": list(packed.parameters()), "lr": 1e-2}]
        engine = Zero(
            packed,
            build_optimizer(groups, optim, rank.device, offload_optimizer=split),
            machine=machine,
            optim=optim,
            num_micro_batches=1,
            rank=rank,
        )
        engine.train(True)
        samples = random_samples(packed.model.config, count=4 * rank.dp_size)
        batch = collate_samples(samples[rank.index :: rank.dp_size])

        def steps(number: int, engine: Zero = engine, batch: object = batch) -> None:
            for _ in range(number):
                train_step(engine, [batch], num_supervised_tokens=9, num_sources=2, stop_requested=False)

        steps(2)
        saved = engine.full_state_dict(packed.model)
        write_state(engine, out / master_dtype.value)
        rank.barrier()
        steps(1)
        moved = engine.full_state_dict(packed.model)
        engine.load(out / master_dtype.value)
        loaded = engine.full_state_dict(packed.model)
        found["parameters"] = sum(parameter.numel() for parameter in packed.parameters())
        found[master_dtype.value] = {
            "moved": any(not torch.equal(saved[name], moved[name]) for name in saved),
            "loaded": all(torch.equal(saved[name], loaded[name]) for name in saved),
        }
    if rank.is_first:
        torch.save(found, out / "found.pt")
    leave()


if __name__ == "__main__":
    main()
