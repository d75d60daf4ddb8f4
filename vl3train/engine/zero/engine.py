"""The only door to DeepSpeed: forward, backward, step, and the state a checkpoint keeps.

DeepSpeed by default divides by accumulation steps and averages over ranks. Both are undone here and nowhere else. So
the gradient of a step is that of the loss that the step defines: the sum over its supervised tokens, divided by their
number in the global batch.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.utils import set_z3_leaf_module
from torch import Tensor

from vl3train.config.choices import MasterDtype
from vl3train.config.optim_options import OptimConfig
from vl3train.config.schema import MachineConfig
from vl3train.contracts.records import Batch
from vl3train.engine.optim.build import state_bytes
from vl3train.engine.optim.offload_adamw import OffloadAdamW
from vl3train.engine.optim.offload_schedule import OffloadSchedule
from vl3train.engine.optim.stochastic_adamw import StochasticAdamW
from vl3train.engine.ranks import Rank
from vl3train.engine.zero.engine_state import FOLDER, EngineState, bytes_of, take_weights
from vl3train.engine.zero.host_copies import HostCopies
from vl3train.engine.zero.part_norms import PartNorms
from vl3train.engine.zero.settings import deepspeed_config
from vl3train.engine.zero.state_files import StateFiles
from vl3train.engine.zero.transfer import Reading, Transfer
from vl3train.engine.zero.zero1_bf16 import drop_masters, keep_float32_sums
from vl3train.model.activations.work import RecomputePlan
from vl3train.model.layers.layers import GradientSums
from vl3train.model.layers.tower import NO_CALLBACKS, LayerCallbacks
from vl3train.model.packed_forward import PackedModel

# On the CPU accelerator init_distributed would compile this op, which takes a minute and a compiler. gloo can do it.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
# ZeRO-1 in bfloat16 prints a page of memory figures at every start.
deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *_, **__: None
# DeepSpeed 0.19.8 calls collectives by names that torch 2.14 deprecates: a user can do nothing about it.
warnings.filterwarnings("ignore", message=r".*torch\.distributed\..* is deprecated", category=FutureWarning)
# transformers 5.23 renames a method; 5.20 has only the old name.
warnings.filterwarnings("ignore", message=".*gradient_checkpointing_enable.*", category=FutureWarning)


ChoosePlan = Callable[[Batch, int], RecomputePlan]
"""(micro-batch, reserved bytes) -> what each layer recomputes. Reserved bytes are those of the activations' budget that
optimizer state on its way to or from the host takes meanwhile."""


IsBad = Callable[[Tensor, Tensor], Tensor]
"""(totals over all ranks (n,), norm of the gradients 0-d) -> whether the step must change nothing, 0-d bool."""


class Zero:
    """A model under DeepSpeed ZeRO. It chooses what each micro-batch recomputes, and passes that to the model."""

    def __init__(
        self,
        model: PackedModel,
        optimizer: torch.optim.Optimizer,
        *,
        machine: MachineConfig,
        optim: OptimConfig,
        num_micro_batches: int,
        rank: Rank,
        save_frozen: bool = True,
    ) -> None:
        """Put ``model`` under ZeRO. ``save_frozen=False`` leaves frozen weights out of checkpoints: with adapters
        they are the whole base model, which the run keeps once."""
        self.rank = rank
        self.save_frozen = save_frozen
        self.zero_stage = machine.zero_stage
        self.state_bytes = state_bytes(optim)  # of AdamW, for each parameter of this rank's share
        offload_adamw = optimizer if isinstance(optimizer, OffloadAdamW) else None
        for layer in model.whole_layers:
            set_z3_leaf_module(layer, True)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_config(machine, optim, num_micro_batches, rank.dp_size),
            dist_init_required=False,
        )
        self._state_files = StateFiles()
        self.engine.checkpoint_engine = self._state_files
        # A script that makes float32 weights of the state; weights/ has them already.
        self.engine._copy_recovery_script = lambda *_: None
        if self.zero_stage < 3:
            model.lay_frozen_weights_together()
        self._sums: list[GradientSums] = []  # to which layers add gradients themselves
        self._norms = PartNorms(optimizer.param_groups, rank.device)
        if isinstance(self.optimizer, BF16_Optimizer):
            self._sums = keep_float32_sums(
                self.optimizer,
                clip=optim.max_grad_norm,
                on_norm=self._report,
                summed_by_layers=model.weights_with_sums(),
            )
            if optim.master_dtype is MasterDtype.split:
                assert offload_adamw is not None, "only OffloadAdamW updates split masters"
                drop_masters(self.optimizer, offload_adamw.keep_low_bits)
            elif optim.master_dtype is MasterDtype.bfloat16:
                drop_masters(self.optimizer)
        elif self.zero_stage:
            self._norms.watch(self.optimizer)
        self._transfer = Transfer(rank.device)
        self._totals = torch.empty(0)  # of the step in progress
        self._is_bad: IsBad | None = None  # of that step
        self._reading: Reading | None = None  # what that step reports
        self._update = optimizer  # DeepSpeed calls its ``step`` once, or once for each group
        optimizer.register_step_pre_hook(self._report_before_update)
        self._choose_plan: ChoosePlan = lambda batch, reserved_bytes: model.given_plan
        self._callbacks = NO_CALLBACKS
        self.offload_schedule: OffloadSchedule | None = None  # None: optimizer state stays on the device
        if offload_adamw is not None:
            self.offload_schedule = OffloadSchedule(offload_adamw)
            self._callbacks = LayerCallbacks(
                before_layer=self.offload_schedule.before_layer,
                after_layer_backward=self.offload_schedule.after_layer_backward,
            )

    def choose_plans_by(self, choose_plan: ChoosePlan) -> None:
        """From now on let ``choose_plan`` say what each micro-batch recomputes, not the model's ``given_plan``."""
        self._choose_plan = choose_plan

    def plan_of(self, batch: Batch, *, first: bool, last: bool) -> RecomputePlan:
        """What the layers recompute of a micro-batch in training, by its place in the step."""
        return self._choose_plan(batch, self.reserved_bytes(batch, first=first, last=last))

    def prefetch(self, batch: Batch) -> None:
        """Start copying a micro-batch to the device while the device computes; the next ``forward`` uses the copy."""
        self._transfer.prefetch(batch)

    def forward(
        self,
        batch: Batch,
        *,
        first: bool = False,
        last: bool = False,
        plan: RecomputePlan | None = None,
        whole_last_layer: bool = False,
    ) -> Any:
        """The model's output for a micro-batch on this rank's device, the ``first`` of a step, its ``last`` or both.

        ``plan`` replaces ``plan_of``, for dry runs. ``whole_last_layer`` as PackedModel.forward takes it.
        """
        if plan is None and self.engine.training:
            plan = self.plan_of(batch, first=first, last=last)
        if self.offload_schedule is not None and (first or last):
            reserved_bytes = self.reserved_bytes(batch, first=first, last=last)
            self.offload_schedule.begin_forward(batch, reserved_bytes, first=first, last=last)
        return self.engine(
            self._transfer.get(batch),
            plan=plan,
            whole_last_layer=whole_last_layer,
            sums=self._sums,
            callbacks=self._callbacks,
        )

    def reserved_bytes(self, batch: Batch, *, first: bool, last: bool) -> int:
        """Bytes of the activations' budget that optimizer state in transit takes beside this micro-batch."""
        return (
            0
            if self.offload_schedule is None
            else self.offload_schedule.reserved_bytes(batch, first=first, last=last)
        )

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss`` to the step's. Gradients are summed over micro-batches and ranks."""
        self.engine.backward(loss * self.rank.dp_size, scale_wrt_gas=False)

    def step(self, totals: Tensor, is_bad: IsBad | None = None) -> Reading:
        """Clip and update once the last micro-batch is in.

        Returns ``totals`` (n,), summed over ranks in place, after them the gradients' L2 norm before clipping, then
        that of each of ``parts``, and where there is ``is_bad``, what that said, 1 or 0. Their copy to the host starts
        before the update. Where it said 1, weights, masters and optimizer state stay as they are, bit for bit; call
        ``end_step`` then.
        """
        self.end_step(is_skipped=False)  # of the step before, where nothing could be skipped
        dist.all_reduce(totals)
        self._totals, self._is_bad, self._reading = totals, is_bad, None
        if self.zero_stage == 0:
            # DeepSpeed keeps no norm here. The last backward pass has already reduced the gradients.
            groups = [
                [p.grad for p in group["params"] if p.grad is not None] for group in self._update.param_groups
            ]
            norms = [torch.nn.utils.get_total_norm(grads).to(self._totals.device) for grads in groups]
            self._report(torch.stack(norms).norm(), norms)
        self.engine.step()
        # Where DeepSpeed itself found the gradients not to be finite, it has not come to the update.
        return self._reading or self._report(self.engine.get_global_grad_norm())

    @property
    def parts(self) -> list[str]:
        """The parts that train, in the order of their norms."""
        return self._norms.names

    def end_step(self, *, is_skipped: bool) -> None:
        """Tell the optimizer, once the host knows it, whether the last step was skipped."""
        if isinstance(self._update, StochasticAdamW):
            self._update.end_step(is_skipped=is_skipped)

    def _report_before_update(self, *_: Any) -> None:
        if self._reading is None:  # DeepSpeed's stages 1 to 3 take the norm just before
            self._report(self.optimizer._global_grad_norm)

    def _report(self, norm: float | Tensor, of_groups: Sequence[Tensor] | None = None) -> Reading:
        norm = torch.as_tensor(norm, dtype=self._totals.dtype, device=self._totals.device)
        values = [self._totals, norm.reshape(1), self._norms.of_groups(of_groups)]
        if self._is_bad is not None:
            bad = self._is_bad(self._totals, norm).float()
            self._update.found_inf = bad  # type: ignore[attr-defined]
            values.append(bad.reshape(1))
        self._reading = Reading(torch.cat(values))
        return self._reading

    def states_to_come(self) -> int:
        """Bytes that AdamW's state will take on this rank's device, where no step has created it yet.

        torch creates it in the first step, and DeepSpeed 0.19.8 leaves that to torch in all its stages.
        """
        if self.offload_schedule is not None or any(
            getattr(self.optimizer, "optimizer", self.optimizer).state.values()
        ):
            return 0
        trained = [p for p in self.engine.module.parameters() if p.requires_grad]
        size = sum(
            getattr(p, "ds_numel", p.numel()) for p in trained
        )  # ds_numel: the whole size of what ZeRO-3 has partitioned
        return -(-size // (self.rank.dp_size if self.zero_stage else 1)) * self.state_bytes

    def finish_micro_batch(self) -> None:
        """Let DeepSpeed count a finished micro-batch that is not the step's last one."""
        self.engine.step()

    def train(self, training: bool) -> None:
        """Switch dropout and activation checkpointing on or off."""
        self.engine.train(training)

    def full_state_dict(self, module: torch.nn.Module) -> dict[str, Tensor]:
        """Whole weights of ``module`` on rank 0's CPU; empty on other ranks. Tied weights appear once.

        Without frozen ones where checkpoints leave them out. Every rank must call this: under ZeRO-3 it gathers.
        """
        return self._whole_weights(module, HostCopies(self.rank.device))

    def _take_files(self) -> None:
        self.engine.save_checkpoint(
            "engine", tag=FOLDER, save_latest=False, exclude_frozen_parameters=not self.save_frozen
        )

    def _whole_weights(self, module: torch.nn.Module, copies: HostCopies) -> dict[str, Tensor]:
        state = {}
        for name, parameter in module.named_parameters():
            if not (self.save_frozen or parameter.requires_grad):
                continue
            gathered = deepspeed.zero.GatheredParameters([parameter], enabled=self.zero_stage == 3)
            with gathered:
                if self.rank.is_first:
                    state[name] = copies.copy(parameter)
                    copies.finish()
        return state

    def take_state(self, copies: HostCopies | None = None) -> EngineState:
        """Weights, optimizer state and DeepSpeed's counters, of each rank its share, as they are now.

        With ``copies`` all of it is copied to the host; else only weights are, and the rest is the engine's own, which
        the next step changes. All ranks call it.
        """
        self._state_files.copies = copies
        self._take_files()
        files = {Path(path).name: content for path, content in self._state_files.taken.items()}
        self._state_files.taken = {}
        module = self.engine.module.model
        if self.zero_stage == 3:
            weights = self._whole_weights(module, copies or HostCopies(self.rank.device))
        else:
            weights = take_weights(files, module, is_all=self.save_frozen) if self.rank.is_first else {}
            if copies is None:  # they are parts of one storage, which safetensors refuses
                weights = HostCopies(torch.device("cpu")).copy(weights)
        return EngineState(files, weights)

    def bytes_to_save(self) -> int:
        """Bytes of this rank's share of a checkpoint, once AdamW has its state. All ranks call it."""
        self._state_files.copies = None
        self._take_files()
        held = bytes_of(self._state_files.taken)
        self._state_files.taken = {}
        if self.rank.is_first and (self.zero_stage == 3 or not self.save_frozen):  # weights are no part of it
            saved = [p for p in self.engine.module.parameters() if self.save_frozen or p.requires_grad]
            held += sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in saved)
        if self.offload_schedule is not None:
            return held + self.offload_schedule.optimizer.host_bytes_to_come()
        return held + self.states_to_come()

    def load(self, folder: Path) -> None:
        """Read what ``take_state`` took, under the same number of ranks and ZeRO stage (else: zero/reshard/load.py).

        The optimizer's options (rates, betas, weight decay) stay those of this run, although torch stores them with the
        optimizer state. Raises RuntimeError where ``folder`` holds no state.
        """
        if (
            self.offload_schedule is None
        ):  # else the device would hold them twice; OffloadAdamW reads into its own
            self._update.state.clear()
        options = [
            {name: value for name, value in group.items() if name != "params"}
            for group in self.optimizer.param_groups
        ]
        loaded, _ = self.engine.load_checkpoint(str(folder), tag="state", load_module_strict=self.save_frozen)
        if loaded is None:
            raise RuntimeError(f"DeepSpeed found no state under {folder}")
        for group, own in zip(self.optimizer.param_groups, options, strict=True):
            group.update(own)
