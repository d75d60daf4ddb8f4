"""Media, and questions about them of each kind."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
from PIL import Image

from vl3train.inference.requests import Request


def draw_media(folder: Path) -> Path:
    """Two pictures and two H.264 clips, 2 s at 10 frames/s and 5 s at 8 frames/s."""
    draw = np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 255, (61, 90, 3), dtype=np.uint8)).save(folder / "a.jpg")
    Image.fromarray(draw.integers(0, 255, (120, 60, 3), dtype=np.uint8)).save(folder / "b.png")
    for name, num_frames, fps in (("short.mp4", 20, 10), ("long.mp4", 40, 8)):
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream("libx264", rate=fps)
            stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
            for i in range(num_frames):
                picture = np.full((64, 96, 3), 40, np.uint8)
                picture[10:40, 4 * (i % 16) : 4 * (i % 16) + 20] = 220
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    return folder


def requests_on(media: Path) -> list[Request]:
    """Text, a picture, a clip, and several of both."""
    return [
        Request(prompt="What is the capital of France?"),
        Request(prompt="How many?", images=(media / "a.jpg",)),
        Request(prompt="Describe the video.", videos=(media / "short.mp4",), system="user system"),
        Request(
            prompt="How many red circles?",
            images=(media / "a.jpg", media / "b.png"),
            videos=(media / "short.mp4", media / "long.mp4"),
        ),
    ]
