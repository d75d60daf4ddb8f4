"""How fast one core turns media into patches, beside other libraries in the same run; what happens to planted faults.

    python -m benchmarks.decode [--quick] [--images FOLDER] [--skip NAME ...]

Prints one JSON line a figure. "A core" is a second of process time (user and system) of one thread, the decode
process included, so that other load on the machine changes it little. Pictures are noise with the spectrum of
photographs, unless ``--images`` names a folder of photographs; clips are such noise, moving, encoded by x264.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import av
import numpy as np
import torch
from PIL import Image as PillowImage

from benchmarks.data.drawn_media import encode_jpeg, pictures, write_clip
from benchmarks.data.wait import waited_shares
from benchmarks.figures import machine
from vl3train.config.data_options import DataConfig
from vl3train.contracts.records import RenderSettings
from vl3train.contracts.tokens import CHAT_TEMPLATE
from vl3train.data.media.clips import DecodeLimits, plan_clip, read_frames
from vl3train.data.records.conversation import Conversation, Image, Text, Turn, Video
from vl3train.data.render.chat_tokens import ChatTokenizer
from vl3train.data.render.decode_client import Decoder, decode_server
from vl3train.data.render.decode_server import keep_freed_memory
from vl3train.data.render.samples import measure_sample, render_sample
from vl3train.data.render.visual_items import store_sample
from vl3train.data.video.timeline import FrameRule

DATA = DataConfig()
LIMITS = DecodeLimits(max_pixels=DATA.decode_max_pixels, max_seconds=DATA.decode_max_seconds)
TEXTS = ["What is it? A cat on a mat.", "Time 0.0s: user assistant system stream\n", "0123456789, really!"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="under a minute on 2 cores: less of everything")
    parser.add_argument("--images", type=Path, help="folder of photographs to use instead of noise")
    parser.add_argument("--skip", nargs="*", default=[], choices=["images", "video", "faults", "wait"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        parts: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
            "images": lambda: measure_images(out, args.images, 60 if args.quick else 450),
            "video": lambda: measure_video(out, 4 if args.quick else 20),
            "faults": lambda: count_faults(out),
            "wait": lambda: measure_wait(out, 30),
        }
        if args.quick:
            args.skip.append("wait")
        for name, measure in parts.items():
            if name not in args.skip:
                for figure in measure():
                    print(json.dumps({**figure, "machine": machine(), "versions": versions()}), flush=True)


def measure_wait(folder: Path, steps: int) -> Iterator[dict[str, Any]]:
    """The share of a debug model's training steps that is spent waiting for data, without the first two steps."""
    shares = waited_shares(folder, steps)
    share = float(np.mean(shares[2:]))
    yield figure("data_wait_share", share, "1", better="lower", steps=steps, first=shares[0])


def figure(name: str, value: float, unit: str, better: str = "higher", **more: Any) -> dict[str, Any]:
    """One result."""
    return {"figure": name, "value": round(value, 4), "unit": unit, "better": better, **more}


