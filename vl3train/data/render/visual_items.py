"""The visual items of a sample: how large each is shown, and its patches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from vl3train.contracts.geometry import picture_grid, token_budget_pixels
from vl3train.contracts.records import RenderSettings, SampleError
from vl3train.contracts.tokens import PATCH_VALUES
from vl3train.data.media.clips import ClipPlan, DecodeLimits, FrameCountError, plan_clip, read_frames
from vl3train.data.media.patches import resize, resize_and_patchify
from vl3train.data.media.stored_frames import STORED_SUFFIX, is_stored, pack_frames, plan_stored, read_stored
from vl3train.data.pictures.colours import Colours, colours_of
from vl3train.data.pictures.images import ImageHeader, decode_image, decode_picture, image_header
from vl3train.data.pictures.picture_clips import is_picture_clip, plan_pictures, read_pictures
from vl3train.data.pictures.whole_files import looks_whole
from vl3train.data.records.conversation import (
    Conversation,
    Image,
    Stream,
    Turn,
    Video,
    read_conversation,
    rename_parts,
    visual_items,
)
from vl3train.data.records.shard_records import open_conversation
from vl3train.data.shards.several_records import join_records, split_records
from vl3train.data.shards.tar_headers import CONVERSATION_PART
from vl3train.data.video.timeline import FrameRule

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Item:
    """A visual item whose size is known and whose pixels are not decoded yet."""

    data: bytes
    grid: tuple[int, int, int]  # patches along time, height, width
    merge_size: int
    clip: ClipPlan | None  # None: an image, which has a header
    header: ImageHeader | None
    colours: Colours

    @property
    def times(self) -> tuple[float, ...]:
        """Of each frame, in seconds; empty for an image."""
        return self.clip.times if self.clip else ()

    @property
    def num_patches(self) -> int:
        """Patches of all its frames."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def num_tokens(self) -> int:
        """Visual tokens before pruning."""
        return self.num_patches // self.merge_size**2


def by_packets_else_exact(make: Callable[[bool], Made]) -> Made:
    """Take the number of frames from the packets; where decoding proves it wrong, count by decoding."""
    try:
        return make(False)
    except FrameCountError:
        return make(True)


def lay_out(
    conversation: Conversation,
    parts: Mapping[str, bytes],
    settings: RenderSettings,
    limits: DecodeLimits,
    exact: bool,
) -> list[Item]:
    """Sizes of all visual items. All images and frames of the sample share its budget of visual tokens."""
    contents = visual_items(conversation)
    if missing := sorted({content.part for content in contents} - set(parts)):
        raise SampleError(
            f"the conversation needs {missing}; the sample has {sorted(parts)}; pack it with them"
        )
    clips = [
        None if isinstance(content, Image) else _plan(content, parts[content.part], settings, limits, exact)
        for content in contents
    ]
    num_pictures = sum(len(clip.times) if clip else 1 for clip in clips)
    items, colours = [], colours_of(settings)
    for content, clip in zip(contents, clips, strict=True):
        data = parts[content.part]
        header = None
        if clip is None:
            header = image_header(data, limits, colours)
            num_frames, height, width = 1, header.height, header.width
            merge_size = settings.image_merge_size
            least, most = settings.image_min_pixels, settings.image_max_pixels
        else:
            num_frames, height, width = len(clip.times), clip.height, clip.width
            merge_size = settings.video_merge_size
            least, most = settings.video_min_pixels, settings.video_max_pixels // num_frames
        budget = token_budget_pixels(
            max_visual_tokens=settings.max_visual_tokens, num_pictures=num_pictures, merge_size=merge_size
        )
        try:
            grid = picture_grid(
                height, width, merge_size=merge_size, min_pixels=least, max_pixels=min(most, budget)
            )
        except ValueError as error:
            raise SampleError(f"{content.part}: {error}") from error
        items.append(Item(data, (num_frames, *grid), merge_size, clip, header, colours))
    return items


def _plan(
    content: Video | Stream, data: bytes, settings: RenderSettings, limits: DecodeLimits, exact: bool
) -> ClipPlan:
    """Which frames of a clip are shown; of a streamed clip none after its last message (train.py:332)."""
    rule = _rule(content, settings)
    if is_stored(data):
        plan = plan_stored(data, rule, limits)
    elif is_picture_clip(data):
        plan = plan_pictures(data, rule, limits)
    else:
        plan = plan_clip(data, rule, limits, exact=exact)
    if isinstance(content, Video):
        return plan
    count = sum(seconds <= content.until for seconds in plan.times)
    if not count:
        raise SampleError(
            f"{content.part}: no frame comes before the last message, at {content.until} s; correct its time"
        )
    return dataclasses.replace(plan, times=plan.times[:count], picked=plan.picked[:count])


