"""The samples of one step, rendered as the model will see them, for people to look at."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vl3train.config.problems import counted
from vl3train.config.schema import TrainConfig
from vl3train.contracts.bad_step import BadStep, SampleLoss
from vl3train.contracts.records import Pack, RenderedSample, SampleError
from vl3train.contracts.tokens import IGNORE_INDEX, PATCH_SIZE
from vl3train.data.render.chat_tokens import ChatTokenizer
from vl3train.report.html import data_url, thumbnail

if TYPE_CHECKING:
    from vl3train.data.loader import OpenData
    from vl3train.data.render.decode_client import Decoder

FRAMES_SHOWN = 8
PRUNED_SHADE = 0.25
"""How much of a pruned token's brightness is left in the picture."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a pack of a step runs."""

    rank: int
    micro_batch: int
    pack: Pack


def step_places(packs: list[Pack], dp_size: int) -> list[Place]:
    """The packs of a step, rank after rank in the order they run.

    >>> one = Pack(samples=(), num_tokens=0, num_patches=0, num_supervised_tokens=0, cost=1)
    >>> [(place.rank, place.micro_batch) for place in step_places([one] * 4, 2)]
    [(0, 0), (0, 1), (1, 0), (1, 1)]
    """
    from vl3train.data.plan.costs import rank_packs

    return [
        Place(rank, number, pack)
        for rank in range(dp_size)
        for number, pack in enumerate(rank_packs(packs, rank, dp_size))
    ]


@contextmanager
def decoding(data: OpenData) -> Iterator[Decoder]:
    """A decoder for ``rendered`` in the decode sandbox: a file that hangs or crashes it ends only that process."""
    from vl3train.data.render.decode_client import Decoder, decode_server

    with decode_server(data.settings, data.tokenizer_dir, data.limits) as address:
        decoder = Decoder(address, data.decode_seconds, int(data.plan.table.num_patches.max(initial=0)))
        try:
            yield decoder
        finally:
            decoder.close()


def rendered(data: OpenData, row: int, decoder: Decoder) -> RenderedSample | SampleError:
    """A sample as its pack will hold it, or why it cannot be used. Decoding ends after ``data.decode_seconds``."""
    index = data.index
    try:
        conversation, parts = index.read_sample(row)
        sample = decoder.render(
            conversation, parts, index.lengths(row), key=index.key(row), source=index.source(row)
        )
    except SampleError as error:
        return error
    return dataclasses.replace(sample, patches=sample.patches.copy())  # the decoder reuses their memory


@dataclass(frozen=True, slots=True)
class TextPiece:
    """Neighbouring tokens of one kind. ``count`` is the number of visual tokens, and 0 for text."""

    text: str
    supervised: bool
    count: int = 0


def text_pieces(sample: RenderedSample, tokenizer: ChatTokenizer) -> list[TextPiece]:
    """The sample's text in pieces: supervised, not supervised, visual tokens.

    A token is shown as supervised where the model is asked to predict it: its label stands one place before.
    """
    ids = sample.input_ids
    asked = np.concatenate([[False], sample.labels[:-1] != IGNORE_INDEX])
    visual = np.zeros(len(ids), bool)
    visual[sample.placeholder_positions] = True
    kinds = 2 * visual + asked
    bounds = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(ids)]
    pieces = []
    for first, end in itertools.pairwise(bounds):
        if visual[first]:
            pieces.append(TextPiece("", False, end - first))
        elif end > first:
            pieces.append(TextPiece(tokenizer.decode(ids[first:end].tolist()), bool(asked[first])))
    return pieces