def measure_images(folder: Path, photographs: Path | None, count: int) -> Iterator[dict[str, Any]]:
    """1024x768 JPEGs at the paper's full token budget: our code here and in the decode sandbox, and transformers'."""
    from vl3train.demo.tokenizer import train_tokenizer
    from vl3train.model.weights.processor import build_processor

    train_tokenizer(TEXTS, folder, vocab_size=300)
    processor = build_processor(folder)
    tokenizer = ChatTokenizer.from_folder(folder)
    settings = render_settings(tokenizer)
    jpegs = [encode_jpeg(picture) for picture in pictures(photographs, 8)]
    conversation = Conversation(
        (Turn("user", (Image("0.jpg"), Text("What is it?"))), Turn("assistant", (Text("A cat."),)))
    )
    text = conversation.to_json()
    planned = measure_sample(text, {"0.jpg": jpegs[0]}, settings, tokenizer, LIMITS)

    def ours(jpeg: bytes) -> None:
        render_sample(
            text, {"0.jpg": jpeg}, settings, tokenizer, LIMITS, key="", planned=planned, space=space
        )

    space = np.empty((planned.num_patches, 588), np.uint8)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ]
    prompt = processor.apply_chat_template(messages, tokenize=False, chat_template=CHAT_TEMPLATE)
    size = {"shortest_edge": settings.image_min_pixels, "longest_edge": settings.image_max_pixels}

    def theirs(jpeg: bytes) -> Any:
        return processor(
            text=[prompt],
            images=[PillowImage.open(io.BytesIO(jpeg)).convert("RGB")],
            images_kwargs={"merge_size": settings.image_merge_size, "size": size},
            return_tensors="pt",
        )

    expected = theirs(jpegs[0])["pixel_values"]
    ours(jpegs[0])
    assert torch.equal((torch.from_numpy(space) / 127.5 - 1).round(decimals=3), expected.round(decimals=3))

    a_turn = 30  # enough to warm the caches
    turns = count // a_turn

    def spent(make: Callable[[bytes], Any], process: Callable[[], float] = time.process_time) -> float:
        begin = process()
        for index in range(a_turn):
            make(jpegs[index % len(jpegs)])
        return process() - begin

    taken: dict[str, list[float]] = {name: [] for name in ("as shipped", "sandboxed", "our malloc", "ours")}
    with decode_server(settings, folder, LIMITS) as address:
        decoder = Decoder(address, 60.0, planned.num_patches)

        def sandboxed(jpeg: bytes) -> None:
            decoder.render(text, {"0.jpg": jpeg}, planned, key="", source=0)

        spent(sandboxed)  # the first ones touch memory for the first time
        for _ in range(turns):  # they take turns, so that both meet the same load
            taken["as shipped"].append(spent(theirs))
            taken["sandboxed"].append(
                spent(sandboxed, lambda: time.process_time() + cpu_seconds(decoder._pid))
            )
    keep_freed_memory()  # our decode processes do; from here on the peer has it too
    for _ in range(turns):
        taken["our malloc"].append(spent(theirs))
        taken["ours"].append(spent(ours))
    rates = {name: a_turn / float(np.median(seconds)) for name, seconds in taken.items()}
    about = {"patches": planned.num_patches, "jpeg_bytes": len(jpegs[0]), "median_of": turns}
    yield figure("images_per_second_core", rates["sandboxed"], "1/s", where="decode sandbox", **about)
    yield figure("images_per_second_core_in_process", rates["ours"], "1/s", **about)
    peer = "VideoLlama3Processor"
    yield figure("images_per_second_core_hf", rates["as shipped"], "1/s", peer=peer, **about)
    yield figure("images_per_second_core_hf_our_malloc", rates["our malloc"], "1/s", peer=peer, **about)
    yield figure("images_vs_hf_ratio", rates["sandboxed"] / rates["as shipped"], "1", **about)
    yield figure("images_vs_hf_ratio_our_malloc", rates["sandboxed"] / rates["our malloc"], "1", **about)
    yield figure("images_vs_hf_ratio_in_process", rates["ours"] / rates["our malloc"], "1", **about)
    overhead = 1000 / rates["sandboxed"] - 1000 / rates["ours"]
    yield figure("decode_sandbox_overhead_per_image", overhead, "ms of process time", better="lower")


