"""Clips stand as ffmpeg's autorotate shows them: its own filters, pixel for pixel; and colours are the tagged ones."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest

from tests.data.conftest import LIMITS, drawn_picture
from vl3train.data.media.clips import decode_clip

ONE = 1 << 16
FFMPEG = {  # the matrix (a, b, c, d) of the track header and the filters that ffmpeg 9 inserts for it
    "upright": ((ONE, 0, 0, ONE), []),
    "90": ((0, ONE, -ONE, 0), ["transpose=clock"]),
    "180": ((-ONE, 0, 0, -ONE), ["hflip", "vflip"]),
    "270": ((0, -ONE, ONE, 0), ["transpose=cclock"]),
    "mirrored": ((-ONE, 0, 0, ONE), ["hflip"]),
    "upside down": ((ONE, 0, 0, -ONE), ["vflip"]),
    "mirrored and 90": ((0, ONE, ONE, 0), ["transpose=cclock_flip"]),
    "mirrored and 270": ((0, -ONE, -ONE, 0), ["transpose=clock_flip"]),
}


def with_matrix(data: bytes, a: int, b: int, c: int, d: int) -> bytes:
    """The same MP4 with another display matrix in its track header (ISO 14496-12, 8.3.2)."""
    at = data.index(b"tkhd") + 4 + 40
    values = (a, b, 0, c, d, 0, 0, 0, 1 << 30)
    return data[:at] + b"".join(value.to_bytes(4, "big", signed=True) for value in values) + data[at + 36 :]


def filtered(data: bytes, filters: list[str]) -> list[np.ndarray]:
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        graph = av.filter.Graph()
        nodes = [graph.add_buffer(template=stream)]
        nodes += [graph.add(*one.split("=")) for one in filters] + [graph.add("buffersink")]
        graph.link_nodes(*nodes).configure()
        pictures = []
        for frame in container.decode(stream):
            graph.push(frame)
            pictures.append(graph.pull().to_ndarray(format="rgb24"))
    return pictures


@pytest.mark.parametrize("size", [(48, 64), (46, 66)])
@pytest.mark.parametrize("case", FFMPEG)
def test_a_clip_stands_as_ffmpegs_autorotate_shows_it(encode_clip, case, size):
    matrix, filters = FFMPEG[case]
    pictures = [drawn_picture(*size, seed) for seed in range(3)]
    plain = encode_clip(pictures, rate=10, options={"crf": "5"})
    clip = decode_clip(with_matrix(plain, *matrix), fps=10.0, min_frames=1, max_frames=10, limits=LIMITS)
    np.testing.assert_array_equal(clip.frames, np.stack(filtered(plain, filters)))
    a, b, c, d = (value // ONE for value in matrix)
    rows, columns = np.mgrid[: clip.frames.shape[1], : clip.frames.shape[2]]
    from_x, from_y = a * columns + b * rows, c * columns + d * rows  # orthogonal: its own transpose undoes it
    shown = pictures[0][from_y - from_y.min(), from_x - from_x.min()]
    assert np.abs(clip.frames[0].astype(int) - shown).mean() < 20


def test_a_clip_tagged_bt709_has_the_colours_of_bt709(tmp_path):
    """PyAV before 17 took each clip for BT.601: of red 254 was left 232."""
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=10, options={"crf": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.colorspace = 1  # BT.709
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(np.full((72, 64), 128, np.uint8), format="yuv420p")
            frame.planes[0].update(np.full((48, frame.planes[0].line_size), 63, np.uint8).tobytes())
            frame.planes[1].update(np.full((24, frame.planes[1].line_size), 102, np.uint8).tobytes())
            frame.planes[2].update(np.full((24, frame.planes[2].line_size), 240, np.uint8).tobytes())
            container.mux(stream.encode(frame))  # red by BT.709: Y 63, Cb 102, Cr 240
        container.mux(stream.encode())
    clip = decode_clip(path.read_bytes(), fps=10.0, min_frames=1, max_frames=10, limits=LIMITS)
    assert clip.frames[0].reshape(-1, 3).mean(0) == pytest.approx((254, 0, 0), abs=3)
