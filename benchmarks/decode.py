"""How fast a core turns media into patches, beside its peers in the same run; what becomes of planted faults.

    python -m benchmarks.decode [--quick] [--images FOLDER] [--skip NAME ...]

Prints one JSON line a figure. "A core" is a second of process time (user and system) of one thread, the decode
process included, so that other load on the machine changes it little. Pictures are noise with the spectrum of
photographs unless ``--images`` names a folder of photographs; clips are such noise, moving, encoded by x264.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import subprocess
import sys
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

from vl3train.config.schema import DataConfig
from vl3train.contracts.records import RenderSettings
from vl3train.contracts.tokens import CHAT_TEMPLATE
from vl3train.data.conversation import Conversation, Image, Text, Turn, Video
from vl3train.data.decoding import keep_freed_memory
from vl3train.data.firewall import Decoder, decode_server
from vl3train.data.items import store_sample
from vl3train.data.media import DecodeLimits, plan_clip, read_frames
from vl3train.data.samples import measure_sample, render_sample
from vl3train.data.tokens import ChatTokenizer

DATA = DataConfig()
LIMITS = DecodeLimits(max_pixels=DATA.decode_max_pixels, max_seconds=DATA.decode_max_seconds)
TEXTS = ["What is it? A cat on a mat.", "Time 0.0s: user assistant system stream\n", "0123456789, really!"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="under a minute on 2 cores: less of everything")
    parser.add_argument("--images", type=Path, help="folder of photographs to take in place of noise")
    parser.add_argument("--skip", nargs="*", default=[], choices=["images", "video", "faults", "wait"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        parts: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
            "images": lambda: measure_images(out, args.images, 20 if args.quick else 100),
            "video": lambda: measure_video(out, 4 if args.quick else 20),
            "faults": lambda: count_faults(out),
            "wait": lambda: measure_wait(out, 8 if args.quick else 30),
        }
        if args.quick:
            args.skip.append("wait")
        for name, measure in parts.items():
            if name not in args.skip:
                for figure in measure():
                    print(json.dumps({**figure, "machine": machine(), "versions": versions()}), flush=True)


def figure(name: str, value: float, unit: str, better: str = "higher", **more: Any) -> dict[str, Any]:
    """One result."""
    return {"figure": name, "value": round(value, 4), "unit": unit, "better": better, **more}


def measure_images(folder: Path, photographs: Path | None, count: int) -> Iterator[dict[str, Any]]:
    """1024x768 JPEGs at the paper's full token budget: ours in this process, behind the firewall, transformers'."""
    from vl3train.demo.tokenizer import train_tokenizer
    from vl3train.model.conversion import build_processor

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
            text, {"0.jpg": jpeg}, settings, tokenizer, LIMITS, key="", source=0, planned=planned, space=space
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
    as_shipped = 0.0
    for number in range(count):
        begin = time.process_time()
        theirs(jpegs[number % len(jpegs)])
        as_shipped += time.process_time() - begin
    keep_freed_memory()  # our decode processes do; from here on the peer has it too
    taken: dict[str, float] = {"ours": 0.0, "theirs": 0.0}
    for number in range(count):  # by turns, so that both meet the same load
        for name, make in (("ours", ours), ("theirs", theirs)):
            begin = time.process_time()
            make(jpegs[number % len(jpegs)])
            taken[name] += time.process_time() - begin
    begin = time.process_time()
    for number in range(count):  # without turns, as behind the firewall: what that costs is the difference
        ours(jpegs[number % len(jpegs)])
    alone = time.process_time() - begin
    about = {"patches": planned.num_patches, "jpeg_bytes": len(jpegs[0])}
    with decode_server(settings, folder, LIMITS) as address:
        decoder = Decoder(address, 60.0, planned.num_patches)
        decoder.render(text, {"0.jpg": jpegs[0]}, planned, key="", source=0)
        begin = time.process_time() + cpu_seconds(decoder._pid)
        started = time.perf_counter()
        for number in range(count):
            decoder.render(text, {"0.jpg": jpegs[number % len(jpegs)]}, planned, key="", source=0)
        wall = time.perf_counter() - started
        walled = time.process_time() + cpu_seconds(decoder._pid) - begin
    yield figure(
        "images_per_second_core", count / walled, "1/s", behind="firewall", wall=count / wall, **about
    )
    yield figure("images_per_second_core_unwalled", count / taken["ours"], "1/s", **about)
    yield figure(
        "images_per_second_core_hf", count / taken["theirs"], "1/s", peer="VideoLlama3Processor", **about
    )
    yield figure("images_vs_hf_ratio", taken["theirs"] / walled, "1", **about)
    overhead = (walled - alone) / count * 1000
    yield figure("firewall_overhead_per_image", overhead, "ms of process time", better="lower")


def measure_video(folder: Path, seconds: int) -> Iterator[dict[str, Any]]:
    """A 720p clip at 1 fps: ours, plain PyAV, torchcodec; and 180 stored frames of it."""
    rate = 25
    path = folder / "clip.mp4"
    write_clip(path, seconds, rate)
    data = path.read_bytes()
    total = seconds * rate

    def ours() -> int:
        plan = plan_clip(data, fps=1.0, min_frames=1, max_frames=180, limits=LIMITS)
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
        walled = time.process_time() + cpu_seconds(decoder._pid) - begin
    ((frames, height, width),) = planned.grids
    about = {"frames": frames, "frame_pixels": f"{width * 14}x{height * 14}", "frame_bytes": size // frames}
    yield figure("stored_frames_per_second_core", 5 * frames / walled, "1/s", behind="firewall", **about)


def count_faults(folder: Path) -> Iterator[dict[str, Any]]:
    """Index and train on a recipe of planted faults: what is said of each, and whether every sample is counted."""
    from tests.data.faults_fixture import fault_outcomes
    from vl3train.demo.tokenizer import train_tokenizer

    train_tokenizer(TEXTS, folder, vocab_size=300)
    outcomes = fault_outcomes(folder / "faults", folder, decode_seconds=4.0)
    for one in outcomes:
        yield {
            "fault": one.planted.name,
            "samples": len(one.planted.samples),
            "used": len(one.used),
            "refused": len(one.refused_samples),
            "found": one.planted.when,
            "said": one.said,
        }
    yield figure("faults_planted", len(outcomes), "1")
    yield figure("faults_accounted", sum(one.accounted for one in outcomes), "1")


def measure_wait(folder: Path, steps: int) -> Iterator[dict[str, Any]]:
    """The debug model's stage 3 on the demo, two ranks with two workers each: share of the steps spent waiting."""
    demo, run = folder / "demo", folder / "run"
    command = [sys.executable, "-m", "vl3train.cli.main"]
    subprocess.run([*command, "demo", str(demo), "--samples-scale", "0.05"], check=True, stdout=sys.stderr)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "vl3train.train",
    ]
    options = [
        "stage=1",
        "model=debug",
        "data=demo",
        "machine=cpu",
        f"data.root={demo}",
        "data.num_workers=2",
    ]
    options += [
        "machine.dp_size=2",
        f"run.output_dir={run}",
        f"run.num_steps={steps}",
        "run.evaluate_at_end=false",
    ]
    subprocess.run([*torchrun, *options], check=True, stdout=sys.stderr)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shares = [line["data_wait_fraction"] for line in lines if "data_wait_fraction" in line]
    yield figure(
        "data_wait_share", float(np.mean(shares[2:])), "1", better="lower", steps=steps, first=shares[0]
    )


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


def cpu_seconds(pid: int) -> float:
    """User and system time of another process (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def machine() -> str:
    """Processor and number of cores."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0].partition(': ')[2] if names else platform.processor()} x {os.cpu_count()}"


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