def measure_video(folder: Path, seconds: int) -> Iterator[dict[str, Any]]:
    """A 720p clip at 1 fps: ours, plain PyAV, torchcodec; and 180 stored frames of it."""
    rate = 25
    path = folder / "clip.mp4"
    write_clip(path, seconds, rate)
    data = path.read_bytes()
    total = seconds * rate

    def ours() -> int:
        plan = plan_clip(data, FrameRule(fps=1.0, min_frames=1, max_frames=180), LIMITS)
        return len(list(read_frames(data, plan)))

    def pyav() -> int:
        with av.open(io.BytesIO(data)) as container:
            container.streams.video[0].thread_type = "NONE"
            frames = enumerate(container.decode(video=0))
            return len([frame.to_ndarray(format="rgb24") for number, frame in frames if number % rate == 0])

    peers: dict[str, Callable[[], int]] = {"ours": ours, "pyav": pyav}
    try:
        from torchcodec.decoders import VideoDecoder

        VideoDecoder(data)
    except (ImportError, RuntimeError, OSError) as error:
        yield {"note": f"torchcodec is not measured: {str(error).splitlines()[0]}", "figure": "none"}
    else:

        def torchcodec() -> int:
            decoder = VideoDecoder(data, num_ffmpeg_threads=1, seek_mode="exact")
            return len(decoder.get_frames_at(list(range(0, total, rate))).data)

        peers["torchcodec"] = torchcodec
    for name, decode in peers.items():
        assert decode() == seconds
        begin = time.process_time()
        for _ in range(3):
            decode()
        speed = 3 * total / (time.process_time() - begin)
        suffix = "" if name == "ours" else f"_{name}"
        yield figure(f"video_720p_source_frames_per_second_core{suffix}", speed, "1/s", clip_seconds=seconds)

    from vl3train.demo.tokenizer import train_tokenizer

    train_tokenizer(TEXTS, folder, vocab_size=300)
    tokenizer = ChatTokenizer.from_folder(folder)
    settings = render_settings(tokenizer, fps=180 / seconds)
    text = Conversation(
        (Turn("user", (Video("0.mp4"), Text("What is it?"))), Turn("assistant", (Text("A cat."),)))
    ).to_json()
    stored = store_sample(text, {"0.mp4": data}, settings, LIMITS)
    size = len(stored["0.frames"])
    text = stored.pop("json")
    planned = measure_sample(text, stored, settings, tokenizer, LIMITS)
    with decode_server(settings, folder, LIMITS) as address:
        decoder = Decoder(address, 60.0, planned.num_patches)
        decoder.render(text, stored, planned, key="", source=0)
        begin = time.process_time() + cpu_seconds(decoder._pid)
        for _ in range(5):
            decoder.render(text, stored, planned, key="", source=0)
        seconds_taken = time.process_time() + cpu_seconds(decoder._pid) - begin
    ((frames, height, width),) = planned.grids
    about = {"frames": frames, "frame_pixels": f"{width * 14}x{height * 14}", "frame_bytes": size // frames}
    yield figure(
        "stored_frames_per_second_core", 5 * frames / seconds_taken, "1/s", where="decode sandbox", **about
    )


def count_faults(folder: Path) -> Iterator[dict[str, Any]]:
    """Index and train on a recipe of planted faults: the message for each, and whether every sample is counted."""
    from tests.data.faults_fixture import fault_outcomes
    from vl3train.demo.tokenizer import train_tokenizer

    train_tokenizer(TEXTS, folder, vocab_size=300)
    outcomes = fault_outcomes(folder / "faults", folder, decode_seconds=4.0)
    for one in outcomes:
        yield {
            "fault": one.planted.name,
            "samples": len(one.planted.samples),
            "used": len(one.used),
            "refused": len(one.rejected_samples),
            "found": one.planted.when,
            "said": one.said,
        }
    yield figure("faults_planted", len(outcomes), "1")
    yield figure("faults_accounted", sum(one.accounted for one in outcomes), "1")


def render_settings(tokenizer: ChatTokenizer, fps: float = DATA.fps) -> RenderSettings:
    """The published numbers."""
    return RenderSettings(
        image_merge_size=1,
        video_merge_size=2,
        prune_frames=True,
        fps=fps,
        min_frames=DATA.min_frames,
        max_frames=DATA.max_frames,
        image_min_pixels=DATA.image_min_pixels,
        image_max_pixels=DATA.image_max_pixels,
        video_min_pixels=DATA.video_min_pixels,
        video_max_pixels=DATA.video_max_pixels,
        max_visual_tokens=DATA.max_visual_tokens,
        tokenizer=tokenizer.fingerprint,
    )


def cpu_seconds(pid: int) -> float:
    """User and system time of another process (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "av", "simplejpeg", "pillow", "torchcodec"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
