"""What a plan says of memory and trained parameters is what `vl3train plan` says, for adapters of every kind."""

from __future__ import annotations

import re

import pytest

from tests.config.conftest import workplace
from vl3train.config.load import load_config
from vl3train.contracts.gpus import GPUS
from vl3train.finetuning.plan import Machine, _memory, trained_parameters
from vl3train.preview.plan_estimate import UTILISATION, published_sizes, rank_memory

__all__ = ["workplace"]

LORA = ["stage=finetuning", "model=7b", "stage.init_from=checkpoint", "adapter=lora", "machine=one_gpu"]
LORA += ["data.root=data", "data.recipe=own.yaml"]


def machine(gpu="a100"):
    return Machine(ranks=1, name=gpu, gpu=GPUS.get(gpu), utilisation=UTILISATION)


def told(*words, gpu="a100"):
    """GiB by what holds them, as the line of the plan says, and the config."""
    cfg = load_config([*LORA, *words])
    line = _memory(cfg, machine(gpu), published_sizes(cfg))
    inside = re.search(r"\((.*?)\)", line)[1]
    return {name: float(size) for name, size in re.findall(r"(?:^|, )(\D+) ([\d.e+-]+)", inside)}, cfg, line


def test_the_line_is_the_estimate_of_plan(workplace):
    parts, cfg, line = told("machine.memory=auto")
    wanted, levels = rank_memory(cfg, GPUS["a100"])
    assert parts == pytest.approx(wanted, rel=0.01)
    assert line.startswith(f"{sum(wanted.values()):.3g} GiB at the peak")
    assert line.endswith(f"of 74.5; recomputed of a full pack: {levels}")
    assert "activations come on top" in told("machine.memory=auto", gpu="of no data sheet")[2]


def test_weights_in_4_bits_and_fewer_targets_take_less(workplace):
    whole, cfg, _ = told()
    in_4_bits = told("adapter.base_4bit=nf4")[0]
    assert in_4_bits["weights"] < 0.5 * whole["weights"]
    fewer, few, _ = told("adapter.target_modules=[q_proj,v_proj]")
    assert fewer["masters and AdamW"] < 0.2 * whole["masters and AdamW"]
    sizes = published_sizes(cfg)
    of_all, of_few = (trained_parameters(one, sizes)["language_model"][0] for one in (cfg, few))
    # q: 3584 -> 3584, v: 3584 -> 512, in 28 layers, at rank 64.
    assert of_few == 28 * 64 * (2 * 3584 + 3584 + 512)
    assert of_all > 5 * of_few
