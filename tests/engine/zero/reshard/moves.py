"""Tiny models under ZeRO that go on from each other's state; also one process of test_load.py.

Run as ``torchrun --nproc-per-node N moves.py MODEL_DIR FOLDER RANKS_BEFORE``: does every move from the states that as
many ranks left in FOLDER.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.engine.packs import collate_samples, random_samples
from tests.engine.zero.states import write_state
from vl3train.config.choices import Dtype, MasterDtype
from vl3train.config.optim_options import OptimConfig
from vl3train.config.schema import MachineConfig
from vl3train.engine.optim.build import build_optimizer
from vl3train.engine.ranks import Rank, join, leave
from vl3train.engine.step import train_step
from vl3train.engine.zero.engine import Zero
from vl3train.engine.zero.reshard.layouts import Layout
from vl3train.engine.zero.reshard.load import load_other_layout
from vl3train.model.packed_forward import PackedModel
from vl3train.model.weights.from_parts import load_model

GLOBAL_PACKS = 4


@dataclass(frozen=True, slots=True)
class Kind:
    """What an engine trains, and how."""

    stages: tuple[int, ...]
    machine: dict[str, Any]
    optim: dict[str, Any] = dataclasses.field(default_factory=dict)
    frozen: str = "no part"  # the prefix of weights that do not train
    save_frozen: bool = True


FLOAT32 = {"dtype": Dtype.float32}
KINDS = {
    "float32": Kind((0, 3, 1, 2), FLOAT32),
    "frozen": Kind((1, 3, 0), FLOAT32, frozen="model.model.language_model"),
    "frozen left out": Kind((3, 2), FLOAT32, frozen="model.model.language_model", save_frozen=False),
    "bfloat16": Kind((1, 2, 3), {}),
    "stochastic": Kind((2, 1, 3), {}, {"state_dtype": Dtype.bfloat16}),
    "no masters": Kind((1,), {}, {"state_dtype": Dtype.bfloat16, "master_dtype": MasterDtype.bfloat16}),
    "offload": Kind((1,), {"offload_optimizer": True}),
    "split": Kind((1,), {"offload_optimizer": True}, {"master_dtype": MasterDtype.split}),
}


def next_stage(kind: Kind, zero_stage: int) -> int:
    """Where a state goes on that this stage has saved."""
    return kind.stages[(kind.stages.index(zero_stage) + 1) % len(kind.stages)]


def saved_by(folder: Path, kind: str, layout: Layout) -> Path:
    """The folder of a state."""
    return folder / f"{kind}-{layout.dp_size}-{layout.zero_stage}"


class Trained:
    """A tiny model under ZeRO, whose steps are those of any other layout."""

    def __init__(self, model_dir: Path, rank: Rank, kind: Kind, zero_stage: int) -> None:
        machine = MachineConfig(zero_stage=zero_stage, dp_size=rank.dp_size, **kind.machine)
        optim = OptimConfig(**kind.optim)
        torch.manual_seed(0)
        packed = PackedModel(load_model(model_dir, dtype=getattr(torch, machine.dtype.value)), "reference")
        packed.alone = torch.nn.Parameter(torch.ones(3, dtype=next(packed.parameters()).dtype))
        for name, parameter in packed.named_parameters():
            parameter.requires_grad_(not name.startswith(kind.frozen))
        trained = [parameter for parameter in packed.parameters() if parameter.requires_grad]
        alone = [parameter for parameter in trained if parameter is packed.alone]
        others = [parameter for parameter in trained if parameter is not packed.alone]
        groups = [
            {"name": "alone", "params": alone, "lr": 1e-3},  # fewer values than four ranks have places
            {"name": "first", "params": others[:9], "lr": 1e-3},
            {"name": "others", "params": others[9:], "lr": 2e-3},
        ]
        self.rank, self.layout = rank, Layout(dp_size=rank.dp_size, zero_stage=zero_stage)
        own = GLOBAL_PACKS // rank.dp_size
        self.engine = Zero(
            packed,
            build_optimizer(groups, optim, rank.device, offload_optimizer=machine.offload_optimizer),
            machine=machine,
            optim=optim,
            num_micro_batches=own,
            rank=rank,
            save_frozen=kind.save_frozen,
        )
        self.engine.train(True)
        samples = random_samples(packed.model.config, count=2 * GLOBAL_PACKS)
        packs = [collate_samples(samples[number::GLOBAL_PACKS]) for number in range(GLOBAL_PACKS)]
        self.batches = packs[rank.index * own : (rank.index + 1) * own]

    def step(self) -> list[float]:
        """One step; its loss and norm."""
        done = train_step(
            self.engine, self.batches, num_supervised_tokens=20, num_sources=2, stop_requested=False
        )
        return [done.loss, done.grad_norm]

    def move(self, folder: Path, kind: str, saved: Layout) -> list[float]:
        """Load another layout's state, save it in this layout, and take the next step."""
        load_other_layout(self.engine, saved_by(folder, kind, saved), saved)
        self.save(folder, kind)
        return self.step()

    def save(self, folder: Path, kind: str) -> None:
        """Write the state as this layout has it."""
        out = saved_by(folder, kind, self.layout)
        (out / "state").mkdir(parents=True, exist_ok=True)
        self.rank.barrier()
        write_state(self.engine, out)


def main() -> None:
    """Every move; rank 0 writes the figures of the next steps."""
    model_dir, folder, ranks_before = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    rank = join(MachineConfig())
    figures = {}
    for name, kind in KINDS.items():
        for zero_stage in kind.stages:
            saved = Layout(dp_size=ranks_before, zero_stage=zero_stage)
            trained = Trained(model_dir, rank, kind, next_stage(kind, zero_stage))
            figures[f"{name} {zero_stage}"] = trained.move(folder, name, saved)
    if rank.is_first:
        (folder / f"figures-{rank.dp_size}.json").write_text(json.dumps(figures))
    leave()


if __name__ == "__main__":
    main()
