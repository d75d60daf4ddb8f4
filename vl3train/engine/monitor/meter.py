"""Throughput: useful operations a second of a step, beside what the device can do and what is recomputed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vl3train.contracts.gpus import peak_teraflops
from vl3train.contracts.records import Batch
from vl3train.model.activations.flops import FlopRates, flop_rates
from vl3train.model.activations.work import RecomputePlan, RecomputeRates, recompute_rates

MATMUL_SIZE = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Meter:
    """Rates of the model as it trains, and two peaks of the device: by its datasheet and measured; None if unknown."""

    rates: FlopRates
    recompute: RecomputeRates
    peak_tflops: float | None
    matmul_tflops: float | None

    def figures(
        self, batches: Sequence[Batch], plans: Sequence[RecomputePlan], seconds: float
    ) -> dict[str, Any]:
        """Useful TFLOP/s of this rank in a step of ``seconds``, data wait included, and its shares of the peaks.

        Padding, recomputation and the optimizer count nothing. ``recompute_fraction`` is what was recomputed, each
        batch by its plan, as a share of the useful work.
        """
        work = sum(self.rates.of(batch) for batch in batches)
        recompute = sum(self.recompute.of(*pair) for pair in zip(batches, plans, strict=True))
        tflops = work / seconds / 1e12
        return {
            "useful_tflops": tflops,
            "recompute_fraction": recompute / work if work else None,
            "mfu_datasheet": tflops / self.peak_tflops if self.peak_tflops else None,
            "mfu_matmul": tflops / self.matmul_tflops if self.matmul_tflops else None,
        }


def make_meter(hf_model: Any, device: torch.device, *, recomputes_logits: bool) -> Meter:
    """The meter of a run. On a GPU it times a matrix product of 8192 cubed, which takes a fifth of a second.

    ``recomputes_logits`` as in recompute_rates.
    """
    rates, recompute = flop_rates(hf_model), recompute_rates(hf_model, recomputes_logits=recomputes_logits)
    if device.type != "cuda":
        return Meter(rates=rates, recompute=recompute, peak_tflops=None, matmul_tflops=None)
    peak = peak_teraflops(torch.cuda.get_device_name(device))
    return Meter(rates=rates, recompute=recompute, peak_tflops=peak, matmul_tflops=measure_matmul(device))


def measure_matmul(device: torch.device) -> float:
    """TFLOP/s of a bfloat16 matrix product on random values, the median of ten."""
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(13):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        a @ b
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * MATMUL_SIZE**3 / sorted(times[3:])[5] / 1e9
