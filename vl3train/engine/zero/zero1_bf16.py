"""ZeRO-1 in bfloat16: four acts of DeepSpeed's optimizer, each in one pass over memory, without a wait for the device.

deepspeed 0.19.8 casts each gradient to float32 before it adds it, copies all sums to bfloat16 and back to send them (on
one GPU too, where nothing is sent), clips in a pass for each parameter, and makes the host wait twice to know whether
the norm is finite: 76 ms of a step of 2 830 on one H100 (benchmarks/log.md). Partitions, masters, optimizer state, the
broadcast of weights to all ranks, and checkpoints stay DeepSpeed's.
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
from vl3train.model.compiling import fix_shape


def keep_float32_sums(
    optimizer: BF16_Optimizer,
    *,
    clip: float,
    on_norm: Callable[[Tensor, Sequence[Tensor]], object],
    summed_by_layers: Sequence[Sequence[Sequence[Tensor]]],
) -> list[tuple[Tensor, ...]]:
    """Replace how ``optimizer`` sums gradients over micro-batches and ranks, and how it steps.

    Sums are float32 from the first micro-batch to the update. ``clip`` is the largest L2 norm, 0 for any. ``on_norm``
    gets the norm before clipping, a 0-d tensor, and that of each group, before the update is queued, and says with it
    whether the update may change anything (Zero.step).

    ``summed_by_layers`` are weights whose gradients layers can add themselves (model/kernels/gemm_accumulate.py): for
    each layer, for each matrix product, its weights. Returns for each layer the sums, one for each product, (out of all
    its weights, in) float32; the caller passes them to the layers. Returns none at all where the weights of a product
    do not lie one below the other in DeepSpeed's buffer: then layers give gradients as usual.
    """
    sums_of_layers = _sums_of_layers(optimizer, summed_by_layers)
    by_layers = [weight for layer in summed_by_layers for gemm in layer for weight in gemm]
    acts = _Float32Sums(
        optimizer,
        clip=clip,
        on_norm=on_norm,
        sums_of_layers=list(itertools.chain.from_iterable(sums_of_layers)),
        summed_by_layers=by_layers if sums_of_layers else [],
    )
    optimizer.update_hp_grads = acts.add_micro_batch
    optimizer.reduce_gradients = acts.sum_over_ranks
    optimizer.step = acts.step
    optimizer.clear_hp_grads = acts.begin_step
    acts.begin_step()
    for total in acts.sums_of_layers:
        fix_shape(total)
    return sums_of_layers


class _Float32Sums:
    """The four acts, and what they share."""

    def __init__(
        self,
        optimizer: BF16_Optimizer,
        *,
        clip: float,
        on_norm: Callable[[Tensor, Sequence[Tensor]], object],
        sums_of_layers: list[Tensor],
        summed_by_layers: Sequence[Tensor],
    ) -> None:
        self.optimizer, self.clip, self.on_norm = optimizer, clip, on_norm
        self.sums_of_layers = sums_of_layers
        self.group = optimizer.dp_process_group
        self.num_ranks = dist.get_world_size(self.group)
        self.own_sums: list[Tensor] = optimizer.fp32_groups_gradient_flat_partition
        by_layers = {id(weight) for weight in summed_by_layers}
        self.filled_at_start = [
            [id(weight) in by_layers for weight in group] for group in optimizer.bf16_groups
        ]

    @torch.no_grad()
    def add_micro_batch(self, clear_lp_grads: bool = False) -> None:
        """DeepSpeed's update_hp_grads: move the gradients of a micro-batch into their sums."""
        del clear_lp_grads  # they are let go, which clears them
        new: list[tuple[Tensor, Tensor]] = []
        more: list[tuple[Tensor, Tensor]] = []
        for number, group in enumerate(self.optimizer.bf16_groups):
            filled: list[bool] = self.optimizer.fp32_groups_has_gradients[number]
            for index, parameter in enumerate(group):
                if parameter.grad is None:
                    continue
                total = self.optimizer.fp32_groups_gradients[number][index]
                (more if filled[index] else new).append((total, parameter.grad.reshape(-1)))
                parameter._hp_grad = total
                filled[index] = True
                parameter.grad = None
        put_gradients(new)
        add_gradients(more)

    @torch.no_grad()
    def sum_over_ranks(self, **_: Any) -> None:
        """DeepSpeed's reduce_gradients: give each rank the mean over ranks of its share of the sums."""
        for number, filled in enumerate(self.optimizer.fp32_groups_has_gradients):
            for index, has_gradient in enumerate(filled):
                if not has_gradient:  # it still holds the sum of the step before
                    self.optimizer.fp32_groups_gradients[number][index].zero_()
        if self.num_ranks > 1:
            flat_sums: list[Tensor] = self.optimizer.fp32_groups_gradients_flat
            for flat, own in zip(flat_sums, self.own_sums, strict=True):
                dist.reduce_scatter_tensor(own, flat, group=self.group)
            torch._foreach_div_(self.own_sums, self.num_ranks)  # the mean, as in DeepSpeed's other stages

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Clip, update this rank's share of the masters, and send the weights to all ranks."""
        assert closure is None, "DeepSpeed passes none"
        optimizer = self.optimizer
        optimizer.overflow = False
        squares = self._squares()
        norm = squares.sum().sqrt()
        optimizer._global_grad_norm = norm
        self.on_norm(norm, squares.sqrt().unbind())
        if self.clip > 0:
            # Of a norm that is NaN the factor would be too, and the padding that ends a buffer would keep it for ever.
            factor = (self.clip / (norm + 1e-6)).clamp(max=1.0).nan_to_num()
            torch._foreach_mul_(self.own_sums, factor)
        for master, gradient in zip(optimizer.fp32_groups_flat_partition, self.own_sums, strict=True):
            master.grad = gradient
        optimizer.optimizer.step()
        optimizer._lazy_init_hp_params_optimizer_state()
        optimizer.update_lp_params()
        optimizer.clear_hp_grads()

    def begin_step(self) -> None:
        """DeepSpeed's clear_hp_grads: the next gradients begin new sums."""
        # Only the layers' sums are filled with zeros: the next step's first gradients are written over the others.
        for filled, at_start in zip(
            self.optimizer.fp32_groups_has_gradients, self.filled_at_start, strict=True
        ):
            filled[:] = at_start
        if self.sums_of_layers:
            torch._foreach_zero_(self.sums_of_layers)

    def _squares(self) -> Tensor:
        """Squared L2 norm of all ranks' sums of each group, (groups,)."""
        squares = torch.stack(torch._foreach_norm(self.own_sums)).square()
        if self.num_ranks > 1:
            dist.all_reduce(squares, group=self.group)
        return squares


