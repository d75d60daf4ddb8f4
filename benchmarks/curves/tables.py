"""How far loss curves lie apart, as JSON lines and Markdown."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.figures import machine
from benchmarks.markdown import table_head, table_row
from vl3train.config.choices import Dtype

WINDOW = 10
SHOWN = (1, 50, 100, 150, 200)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Who computes the gradient, in which numbers, on which order of the data."""

    packed: bool
    dtype: Dtype
    compiled: bool = False
    rounded: bool = False  # no float32 masters, AdamW's moments in bfloat16: stochastic rounding
    seed: int = 0
    turned: bool = False  # the samples of each step in reverse order: only the rounding differs

    @property
    def name(self) -> str:
        """What the tables call it."""
        how = {"compiled": self.compiled, "rounded": self.rounded, "turned": self.turned}
        words = ["packed" if self.packed else "transformers", self.dtype.value]
        return " ".join([*words, *(word for word, is_so in how.items() if is_so)])


def reference_of(curve: Curve) -> Curve:
    """transformers in float32, on the same order of the data."""
    return Curve(packed=False, dtype=Dtype.float32, seed=curve.seed)


def smoothed(losses: Sequence[float]) -> np.ndarray:
    """Means of ``WINDOW`` steps, or of all where there are fewer."""
    width = min(WINDOW, len(losses))
    return np.convolve(losses, np.ones(width) / width, "valid")


def differences(found: dict[Curve, list[float]], curve: Curve, other: Curve) -> dict[str, float]:
    """How far two curves lie apart, in nats a token."""
    a, b = found[curve], found[other]
    return {
        "first_step": abs(a[0] - b[0]),
        "first_50_steps": float(np.max(np.abs(np.subtract(a[:50], b[:50])))),
        "window": float(np.max(np.abs(smoothed(a) - smoothed(b)))),
        "last_50_steps": float(abs(np.mean(a[-50:]) - np.mean(b[-50:]))),
    }


def noise(found: dict[Curve, list[float]]) -> dict[str, float]:
    """The reference against itself on the other order of the data."""
    first = Curve(packed=False, dtype=Dtype.float32)
    return differences(found, first, replace(first, seed=1))


def figure_lines(found: dict[Curve, list[float]], cuda: bool) -> Iterator[dict[str, Any]]:
    """One JSON line a curve with all its losses, and one for the noise."""
    where = torch.cuda.get_device_name() if cuda else machine()
    packages = ("torch", "transformers", "deepspeed")
    origin = {
        "machine": where,
        "versions": {name: version(name) for name in packages},
        "command": " ".join(["python -m benchmarks.loss_curves", *sys.argv[1:]]),
    }
    what = "largest difference of means of 10 steps, nats a token"
    yield {
        "figure": "loss_curve_noise",
        "value": noise(found)["window"],
        "unit": "nats",
        "better": "lower",
        "note": f"{what}; transformers in float32, seed 0 against seed 1",
        **origin,
    }
    for curve, losses in found.items():
        line: dict[str, Any] = {
            "figure": f"loss_curve_{curve.name.replace(' ', '_')}_seed_{curve.seed}",
            "unit": "nats",
        }
        if curve == reference_of(curve):
            line |= {
                "value": float(np.mean(losses[-50:])),
                "note": "the reference: mean of the last 50 steps",
            }
        else:
            line |= {
                "value": differences(found, curve, reference_of(curve))["window"],
                "aim": noise(found)["window"],
                "note": f"{what}; from transformers in float32, same data",
            }
        yield {**line, "better": "lower", **origin, **curve_line(curve, losses)}


def curve_line(curve: Curve, losses: list[float]) -> dict[str, Any]:
    """What ``kept_curves`` reads a curve from."""
    return {"settings": {**asdict(curve), "dtype": curve.dtype.value}, "more": {"losses": losses}}


def kept_curves(file: Path) -> dict[Curve, list[float]]:
    """The curves of a run's lines."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {
        Curve(**{**line["settings"], "dtype": Dtype(line["settings"]["dtype"])}): line["more"]["losses"]
        for line in lines
        if "settings" in line
    }


def markdown(found: dict[Curve, list[float]]) -> str:
    """Two tables: the curves, and how far they lie apart."""
    num_steps = len(next(iter(found.values())))
    shown = [step for step in SHOWN if step <= num_steps] or [1, num_steps]
    lines = [
        "Loss, nats a token; from step 50 on the mean of the 10 steps that end there.\n",
        table_head("gradient by", "order", *(f"step {step}" for step in shown), numbers=len(shown)),
    ]
    for curve, losses in found.items():
        means = [np.mean(losses[max(0, step - WINDOW) : step]) if step > 1 else losses[0] for step in shown]
        lines.append(table_row(curve.name, f"seed {curve.seed}", *(f"{mean:.4f}" for mean in means)))
    distances = ("step 1", "any of steps 1 to 50", "any mean of 10 steps", "mean of the last 50")
    lines += [
        "\nDistance from each other on the same data, nats a token.\n",
        table_head("gradient by", "from", "order", *distances, numbers=4),
    ]
    pairs = [(c, reference_of(c)) for c in found if c != reference_of(c)]
    in_bfloat16 = [c for c in found if c.packed and c.dtype is Dtype.bfloat16]
    pairs += [(c, Curve(packed=False, dtype=c.dtype, seed=c.seed, turned=c.turned)) for c in in_bfloat16]
    for curve, other in pairs:
        cells = [f"{x:.2g}" for x in differences(found, curve, other).values()]
        lines.append(table_row(curve.name, other.name, f"seed {curve.seed}", *cells))
    cells = [f"{x:.2g}" for x in noise(found).values()]
    lines.append(table_row("transformers float32, seed 0", "itself, seed 1", "noise", *cells))
    return "\n".join(lines) + "\n"
