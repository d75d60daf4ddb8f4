"""Steps of the same records with and without shared prefixes, under the engine that users run (docs/families.md)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import numpy as np
import torch

from benchmarks.data.packs import draw_packs, draw_text, pack_batch
from benchmarks.figures import Figures
from benchmarks.gpu.engine import OwnEngine, own_engine, say
from benchmarks.gpu.family_packs import MIXES, TINY_MIXES, FamilyMix, Packs, draw_shared
from benchmarks.gpu.family_steps import FamilyStep, MixWork, Timed, num_warm_up_packs, run, steps_of
from benchmarks.gpu.model import build_row_model, mix_of
from benchmarks.gpu.rows import ONE_H100, Row, tiny
from vl3train.contracts.records import Batch
from vl3train.engine.memory.warmup import plans_to_warm_up, warm_up
from vl3train.model.activations.flops import flop_rates

ALONE = "alone"
MIX_NAMES = (*MIXES, ALONE)
ROW = Row(**ONE_H100)
"""As row 2b of benchmarks/one_gpu.py: the published 2B, merge size 2, packs of 16 384 tokens, four a step."""
TFLOPS_AIM = 0.9
ALONE_STEPS = 2
"""Times as many steps of records that share nothing: what may be lost there is a hundredth."""


def measure_families(names: Sequence[str], steps: int, figures: Figures, *, debug: bool) -> None:
    """Take the figures of the mixes ``names``, each as soon as it can be told.

    One process and one engine: the ways to train a mix take turns, so that a GPU that slows down slows both. Records
    that share nothing come before the engine has seen a shared prefix, and once more at the end.
    """
    started = time.perf_counter()

    def tell(what: str) -> None:
        say(f"[{time.perf_counter() - started:.0f} s] {what}")

    device = torch.device("cpu" if debug else "cuda")
    row = tiny(ROW) if debug else ROW
    hf_model = build_row_model(row, device)
    rates = flop_rates(hf_model)
    own = own_engine(row, hf_model, device, shares_prefix=True)
    tell("engine made, kernels checked")
    work = {
        name: MixWork(row, mix, rates, steps)
        for name, mix in (TINY_MIXES if debug else MIXES).items()
        if name in names
    }
    usual: list[FamilyStep] = []
    others = [pack for one in work.values() for pack in one.other_apart]
    if ALONE in names:
        packs = draw_packs(
            steps * ALONE_STEPS * row.packs_a_step, max_tokens=row.max_tokens, mix=mix_of(row.model)
        )
        usual = steps_of(packs, row, rates)
        others += draw_packs(
            num_warm_up_packs(), max_tokens=row.max_tokens, seed=1, mix=replace(mix_of(row.model), blank=True)
        )
    tell("packs drawn")
    warm_up_with(own, others)
    largest = filled(row, others)
    if device.type == "cuda":
        ordinary = [step for one in work.values() for step in one.apart] + usual
        own.fit([batch for step in ordinary for batch in step.batches] + [largest])
    tell("warmed up without shared prefixes")
    # A GPU gets slower in the first seconds of work: these steps are not to be faster for being the first.
    off = run(own, {"off": usual}, tell, firsts=len(usual))["off"] if usual else None
    warm_up_with(own, [pack for one in work.values() for pack in one.other_shared] or some_shared(row))
    tell("warmed up with shared prefixes")
    shares = {}
    for name, one in work.items():
        found = run(own, {"apart": one.apart, "shared": one.shared}, tell)
        shares[name] = tell_mix(name, one.mix, found["apart"], found["shared"], figures)
    if shares:
        note = "least of: " + ", ".join(f"{name} {share:.3f}" for name, share in shares.items())
        figures.add(
            "family_tflops_share",
            min(shares.values()),
            "of ordinary packs' useful TFLOP/s",
            "higher",
            note,
            TFLOPS_AIM,
        )
    if off is not None:
        tell_alone(off, run(own, {"on": usual}, tell)["on"], figures)
    if device.type == "cuda":
        tell(f"done; at most {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB were held")


def filled(row: Row, packs: Packs) -> Batch:
    """The pack with most patches, filled up with a text: no pack with shared prefixes has more of either."""
    most = max(packs, key=lambda pack: sum(len(sample.patches) for sample in pack))
    room = row.max_tokens - sum(len(sample.input_ids) for sample in most)
    text = [draw_text(np.random.default_rng(0), room, mix_of(row.model))] if room else []
    return pack_batch([*most, *text])


def some_shared(row: Row) -> Packs:
    """Packs with shared prefixes for an engine that is to have seen some."""
    mixes = TINY_MIXES if row.model == "tiny" else MIXES
    ids = replace(mix_of(row.model), blank=True)
    return draw_shared(2, mix=mixes["clip_8"], ids=ids, max_tokens=row.max_tokens, seed=1)[0]


def warm_up_with(own: OwnEngine, packs: Packs) -> None:
    """Load and compile kernels for the sizes of these packs, those with most patches first."""
    largest_first = sorted(packs, key=lambda pack: -sum(len(sample.patches) for sample in pack))
    warm_up(own.engine, map(pack_batch, largest_first), plans_to_warm_up(own.packed))


def tell_mix(name: str, mix: FamilyMix, apart: Timed, shared: Timed, figures: Figures) -> float:
    """The figures of one mix; returns the share of useful TFLOP/s."""
    ratio = shared.records_a_second / apart.records_a_second
    share = shared.tflops / apart.tflops
    arithmetic = apart.flops_a_record / shared.flops_a_record
    note = f"apart: {apart}; shared: {shared}; {arithmetic:.2f} times by the arithmetic of useful work"
    figures.add(f"family_ratio_{name}", ratio, "times as many annotations a second", "higher", note, mix.aim)
    figures.add(
        f"family_tflops_share_{name}", share, "of ordinary packs' useful TFLOP/s", "higher", note, TFLOPS_AIM
    )
    return share


def tell_alone(off: Timed, on: Timed, figures: Figures) -> None:
    """The figure of records that share nothing: the same packs, before and after packs with shared prefixes."""
    ratios = [before / after for before, after in zip(off.seconds, on.seconds, strict=True)]
    note = (
        f"median over {len(ratios)} steps of the same packs, {min(ratios):.4f} to {max(ratios):.4f}; "
        f"off: {off}; on: {on}"
    )
    figures.add(
        "family_ratio_alone", median(ratios), "times as many annotations a second", "higher", note, 0.99
    )