def _rule(content: Video | Stream, settings: RenderSettings) -> FrameRule:
    return FrameRule(
        fps=settings.fps if content.fps is None else content.fps,
        min_frames=settings.min_frames,
        max_frames=settings.max_frames,
        start_seconds=content.start,
        end_seconds=content.end,
        frame_sampling=settings.frame_sampling,
    )


def patch_space(items: list[Item]) -> np.ndarray:
    """Room for the patches of some items, (P, 588) uint8."""
    return np.empty((sum(item.num_patches for item in items), PATCH_VALUES), np.uint8)


def write_patches(item: Item, limits: DecodeLimits, out: np.ndarray) -> None:
    """Fill (P, 588) uint8. Frames are shrunk one by one: a long clip is never in memory at its own size."""
    grid = item.grid[1:]
    if item.clip is None:
        picture = decode_image(item.data, limits, item.header)
        resize_and_patchify(picture, grid=grid, merge_size=item.merge_size, out=out)
        return
    frames = out.reshape(item.grid[0], -1, PATCH_VALUES)
    for number, frame in enumerate(_frames(item, limits)):
        resize_and_patchify(frame, grid=grid, merge_size=item.merge_size, out=frames[number])


def _frames(item: Item, limits: DecodeLimits) -> Iterator[np.ndarray]:
    assert item.clip is not None, "an image has no frames"
    if is_stored(item.data):
        return read_stored(item.data, item.clip)
    if is_picture_clip(item.data):
        return read_pictures(item.data, item.clip, limits, item.colours)
    return read_frames(item.data, item.clip)


def store_sample(
    conversation_bytes: bytes, parts: Mapping[str, bytes], settings: RenderSettings, limits: DecodeLimits
) -> dict[str, bytes]:
    """The members of the sample with each clip replaced by the frames that data/media/stored_frames.py takes of it.

    Frames are stored at the size they are shown in under these settings; other media keep their bytes.

    Raises:
        SampleError: it cannot be rendered.
    """
    conversation, *others = (open_conversation(one, parts) for one in split_records(conversation_bytes))
    if any(visual_items(other) != visual_items(conversation) for other in others):
        raise SampleError(
            "the records of the member show its media differently; write them into shards again"
        )

    def store(exact: bool) -> dict[str, bytes]:
        contents = visual_items(conversation)
        members, names = {}, {}
        for content, item in zip(
            contents, lay_out(conversation, parts, settings, limits, exact), strict=True
        ):
            if item.clip is None or isinstance(content, Image) or is_stored(item.data):
                members[content.part] = item.data
                continue
            frames = (resize(frame[None], item.grid[1:])[0] for frame in _frames(item, limits))
            names[content.part] = f"{len(members)}.{STORED_SUFFIX}"
            members[names[content.part]] = pack_frames(frames, item.times, _rule(content, settings))
        renamed = [rename_parts(one, names).to_json() for one in (conversation, *others)]
        return {CONVERSATION_PART: join_records(renamed), **members}

    return by_packets_else_exact(store)


def picture_remarks(item: Item, limits: DecodeLimits, decode: bool) -> tuple[str, ...]:
    """What is odd or lost of an image: by its header where its file looks whole, else by decoding it.

    Raises:
        SampleError: it is damaged; inside its compressed data that shows only with ``decode``.
    """
    assert item.header is not None, "a clip has none"
    if looks_whole(item.data) and not decode:
        return item.header.remarks
    return decode_picture(item.data, limits, item.header).remarks


def check_media(
    conversation_bytes: bytes,
    parts: Mapping[str, bytes],
    settings: RenderSettings,
    limits: DecodeLimits,
    *,
    decode: bool,
) -> list[str]:
    """Check the media of a sample as ``samples.measure_sample`` does; nothing is rendered.

    Without ``decode``, an image is decoded where its file does not look whole, and of a clip the first frame; how many
    follow is read from its packets. What is odd or lost of the images is returned, each kind once.

    Raises:
        SampleError: one of them is damaged or over the limits; its part is named.
    """
    remarks: set[str] = set()

    def check(content: Image | Video | Stream, exact: bool) -> None:
        alone = Conversation((Turn("user", (content,)),))
        (item,) = lay_out(alone, parts, settings, limits, exact)
        if item.clip is None:
            remarks.update(picture_remarks(item, limits, decode))
        elif decode:
            for _ in _frames(item, limits):
                pass

    for content in visual_items(read_conversation(conversation_bytes)):
        try:
            by_packets_else_exact(partial(check, content))
        except SampleError as error:
            reason = str(error).removeprefix(f"{content.part}: ")
            raise SampleError(f"{content.part}: {reason}") from error
    return sorted(remarks)