def _sums_of_layers(
    optimizer: BF16_Optimizer, weights_of_layers: Sequence[Sequence[Sequence[Tensor]]]
) -> list[tuple[Tensor, ...]]:
    """The sums as keep_float32_sums returns them: views of DeepSpeed's buffer."""
    total_of = {
        id(parameter): total
        for group, totals in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True)
        for parameter, total in zip(group, totals, strict=True)
    }
    found = []
    for layer in weights_of_layers:
        sums = [_one_below_the_other([total_of[id(w)] for w in gemm], gemm[0].shape[1]) for gemm in layer]
        whole = [total for total in sums if total is not None]
        if len(whole) < len(sums):
            return []
        found.append(tuple(whole))
    return found


def _one_below_the_other(totals: Sequence[Tensor], width: int) -> Tensor | None:
    """One (rows of all, width) view of ``totals``, or None where they do not follow each other in memory."""
    for one, following in itertools.pairwise(totals):
        if following.data_ptr() != one.data_ptr() + one.nbytes:
            return None
    size = sum(total.numel() for total in totals)
    # data: autograd would count all views of a buffer as changed when one of them is.
    return totals[0].data.as_strided((size // width, width), (width, 1))


@torch.no_grad()
def drop_masters(
    optimizer: BF16_Optimizer, keep_low_bits: Callable[[Tensor, Tensor], object] | None = None
) -> None:
    """Let the optimizer update this rank's share of the bfloat16 weights directly; frees 4 bytes a parameter.

    Most updates are smaller than half a step of bfloat16. So the optimizer must either keep the bits that the weights
    lack (``keep_low_bits`` gets each float32 master and its weights: engine/optim/split_masters.py), or round at random
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
            parameter._hp_mapping = (
                None  # it would keep a view of the float32 master alive; its readers check for None
            )
    _save_own_share(optimizer)


def _save_own_share(optimizer: BF16_Optimizer) -> None:
    """Let checkpoints hold only this rank's masters: of a view, torch.save writes the whole buffer of all ranks."""
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
