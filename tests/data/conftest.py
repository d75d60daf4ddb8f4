"""Small real media: JPEG and PNG by Pillow, clips by PyAV."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from vl3train.data.media.clips import DecodeLimits

LIMITS = DecodeLimits(max_pixels=4_000_000, max_seconds=60.0)


def drawn_picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(height, width, 3) uint8: smooth colours with some noise."""
    rows, columns = np.mgrid[:height, :width]
    noise = np.random.default_rng(seed).integers(0, 40, (height, width, 3))
    waves = np.stack([columns * 3 + seed * 20, rows * 2 + columns, rows * columns // 50], -1)
    return (waves % 216 + noise).astype(np.uint8)


def picture_bytes(picture: np.ndarray, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, form, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def still_and_moving(num_frames: int, height: int, width: int) -> list[np.ndarray]:
    """A still picture on which a bright square walks: most of the visual tokens repeat."""
    still = np.full((height, width, 3), 90, np.uint8)
    still[: height // 2] = (40, 120, 200)
    frames = []
    for number in range(num_frames):
        frame = still.copy()
        left = number * 2 % (width - 12)
        frame[4:16, left : left + 12] = (250, 220, 10)
        frames.append(frame)
    return frames


@pytest.fixture
def encode_clip(tmp_path: Path) -> Callable[..., bytes]:
    """Encodes frames with PyAV; H.264 in MP4 with the index in front unless told otherwise."""

    def encode(
        frames: list[np.ndarray],
        rate: int = 25,
        codec: str = "h264",
        suffix: str = "mp4",
        pts: list[int] | None = None,
        options: dict[str, str] | None = None,
    ) -> bytes:
        path = tmp_path / f"clip.{suffix}"
        flags = {"movflags": "faststart"} if suffix == "mp4" else {}
        with av.open(str(path), "w", options=flags) as container:
            stream = container.add_stream(codec, rate=rate)
            stream.height, stream.width = frames[0].shape[:2]
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            stream.options = options or {}
            for number, array in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(array, format="rgb24")
                if pts is not None:
                    frame.pts = pts[number]
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path.read_bytes()

    return encode
