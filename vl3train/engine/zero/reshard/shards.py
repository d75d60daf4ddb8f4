"""The state that DeepSpeed wrote, by parameter name: of any number of ranks, in any ZeRO stage.

Files are mapped into memory, so that of a file only the ranges are read that are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vl3train.engine.zero.reshard.layouts import (
    Groups,
    Layout,
    Piece,
    buffer_size,
    buffers_of,
    pieces_of_shard,
)
from vl3train.engine.zero.state_files import read_state

MASTER = "master"
"""The weights that the optimizer updates: float32, or the bfloat16 weights where it keeps no float32 ones."""
STEP = "step"

# Names in the files of DeepSpeed 0.19.8; files of builds before this have them, too.
OPTIMIZER = "optimizer_state_dict"
BASE_OPTIMIZER = "base_optimizer_state"
MASTERS = "single_partition_of_fp32_groups"
MASTERS_OF_STAGE_3 = "fp32_flat_groups"


@dataclass(frozen=True, slots=True)
class Buffer:
    """One flat buffer of one rank, and AdamW's state of it."""

    master: Tensor  # (values,); in stage 0 of the parameter's shape
    state: Mapping[str, Any]  # by name, as AdamW has it; empty before the first step


class Shards:
    """One checkpoint's state files."""

    def __init__(self, folder: Path, layout: Layout, groups_now: Groups) -> None:
        """``groups_now`` are those of the run that reads; files of stage 0 do not name theirs."""
        self.folder, self.layout = folder, layout
        self._opened: dict[Path, Any] = {}
        self._buffers: dict[int, list[Buffer]] = {}
        shapes = self.model_states(0)["param_shapes"]
        self.groups: Groups = (
            [{name: shape.numel() for name, shape in group.items()} for group in shapes]
            if layout.zero_stage
            else groups_now
        )

    def model_states(self, shard: int) -> Any:
        """What DeepSpeed wrote beside the optimizer's state: weights and counters."""
        of_rank = f"zero_pp_rank_{shard}_" if self.layout.zero_stage == 3 else ""
        return self._open(self.folder / f"{of_rank}mp_rank_00_model_states.pt")

    @cached_property
    def places(self) -> dict[str, list[Piece]]:
        """Where each parameter's values lie, in their order."""
        found: dict[str, list[Piece]] = {}
        for shard in range(self.layout.num_shards):
            for piece in pieces_of_shard(self.layout, self.groups, shard):
                found.setdefault(piece.name, []).append(piece)
        return found

    def buffer(self, shard: int, number: int) -> Buffer:
        """One buffer of one rank."""
        if shard not in self._buffers:
            self._buffers[shard] = self._buffers_of(shard)
        return self._buffers[shard][number]

    def read_into(self, out: Tensor, name: str, start: int, what: str) -> None:
        """Fill ``out`` (n,) with the values of one parameter from ``start``, of MASTER or of a part of AdamW's state.

        Raises KeyError where the state has no such part.
        """
        end = start + len(out)
        for piece in self.places[name]:
            first, last = max(start, piece.start), min(end, piece.start + piece.size)
            if first < last:
                offset = piece.offset + first - piece.start
                out[first - start : last - start] = self._flat(piece, what)[offset : offset + last - first]

    def dtype_of(self, name: str, what: str) -> torch.dtype:
        """How these values were saved."""
        return self._flat(self.places[name][0], what).dtype

    def _flat(self, piece: Piece, what: str) -> Tensor:
        buffer = self.buffer(piece.shard, piece.buffer)
        part: Tensor = buffer.master if what == MASTER else buffer.state[what]
        return part.reshape(-1)

    def state_of(self, name: str) -> Mapping[str, Any]:
        """AdamW's state of the buffer that has the first values of a parameter."""
        first = self.places[name][0]
        return self.buffer(first.shard, first.buffer).state

    def weight(self, name: str) -> Tensor | None:
        """One whole weight or buffer of the model, flat, None where this checkpoint leaves it out."""
        module = self.model_states(0)["module"]
        if self.layout.zero_stage < 3 or name in self.model_states(0)["buffer_names"]:
            return module[name].reshape(-1) if name in module else None
        if name in self.places:
            last = self.places[name][-1]
            whole = torch.empty(last.start + last.size, dtype=self.dtype_of(name, MASTER))
            self.read_into(whole, name, 0, MASTER)
            return whole
        shapes = self.model_states(0)["frozen_param_shapes"] or {}
        if name not in shapes:
            return None
        parts = [
            self.model_states(shard)["frozen_param_fragments"][name].reshape(-1)
            for shard in range(self.layout.dp_size)
        ]
        return torch.cat(parts)[: shapes[name].numel()]

    def _buffers_of(self, shard: int) -> list[Buffer]:
        if self.layout.zero_stage == 0:
            file = self.model_states(0)
            base = file["optimizer"]
            masters = [file["module"][name] for group in self.groups for name in group]
        else:
            [path] = self.folder.glob(f"*zero_pp_rank_{shard}_mp_rank_00_optim_states.pt")
            file = self._open(path)[OPTIMIZER]
            in_stage_3 = self.layout.zero_stage == 3
            base = file[OPTIMIZER if in_stage_3 else BASE_OPTIMIZER]
            masters = file[MASTERS_OF_STAGE_3 if in_stage_3 else MASTERS]
        numbers = [number for group in base["param_groups"] for number in group["params"]]
        states = [base["state"].get(number, {}) for number in numbers]
        self._check_sizes(shard, states, len(masters))
        return [Buffer(master, state) for master, state in zip(masters, states, strict=True)]

    def _check_sizes(self, shard: int, states: list[Any], num_masters: int) -> None:
        """Our own arithmetic against what was written: a checkpoint that is read wrongly must never train."""
        wanted = [buffer_size(self.layout, group) for group in buffers_of(self.layout, self.groups)]
        assert len(wanted) == len(states) == num_masters, (
            f"{self.folder}: rank {shard} has {len(states)} states and {num_masters} masters, not {len(wanted)}"
        )
        for size, state in zip(wanted, states, strict=True):
            for name, value in state.items():
                assert name == STEP or value.numel() == size, (
                    f"{self.folder}: rank {shard} has {value.numel()} values of {name}, not {size}"
                )

    def _open(self, path: Path) -> Any:
        """One file, mapped; errors of ``read_state``."""
        if path not in self._opened:
            self._opened[path] = read_state(path, mmap=True)
        return self._opened[path]
