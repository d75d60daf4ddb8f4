"""Pictures and clips to decode: noise with the spectrum of photographs, encoded as photographs and films are."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
from PIL import Image as PillowImage


def pictures(photographs: Path | None, count: int) -> list[np.ndarray]:
    """(768, 1024, 3) uint8."""
    if photographs is None:
        return [noise(768, 1024, seed) for seed in range(count)]
    files = sorted(path for path in photographs.iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))
    return [np.asarray(PillowImage.open(path).convert("RGB").resize((1024, 768))) for path in files[:count]]


def noise(height: int, width: int, seed: int) -> np.ndarray:
    """Noise whose amplitude falls as 1/f, as that of photographs does."""
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width)[None] * width)
    spectrum = np.fft.rfft2(random.standard_normal((3, height, width))) / np.maximum(frequency, 1.0) ** 1.5
    waves = np.fft.irfft2(spectrum, (height, width))
    grey = waves.mean(axis=0, keepdims=True)
    mixed = grey * 2 + waves * 0.5
    mixed = (mixed - mixed.mean()) / mixed.std()
    return np.ascontiguousarray(np.clip(mixed * 52 + 120, 0, 255).astype(np.uint8).transpose(1, 2, 0))


def encode_jpeg(picture: np.ndarray) -> bytes:
    """Quality 90, 4:2:0."""
    buffer = io.BytesIO()
    PillowImage.fromarray(picture).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_clip(path: Path, seconds: int, rate: int) -> None:
    """1280x720 of a picture that drifts, with grain; x264 medium, keyframes at most 250 frames apart."""
    scene, random = noise(800, 1600, 1), np.random.default_rng(2)
    grain = random.integers(-4, 5, (8, 720, 1280, 1))
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("h264", rate=rate)
        stream.height, stream.width, stream.pix_fmt = 720, 1280, "yuv420p"
        stream.options = {"crf": "26"}
        for number in range(seconds * rate):
            left, top = number * 2 % 320, number % 80
            frame = scene[top : top + 720, left : left + 1280] + grain[number % 8]
            array = np.clip(frame, 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())
