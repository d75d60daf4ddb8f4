"""The gradient norm of each part of the model, from norms that each ZeRO stage takes anyway, on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class PartNorms:
    """Puts the norms of AdamW's groups together: a part with weight decay has two groups (model/trainable.py)."""

    def __init__(self, groups: Sequence[Mapping[str, Any]], device: torch.device) -> None:
        """``groups`` are the optimizer's; the part of a group is the first word of its "name"."""
        parts = [str(group["name"]).partition(".")[0] for group in groups]
        self.names = list(dict.fromkeys(parts))
        self._place_of_group = torch.tensor([self.names.index(part) for part in parts], device=device)
        self._seen: list[Tensor] = []

    def watch(self, optimizer: Any) -> None:
        """Keep what DeepSpeed's optimizer of stage 1, 2 or 3 takes of each group; ``of_groups`` is then called without.

        Stage 3 has groups of its own, each a piece of one of AdamW's.
        """
        if (group_of_piece := getattr(optimizer, "sub_group_to_group_id", None)) is not None:
            groups = [group_of_piece[piece] for piece in sorted(group_of_piece)]
            self._place_of_group = self._place_of_group[groups]
        own = optimizer.get_grad_norm_direct

        def norm_and_keep(*arguments: Any, **named: Any) -> Tensor:
            norm: Tensor = own(*arguments, **named)
            self._seen.append(norm)
            return norm

        optimizer.get_grad_norm_direct = norm_and_keep

    def of_groups(self, norms: Sequence[Tensor] | None = None) -> Tensor:
        """(parts,) float64 from the norm of each group, 0-d each; NaN where DeepSpeed has found them not finite."""
        if norms is None:
            norms, self._seen = self._seen, []
        result = torch.zeros(len(self.names), dtype=torch.float64, device=self._place_of_group.device)
        if len(norms) != len(self._place_of_group):  # it gave the step up before it took them
            return result.fill_(torch.nan)
        values = torch.stack([norm.to(result) for norm in norms])
        values = torch.where(values < 0, torch.nan, values)  # DeepSpeed's sign for not finite is -1
        return result.index_add_(0, self._place_of_group, values.square()).sqrt()