def sample_pictures(sample: RenderedSample) -> list[list[np.ndarray]]:
    """What the encoder sees, rebuilt from the patches: up to FRAMES_SHOWN frames of each visual item.

    Tokens that are pruned are dark. Each picture is (h, w, 3) uint8.
    """
    items = []
    patch = token = 0
    for (t, h, w), merge in zip(sample.grids.tolist(), sample.merge_sizes.tolist(), strict=True):
        patches = sample.patches[patch : patch + t * h * w].reshape(t, h * w, -1)
        kept = sample.keep_mask[token : token + t * h * w // merge**2].reshape(t, -1)
        patch, token = patch + t * h * w, token + t * h * w // merge**2
        shown = np.unique(np.linspace(0, t - 1, min(t, FRAMES_SHOWN)).astype(int)).tolist()
        items.append([frame_picture(patches[n], kept[n], (h, w), merge) for n in shown])
    return items


def frame_picture(patches: np.ndarray, kept: np.ndarray, grid: tuple[int, int], merge: int) -> np.ndarray:
    """One frame from its patches in merge-block order; ``kept`` are its merged tokens.

    Args:
        patches: (h * w, 588) uint8.
        kept: (h * w / merge**2,) bool.
        grid: h and w, in patches.
        merge: side of a block.

    Returns:
        (14 h, 14 w, 3) uint8
    """
    h, w = grid
    light = np.where(kept, 1.0, PRUNED_SHADE).repeat(merge * merge)[:, None]
    values = (patches * light).astype(np.uint8)
    blocks = values.reshape(h // merge, w // merge, merge, merge, 3, PATCH_SIZE, PATCH_SIZE)
    return blocks.transpose(0, 2, 5, 1, 3, 6, 4).reshape(h * PATCH_SIZE, w * PATCH_SIZE, 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownSample:
    """One sample of a pack, with its text and pictures."""

    key: str
    about: str
    text: Sequence[TextPiece]
    pictures: Sequence[Sequence[str]]  # data: addresses of each visual item's frames
    fault: str | None  # why it cannot be used; it has no text and no pictures then
    loss: SampleLoss | None = None  # in a step that the run skipped


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownPack:
    """One pack, with the first of its samples."""

    place: Place
    token_fill: float
    patch_fill: float
    work: float  # its cost over the mean pack's
    samples: Sequence[ShownSample]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownStep:
    """One step of a run: a title, lines about it, its packs rank after rank."""

    title: str
    facts: Sequence[str]
    packs: Sequence[ShownPack]


def shown_step(
    cfg: TrainConfig, data: OpenData, step: int, most: int, bad: BadStep | None = None
) -> ShownStep:
    """One step, 1 for the first, with the first ``most`` samples of each pack rendered.

    Of a step that the run skipped, ``bad`` has the losses: then the worst samples of each pack come first.

    Raises ValueError when the run has no such step.
    """
    num_steps = cfg.run.num_steps or data.plan.total_steps(cfg.run.num_epochs)
    if not 1 <= step <= num_steps:
        raise ValueError(f"step={step}: the run has {counted(num_steps, 'step')}; the first is step=1")
    tokenizer = ChatTokenizer.from_folder(data.tokenizer_dir)
    cursor = data.plan.cursor_at(step - 1)
    places = step_places(data.plan.step_packs(cursor), cfg.machine.dp_size)
    with decoding(data) as decoder:
        losses = {} if bad is None else losses_by_key(bad)
        packs = [
            _shown_pack(
                data, tokenizer, decoder, place, places, _worst_first(data, place.pack, losses)[:most]
            )
            for place in places
        ]
        if losses:
            packs = [_with_losses(shown, losses) for shown in packs]
    facts = [
        f"virtual epoch {cursor.epoch}, step {cursor.step_in_epoch + 1} of its "
        f"{data.plan.steps_in_epoch(cursor.epoch)}; plan {data.plan.fingerprint}",
        f"{sum(len(place.pack.samples) for place in places)} samples, "
        f"{sum(place.pack.num_tokens for place in places):,} tokens, "
        f"{sum(place.pack.num_supervised_tokens for place in places):,} of them supervised, on "
        f"{counted(cfg.machine.dp_size, 'rank')}",
    ]
    if bad is not None:
        facts.append(f"the run skipped this step: {bad.reason}; samples with the highest losses come first")
        facts += [
            f"not finite: rank {one.rank}, micro-batch {one.micro_batch}, {one.key}" for one in bad.not_finite
        ]
    return ShownStep(title=f"{cfg.stage.name}, step {step}", facts=facts, packs=packs)


def losses_by_key(bad: BadStep) -> dict[str, SampleLoss]:
    """The loss of each sample, worst first; of a sample that the step has twice, the worse one."""
    losses: dict[str, SampleLoss] = {}
    for one in bad.samples:
        losses.setdefault(one.key, one)
    return losses


def _worst_first(data: OpenData, pack: Pack, losses: Mapping[str, SampleLoss]) -> list[int]:
    order = {key: number for number, key in enumerate(losses)}
    return sorted(pack.samples, key=lambda row: order.get(data.index.key(row), len(order)))


def _with_losses(shown: ShownPack, losses: Mapping[str, SampleLoss]) -> ShownPack:
    samples = [dataclasses.replace(sample, loss=losses.get(sample.key)) for sample in shown.samples]
    return dataclasses.replace(shown, samples=samples)


def _shown_pack(
    data: OpenData,
    tokenizer: ChatTokenizer,
    decoder: Decoder,
    place: Place,
    places: list[Place],
    rows: Sequence[int],
) -> ShownPack:
    """A pack with some of its samples rendered."""
    limits, pack = data.plan.step, place.pack
    mean = sum(other.pack.cost for other in places) / len(places)
    return ShownPack(
        place=place,
        token_fill=pack.num_tokens / limits.max_tokens,
        patch_fill=pack.num_patches / limits.max_patches,
        work=pack.cost / mean,
        samples=[
            _shown_sample(data, row, tokenizer, decoder, len(group))
            for row in rows
            for group in pack.groups
            if row in group
        ],
    )


def _shown_sample(
    data: OpenData, row: int, tokenizer: ChatTokenizer, decoder: Decoder, num_sharing: int
) -> ShownSample:
    """A sample with its pictures and text, or with the reason why it has none; so many share its prefix."""
    lengths = data.index.lengths(row)
    about = (
        f"{lengths.modality}: {lengths.num_tokens:,} tokens, {lengths.num_supervised_tokens:,} supervised, "
        f"{lengths.num_patches:,} patches, {lengths.num_visual_tokens:,} visual tokens"
    )
    if num_sharing > 1:
        about += f"; {num_sharing} samples share the first {lengths.prefix_tokens:,} tokens"
    key, sample = data.index.key(row), rendered(data, row, decoder)
    if isinstance(sample, SampleError):
        return ShownSample(key=key, about=about, text=[], pictures=[], fault=str(sample))
    pictures = [[data_url(thumbnail(frame), "jpeg") for frame in item] for item in sample_pictures(sample)]
    return ShownSample(
        key=key, about=about, text=text_pieces(sample, tokenizer), pictures=pictures, fault=None
    )
