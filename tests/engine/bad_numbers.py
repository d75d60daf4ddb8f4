"""Bad numbers planted in runs: the first sample of some steps has a loss that is not what the model says."""

from __future__ import annotations

from vl3train.engine import loop
from vl3train.engine.zero.engine import Zero


def plant(factors, patch=setattr):
    """In each step of ``factors`` multiply the loss of the first sample of this rank's first pack by its factor."""
    steps_to_do, forward = loop.steps_to_do, Zero.forward
    current = []

    def watched(run, last_step):
        for step_batches in steps_to_do(run, last_step):
            current[:] = [step_batches.cursor.step]
            yield step_batches

    def poisoned(self, batch, *, first=False, **place):
        output = forward(self, batch, first=first, **place)
        factor = factors.get(current[0]) if first and current else None
        if factor is None:
            return output
        in_first_U = (batch.supervised_segments == batch.supervised_segments[0]).to(
            output.token_losses.device
        )
        losses_U = output.token_losses.where(~in_first_U, output.token_losses * factor)
        return output._replace(loss_sum=output.loss_sum * factor, token_losses=losses_U)

    patch(loop, "steps_to_do", watched)
    patch(Zero, "forward", poisoned)
