"""GIF, animated WebP and PNG, and lists of pictures are clips on their own clock, each frame as a viewer shows it."""

from __future__ import annotations

import io
from itertools import accumulate

import av
import numpy as np
import pytest
from PIL import Image

from tests.data.conftest import LIMITS, drawn_picture, picture_bytes
from vl3train.contracts.records import SampleError
from vl3train.data.media.clips import DecodeLimits
from vl3train.data.media.picture_lists import pack_pictures
from vl3train.data.pictures.delays import frame_delays, is_moving
from vl3train.data.pictures.picture_clips import is_picture_clip, plan_pictures, read_pictures
from vl3train.data.video.timeline import FrameRule

RULE = FrameRule(fps=1.0, min_frames=1, max_frames=180)
FRAMES = [drawn_picture(24, 32, seed) for seed in range(6)]


def moving(form: str, delays: list[int], frames: list[np.ndarray] = FRAMES, **options) -> bytes:
    buffer = io.BytesIO()
    first, *others = [Image.fromarray(frame) for frame in frames[: len(delays)]]
    first.save(buffer, form, save_all=True, append_images=others, duration=delays, **options)
    return buffer.getvalue()


def taken(data: bytes, rule: FrameRule = RULE) -> tuple[tuple[float, ...], np.ndarray]:
    plan = plan_pictures(data, rule, LIMITS)
    return plan.times, np.stack(list(read_pictures(data, plan, LIMITS)))


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_a_picture_stays_for_its_own_delay(form):
    data = moving(form, [1000, 3000, 500, 500], lossless=True)
    assert is_moving(data)
    assert is_picture_clip(data)
    assert frame_delays(data) == pytest.approx((1.0, 3.0, 0.5, 0.5))
    times, frames = taken(data)
    assert times == pytest.approx((0, 1, 2, 3, 4))
    if form != "GIF":  # a GIF has 256 colours
        np.testing.assert_array_equal(frames, np.stack([FRAMES[number] for number in (0, 1, 1, 1, 2)]))


def transparent_frames() -> list[Image.Image]:
    """Pictures that each change a part only, on a ground that stays clear."""
    frames = []
    for number in range(5):
        rgba = np.zeros((40, 60, 4), np.uint8)
        rgba[5 + number : 20, 8 * number : 8 * number + 20] = (250, 20 * number, 0, 255)
        frames.append(Image.fromarray(rgba))
    return frames


@pytest.mark.parametrize("disposal", [0, 1, 2, 3])
@pytest.mark.parametrize("ground", ["clear", "full"])
def test_gif_frames_and_times_are_ffmpeg_s(disposal, ground):
    """With every way to dispose of a frame, and a delay of 0, which ffmpeg lengthens as browsers do."""
    frames = transparent_frames() if ground == "clear" else [Image.fromarray(frame) for frame in FRAMES[:5]]
    buffer = io.BytesIO()
    frames[0].save(
        buffer,
        "GIF",
        save_all=True,
        append_images=frames[1:],
        duration=[100, 0, 30, 20, 200],
        disposal=disposal,
    )
    data = buffer.getvalue()
    with av.open(io.BytesIO(data)) as container:
        decoded = list(container.decode(video=0))
    starts = [0.0, *accumulate(frame_delays(data))][:-1]
    assert starts == pytest.approx([float(frame.pts * frame.time_base) for frame in decoded])
    plan = plan_pictures(data, FrameRule(fps=1000.0, min_frames=1, max_frames=1000), LIMITS)
    mine = dict(zip(plan.picked, read_pictures(data, plan, LIMITS), strict=True))
    assert sorted(mine) == list(range(len(decoded)))
    for number, frame in enumerate(decoded):
        np.testing.assert_array_equal(mine[number], frame.to_ndarray(format="rgb24"))


@pytest.mark.parametrize("form", ["WEBP", "PNG"])
@pytest.mark.parametrize("delay", [0, 5, 10])
def test_a_delay_of_ten_milliseconds_is_shown_as_a_hundred(form, delay):
    assert frame_delays(moving(form, [delay] * 3)) == (0.1, 0.1, 0.1)
    assert frame_delays(moving(form, [11] * 3)) == pytest.approx((0.011,) * 3)


@pytest.mark.parametrize("form", ["WEBP", "PNG"])
def test_clear_ground_of_a_moving_picture_is_white(form):
    first, *others = transparent_frames()
    buffer = io.BytesIO()
    first.save(buffer, form, save_all=True, append_images=others, duration=1000, lossless=True, disposal=2)
    _, frames = taken(buffer.getvalue())
    assert frames[:, 39, 59].tolist() == [[255] * 3] * 5
    assert frames[0, 10, 10].tolist() == [250, 0, 0]


def test_a_still_picture_is_no_moving_one_but_a_gif_of_one_frame_is_a_clip():
    assert not is_moving(picture_bytes(FRAMES[0], "PNG"))
    assert not is_moving(picture_bytes(FRAMES[0], "JPEG"))
    times, frames = taken(picture_bytes(FRAMES[0], "GIF"))
    assert (times, len(frames)) == ((0.0,), 1)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_a_cut_moving_picture_is_refused(form):
    data = moving(form, [1000] * 4)
    for keep in (0.3, 0.6, 0.95):
        with pytest.raises(SampleError, match=r"cut off|cannot be read"):
            taken(data[: int(len(data) * keep)])


@pytest.mark.parametrize(
    ("given", "rule", "times", "numbers"),
    [
        ({"fps": 2}, {}, (0, 1, 2), (0, 2, 4)),
        ({}, {"fps": 3.0}, (0, 1 / 3, 2 / 3, 1, 4 / 3, 5 / 3), (0, 1, 2, 3, 4, 5)),
        ({"times": [10, 11, 12, 15, 16, 17]}, {}, tuple(range(10, 18)), (0, 1, 2, 2, 2, 3, 4, 5)),
        ({"times": [10, 11, 12, 15, 16, 17]}, {"start_seconds": 15.0}, (15, 16, 17), (3, 4, 5)),
    ],
)
def test_a_list_of_pictures_is_a_clip_on_the_clock_that_is_given(given, rule, times, numbers):
    data = pack_pictures([("png", picture_bytes(frame, "PNG")) for frame in FRAMES], **given)
    asked = FrameRule(**{"fps": 1.0, "min_frames": 1, "max_frames": 180, **rule})
    found, frames = taken(data, asked)
    assert found == pytest.approx(times)
    np.testing.assert_array_equal(frames, np.stack([FRAMES[number] for number in numbers]))


def test_pictures_of_other_sizes_and_damaged_ones_are_named():
    other = picture_bytes(drawn_picture(20, 20), "PNG")
    png = picture_bytes(FRAMES[0], "PNG")
    with pytest.raises(SampleError, match="picture 1 of a clip is of 20x20 pixels, the first of 32x24"):
        taken(pack_pictures([("png", png), ("png", other)], fps=1))
    with pytest.raises(SampleError, match=r"picture 1 of a clip: image of \d+ bytes cannot be read"):
        taken(pack_pictures([("png", png), ("png", png[:90])], fps=1))


def test_a_moving_picture_over_the_limits_is_refused():
    data = moving("GIF", [60_000] * 3)
    with pytest.raises(SampleError, match=r"clip of 180.0 s is over data.decode_max_seconds"):
        plan_pictures(data, RULE, DecodeLimits(10**6, 100.0))
    with pytest.raises(SampleError, match="decode_max_pixels"):
        plan_pictures(data, RULE, DecodeLimits(100, 1000.0))
