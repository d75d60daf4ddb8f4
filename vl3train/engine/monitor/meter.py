"""The honest meter: useful work a second of a step, against what the device can do and what is computed again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vl3train.contracts.records import Batch
from vl3train.model.activations.flops import FlopRates, flop_rates
from vl3train.model.activations.work import RecomputePlan, RecomputeRates, recompute_rates

PEAK_TFLOPS = {"A100": 312.0, "H100": 989.4, "H200": 989.4, "B200": 2250.0}
"""Dense bfloat16 TFLOP/s by NVIDIA's datasheets (SXM forms), found by a part of the device's name."""

MATMUL_SIZE = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Meter:
    """Rates of the model as it trains, and the device's two ceilings; None where they are not known."""

    rates: FlopRates
    recompute: RecomputeRates
    peak_tflops: float | None
    matmul_tflops: float | None

    def figures(
        self, batches: Sequence[Batch], levels: Sequence[RecomputePlan], seconds: float
    ) -> dict[str, Any]:
        """Useful TFLOP/s of this rank over one step of ``seconds``, data wait included, and its shares (MFU).

        Padding, recomputation and the optimizer count nothing. ``recompute_fraction`` is what was computed again,
        with each batch at its ``levels``, as a share of the useful work.
        """
        work = sum(self.rates.of(batch) for batch in batches)
        recompute = sum(self.recompute.of(*pair) for pair in zip(batches, levels, strict=True))
        tflops = work / seconds / 1e12
        return {
            "useful_tflops": tflops,
            "recompute_fraction": recompute / work if work else None,
            "mfu_datasheet": tflops / self.peak_tflops if self.peak_tflops else None,
            "mfu_matmul": tflops / self.matmul_tflops if self.matmul_tflops else None,
        }


def make_meter(hf_model: Any, device: torch.device, *, recomputes_logits: bool) -> Meter:
    """The meter of a run; on a GPU it times a matrix product of 8192 cubed, a fifth of a second.

    ``recomputes_logits`` as recompute_rates takes it.
    """
    rates, recompute = flop_rates(hf_model), recompute_rates(hf_model, recomputes_logits=recomputes_logits)
    if device.type != "cuda":
        return Meter(rates=rates, recompute=recompute, peak_tflops=None, matmul_tflops=None)
    name = torch.cuda.get_device_name(device)
    peak = next((value for part, value in PEAK_TFLOPS.items() if part in name), None)
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
