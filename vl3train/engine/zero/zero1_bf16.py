"""ZeRO-1 in bfloat16: four acts of DeepSpeed's optimizer, each once over memory and without waiting for the device.

deepspeed 0.19.8 casts each gradient to float32 before it adds it, copies all sums to bfloat16 and back to send them
(on one GPU too, where nothing is sent), clips in a pass for each parameter and asks the host twice whether the norm
is finite: 76 ms of a step of 2 830 on one H100 (benchmarks/log.md). Partition, masters, states, weights sent to all
ranks and checkpoints stay DeepSpeed's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.checkpoint.constants import SINGLE_PARTITION_OF_FP32_GROUPS
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor

from vl3train.engine.zero.gradient_sums import add_gradients, put_gradients


def keep_float32_sums(
    optimizer: BF16_Optimizer,
    *,
    clip: float,
    on_norm: Callable[[Tensor], object],
    summed_by_layers: Sequence[Sequence[Tensor]],
) -> None:
    """Replace how ``optimizer`` sums gradients over micro-batches and ranks, and how it steps.

    Sums are float32 from the first micro-batch to the update; ``clip`` is the largest L2 norm, 0 for any. ``on_norm``
    gets the norm before clipping, a tensor, when the update is still to be queued. A norm that is no number goes into
    the weights: the loop stops the run there (engine/loop.py), before they are written anywhere. Weights
    ``summed_by_layers``, by product, get their sum as ``grad_sum`` (model/kernels/gemm_accumulate.py).
    """
    flat_sums: list[Tensor] = optimizer.fp32_groups_gradients_flat
    own_sums: list[Tensor] = optimizer.fp32_groups_gradient_flat_partition
    ranks = dist.get_world_size(optimizer.dp_process_group)
    sums_of_layers = _give_sums(optimizer, summed_by_layers)
    by_layers = {id(weight) for weights in summed_by_layers for weight in weights if sums_of_layers}
    filled_at_start = [[id(parameter) in by_layers for parameter in group] for group in optimizer.bf16_groups]

    @torch.no_grad()
    def update_hp_grads(clear_lp_grads: bool = False) -> None:
        del clear_lp_grads  # they are let go, which clears them
        new: list[tuple[Tensor, Tensor]] = []
        more: list[tuple[Tensor, Tensor]] = []
        for number, group in enumerate(optimizer.bf16_groups):
            filled: list[bool] = optimizer.fp32_groups_has_gradients[number]
            for index, parameter in enumerate(group):
                if parameter.grad is None:
                    continue
                total = optimizer.fp32_groups_gradients[number][index]
                (more if filled[index] else new).append((total, parameter.grad.reshape(-1)))
                parameter._hp_grad = total
                filled[index] = True
                parameter.grad = None
        put_gradients(new)
        add_gradients(more)

    @torch.no_grad()
    def reduce_gradients(**_: Any) -> None:
        for number, filled in enumerate(optimizer.fp32_groups_has_gradients):
            for index, has_gradient in enumerate(filled):
                if not has_gradient:  # still the sum of the step before
                    optimizer.fp32_groups_gradients[number][index].zero_()
        if ranks > 1:
            for flat, own in zip(flat_sums, own_sums, strict=True):
                dist.reduce_scatter_tensor(own, flat, group=optimizer.dp_process_group)
            torch._foreach_div_(own_sums, ranks)  # the mean, as in DeepSpeed's other stages

    @torch.no_grad()
    def step(closure: None = None) -> None:
        assert closure is None, "DeepSpeed passes none"
        optimizer.overflow = False
        square = torch.stack(torch._foreach_norm(own_sums)).square().sum()
        if ranks > 1:
            dist.all_reduce(square, group=optimizer.dp_process_group)
        norm = square.sqrt()
        optimizer._global_grad_norm = norm
        on_norm(norm)
        if clip > 0:
            torch._foreach_mul_(own_sums, (clip / (norm + 1e-6)).clamp(max=1.0))
        for master, gradient in zip(optimizer.fp32_groups_flat_partition, own_sums, strict=True):
            master.grad = gradient
        optimizer.optimizer.step()
        optimizer._lazy_init_hp_params_optimizer_state()
        optimizer.update_lp_params()
        optimizer.clear_hp_grads()

    def clear_hp_grads() -> None:
        # Most are not filled with zeros: the next step's first gradients are written over them.
        for filled, at_start in zip(optimizer.fp32_groups_has_gradients, filled_at_start, strict=True):
            filled[:] = at_start
        if sums_of_layers:
            torch._foreach_zero_(sums_of_layers)

    optimizer.update_hp_grads = update_hp_grads
    optimizer.reduce_gradients = reduce_gradients
    optimizer.step = step
    optimizer.clear_hp_grads = clear_hp_grads
    clear_hp_grads()


def _give_sums(optimizer: BF16_Optimizer, by_gemm: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Set ``grad_sum`` of the first weight of each product to the sum of all, (out of all, in); returns these sums.

    None at all where those of a product do not lie one below the other in DeepSpeed's buffer: then the layers give
    gradients as usual.
    """
    total_of = {
        id(parameter): total
        for group, totals in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True)
        for parameter, total in zip(group, totals, strict=True)
    }
    found = []
    for weights in by_gemm:
        totals = [total_of[id(weight)] for weight in weights]
        for one, other in itertools.pairwise(totals):
            if other.data_ptr() != one.data_ptr() + one.nbytes:
                return []
        # data: autograd takes all views of a buffer for changed when one of them is.
        width = weights[0].shape[1]
        size = sum(total.numel() for total in totals)
        found.append(totals[0].data.as_strided((size // width, width), (width, 1)))
    for weights, total in zip(by_gemm, found, strict=True):
        weights[0].grad_sum = total  # type: ignore[attr-defined]
    return found


@torch.no_grad()
def drop_masters(
    optimizer: BF16_Optimizer, keep_low_bits: Callable[[Tensor, Tensor], object] | None = None
) -> None:
    """Let the optimizer update this rank's share of the bfloat16 weights themselves; frees 4 bytes a parameter.

    Most updates are smaller than half a step of bfloat16. So it must keep the bits that the weights lack, for which
    ``keep_low_bits`` gets each float32 master and its weights (engine/optim/split_masters.py), or round at random
    (engine/optim/stochastic_adamw.py).
    """
    rank = dist.get_rank(optimizer.dp_process_group)
    groups = zip(
        optimizer.fp32_groups_flat_partition,
        optimizer.bf16_partitioned_groups,
        optimizer.bf16_groups,
        strict=True,
    )
    for master, partitions, parameters in groups:
        if keep_low_bits is not None:
            keep_low_bits(master, partitions[rank])
        master.data = partitions[rank]
        master.grad_dtype = torch.float32
        for parameter in parameters:
            parameter._hp_mapping = None  # it has a view of the float32 master; its readers ask for None
    _save_own_share(optimizer)


def _save_own_share(optimizer: BF16_Optimizer) -> None:
    """Let checkpoints hold the masters of this rank alone: of a view torch.save writes all, so every rank's weights."""
    whole_state = optimizer.state_dict

    def state_dict() -> dict[str, Any]:
        state: dict[str, Any] = whole_state()
        state[SINGLE_PARTITION_OF_FP32_GROUPS] = [
            master.detach().to("cpu", copy=True)
            if master.untyped_storage().nbytes() > master.nbytes
            else master
            for master in state[SINGLE_PARTITION_OF_FP32_GROUPS]
        ]
        return state

    optimizer.state_dict = state_dict
