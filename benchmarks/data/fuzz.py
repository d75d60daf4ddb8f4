"""Mutated pictures and clips through the decode path of the index: none may raise anything but a SampleError.

    python -m benchmarks.data.fuzz [--pictures 100000] [--clips 5000] [--seed 0] [--quick]

Each input is a function of the seed and its number. Forked workers decode them, so a crash in native code ends one
worker: it is counted, named by the input's number, and the rest goes on. Mutated inputs are not kept.
"""

from __future__ import annotations

import argparse
import faulthandler
import io
import mmap
import os
import random
import signal
import struct
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("OMP_NUM_THREADS", "1")

import av
import numpy as np
from PIL import Image

from benchmarks.figures import Figures
from vl3train.contracts.records import SampleError
from vl3train.data.media.clips import DecodeLimits, FrameCountError, plan_clip, read_frames
from vl3train.data.media.picture_lists import pack_pictures
from vl3train.data.pictures.colours import AS_TRANSFORMERS, Colours
from vl3train.data.pictures.images import decode_picture, image_header
from vl3train.data.pictures.picture_clips import is_picture_clip, plan_pictures, read_pictures
from vl3train.data.video.timeline import FrameRule

LIMITS = DecodeLimits(max_pixels=1_000_000, max_seconds=600.0)
RULE = FrameRule(fps=2.0, min_frames=1, max_frames=16)
SECONDS = 30
"""Of one input; the decode sandbox has data.decode_seconds for that."""
ODD_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def pictures() -> list[tuple[str, bytes]]:
    """One small picture of each format and mode that is read."""
    rng = np.random.default_rng(0)
    smooth = np.kron(rng.integers(0, 256, (6, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    rgb = Image.fromarray(smooth)
    rgba = rgb.copy()
    rgba.putalpha(rgb.convert("L"))
    grey16 = Image.fromarray(smooth[..., 0].astype(np.uint16) * 15)
    exif = Image.Exif()
    exif[274] = 6
    many = {"save_all": True, "append_images": [rgb.rotate(90 * turn) for turn in (1, 2)], "duration": 300}
    made: list[tuple[str, Image.Image, dict[str, object]]] = [
        ("JPEG", rgb, {"exif": exif}),
        ("JPEG", rgb, {"progressive": True}),
        ("JPEG", rgb, {"restart_marker_blocks": 4}),
        ("JPEG", rgb.convert("L"), {}),
        ("JPEG", rgb.convert("CMYK"), {}),
        *(("PNG", image, {}) for image in (rgb, rgba, rgb.quantize(16), rgb.convert("1"), grey16)),
        ("PNG", rgb, {"exif": exif, "icc_profile": bytes(300)}),
        ("PNG", rgb, many),
        ("WEBP", rgb, {}),
        ("WEBP", rgba, {"lossless": True}),
        ("WEBP", rgb, many),
        ("GIF", rgb, {}),
        ("GIF", rgb, many),
        *(("BMP", image, {}) for image in (rgb, rgb.quantize(16), rgb.convert("1"))),
        *(
            ("TIFF", rgb, {"compression": compression, "exif": exif})
            for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
        ),
        *(("TIFF", image, {}) for image in (grey16, rgba, rgb.convert("CMYK"), rgb.convert("YCbCr"))),
        ("TIFF", rgb.convert("1"), {"compression": "group4"}),
        ("TIFF", rgb.convert("F"), {}),
    ]
    found = []
    for form, image, options in made:
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        found.append((f"{form} {image.mode}", buffer.getvalue()))
    return found


def clips() -> list[tuple[str, bytes]]:
    """One short clip of each container and of several codecs, and those that are made of pictures."""
    found = [(name, data) for name, data in pictures() if is_picture_clip(data)]
    listed = [("jpg", data) for name, data in pictures() if name.startswith("JPEG RGB")]
    found.append(("list", pack_pictures(listed[1:], fps=2)))
    kinds = [("mp4", "h264"), ("mov", "mpeg4"), ("mkv", "h264"), ("webm", "libvpx"), ("webm", "libvpx-vp9")]
    kinds += [("avi", "mpeg4"), ("avi", "mjpeg"), ("mpg", "mpeg2video"), ("ts", "h264"), ("flv", "flv")]
    rng = np.random.default_rng(1)
    with TemporaryDirectory() as folder:
        for suffix, codec in kinds:
            path = Path(folder) / f"clip.{suffix}"
            with av.open(str(path), "w") as container:
                stream = container.add_stream(codec, rate=25)
                stream.height, stream.width = 48, 64
                stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
                for _ in range(12):
                    frame = np.kron(rng.integers(0, 256, (6, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
                container.mux(stream.encode())
            found.append((f"{suffix} {codec}", path.read_bytes()))
    return found


def mutated(data: bytes, rng: random.Random) -> bytes:
    """The file with one to four of: bytes flipped, odd numbers, a hole, a piece cut out, doubled or cut off."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        # Half of it in the first bytes: that is where the headers are.
        at = rng.randrange(min(len(found), rng.choice((200, len(found))))) if found else 0
        length = rng.choice((1, 4, 16, 100))
        kind = rng.randrange(6)
        if kind == 0 and found:
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            number = struct.pack(rng.choice("<>") + "I", rng.choice(ODD_NUMBERS))
            found[at : at + 4] = number[: rng.choice((1, 2, 4))]
        elif kind == 2:
            found[at : at + length] = rng.randbytes(length)
        elif kind == 3:
            del found[at : at + length]
        elif kind == 4:
            found[at:at] = found[at : at + length]
        else:
            del found[rng.randrange(len(found) + 1) :]
    return bytes(found)


def decode_as_image(data: bytes, number: int) -> None:
    """As the index does with ``--decode``, every other input with the options for grey and transparency."""
    colours = Colours(scale_grey=True, over_white=True) if number % 2 else AS_TRANSFORMERS
    decode_picture(data, LIMITS, image_header(data, LIMITS, colours))


def decode_as_clip(data: bytes, number: int) -> None:
    """As the index does: by packets, and where decoding proves them wrong by decoding."""
    if is_picture_clip(data):
        for _ in read_pictures(data, plan_pictures(data, RULE, LIMITS), LIMITS):
            pass
        return
    for exact in (False, True):
        try:
            for _ in read_frames(data, plan_clip(data, RULE, LIMITS, exact=exact)):
                pass
            return
        except FrameCountError:
            if exact:
                raise


def run(
    sources: Sequence[tuple[str, bytes]],
    decode: Callable[[bytes, int], None],
    numbers: range,
    seed: int,
) -> tuple[Counter[str], list[str]]:
    """What became of the inputs of these numbers, and a line for each that was neither read nor rejected."""
    progress = mmap.mmap(-1, 8 * 4)  # next number, read, rejected, bugs: shared with the worker
    odd: list[str] = []
    counts: Counter[str] = Counter()
    first = numbers.start
    while first < numbers.stop:
        progress[:] = struct.pack("4q", first, 0, 0, 0)
        receiving, sending = os.pipe()
        worker = os.fork()
        if worker == 0:
            os.close(receiving)
            _work(sources, decode, range(first, numbers.stop), seed, progress, sending)
        os.close(sending)
        with os.fdopen(receiving, "r") as lines:
            odd += lines.read().splitlines()
        _, status = os.waitpid(worker, 0)
        reached, read, rejected, bugs = struct.unpack("4q", progress[:])
        counts.update(read=read, rejected=rejected, bugs=bugs)
        if os.WIFSIGNALED(status):
            name = signal.Signals(os.WTERMSIG(status)).name
            counts["timeouts" if name == "SIGALRM" else "crashes"] += 1
            odd.append(f"input {reached} ({sources[reached % len(sources)][0]}): {name}")
            reached += 1
        elif status:
            raise RuntimeError(f"a worker ended with status {status} at input {reached}")
        first = reached
    return counts, odd


def _work(
    sources: Sequence[tuple[str, bytes]],
    decode: Callable[[bytes, int], None],
    numbers: range,
    seed: int,
    progress: mmap.mmap,
    sending: int,
) -> None:
    """A worker: decode its inputs and say how far it is before each. Does not return."""
    faulthandler.disable()
    warnings.simplefilter("ignore")
    av.logging.set_level(av.logging.PANIC)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff writes every fault there
    read = rejected = bugs = 0
    for number in numbers:
        progress[:] = struct.pack("4q", number, read, rejected, bugs)
        name, data = sources[number % len(sources)]
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            decode(mutated(data, random.Random(f"{seed} {number}")), number)
            read += 1
        except SampleError:
            rejected += 1
        except BaseException:
            bugs += 1
            what = " | ".join(traceback.format_exc().splitlines()[-3:])
            os.write(sending, f"input {number} ({name}): {what}\n".encode())
    signal.setitimer(signal.ITIMER_REAL, 0)
    progress[:] = struct.pack("4q", numbers.stop, read, rejected, bugs)
    os._exit(0)


def main() -> int:
    """Run both, keep the figures. Returns 1 where something but a SampleError was raised."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=100_000)
    parser.add_argument("--clips", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a hundredth of it; keeps nothing")
    args = parser.parse_args()
    share = 100 if args.quick else 1
    figures = Figures("fuzz", keep=not args.quick, packages=("pillow", "simplejpeg", "av"))
    figures.command = f"python -m benchmarks.data.fuzz --seed {args.seed}"
    num_bugs = 0
    for what, sources, decode, total in (
        ("pictures", pictures(), decode_as_image, args.pictures // share),
        ("clips", clips(), decode_as_clip, args.clips // share),
    ):
        counts, odd = run(sources, decode, range(total), args.seed)
        print(*odd, sep="\n")
        num_bugs += counts["bugs"]
        note = f"seed {args.seed}, {len(sources)} files; {counts['read']} read, {counts['rejected']} rejected"
        figures.add(f"fuzzed_{what}", total, "files", "higher", note)
        figures.add(f"fuzzed_{what}_that_end_a_pass", counts["bugs"], "files", "lower", aim=0)
        note = "in other software's native code; the decode sandbox replaces its process"
        figures.add(f"fuzzed_{what}_crashes", counts["crashes"], "files", "lower", note)
        figures.add(f"fuzzed_{what}_over_{SECONDS}_seconds", counts["timeouts"], "files", "lower")
    return int(num_bugs > 0)


if __name__ == "__main__":
    raise SystemExit(main())
