"""Our compiled resize beside those of torch, torchvision and Pillow, in one run; and how far the results differ.

    python -m benchmarks.data.resampling [--quick]

Prints one JSON line a figure: pictures a second of process time on one thread. Every way starts from the same JPEG,
decodes it with the same decoder and ends in the same patches. Results are compared with torchvision's, which
transformers' processor takes. Where Pillow is pillow-simd (``pip install --target DIR``, PYTHONPATH=DIR), its figures
are called so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import PIL
import torch
from PIL import Image as PillowImage
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as torchvision_functional

from benchmarks.data.drawn_media import encode_jpeg, noise
from benchmarks.figures import machine
from vl3train.config.data_options import DataConfig
from vl3train.contracts.geometry import picture_grid
from vl3train.contracts.tokens import PATCH_SIZE, PATCH_VALUES
from vl3train.data.media.clips import DecodeLimits
from vl3train.data.media.patches import resize, resize_and_patchify
from vl3train.data.media.resampling import cut_into_patches
from vl3train.data.pictures.images import decode_image
from vl3train.data.render.decode_server import keep_freed_memory

Way = Callable[[np.ndarray, tuple[int, int]], np.ndarray]
"""(h, w, 3) uint8 pixels and their grid of patches -> (patches, 588) uint8."""

PICTURES = {
    "1024x768": (768, 1024, None),  # that of benchmarks/decode.py
    "640x480": (480, 640, None),
    "336x336": (336, 336, None),  # whole patches already: cut, not resized
    "1280x720 to 476x266": (720, 1280, (19, 34)),  # a frame of a clip: far smaller
}
"""Height, width and the grid; None: the grid at the published limits of pixels."""

LIMITS = DecodeLimits(max_pixels=DataConfig().decode_max_pixels, max_seconds=DataConfig().decode_max_seconds)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="seconds: fewer turns")
    turns = 3 if parser.parse_args().quick else 15
    torch.set_num_threads(1)
    keep_freed_memory()
    about = {
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "torchvision", "numba", "simplejpeg")},
            "pillow": PIL.__version__,
        },
        "command": "python -m benchmarks.data.resampling",
    }
    for name, (height, width, grid) in PICTURES.items():
        grid = grid or picture_grid(
            height,
            width,
            merge_size=1,
            min_pixels=DataConfig().image_min_pixels,
            max_pixels=DataConfig().image_max_pixels,
        )
        for figure in compare(name, encode_jpeg(noise(height, width, 0)), grid, turns):
            print(json.dumps({**figure, **about}), flush=True)


def compare(picture: str, jpeg: bytes, grid: tuple[int, int], turns: int) -> Iterator[dict[str, Any]]:
    """The figures of one picture. The ways take turns, so that all of them meet the same load."""
    ways: dict[str, Way] = {
        "ours": lambda pixels, grid: resize_and_patchify(pixels, grid=grid, merge_size=1),
        "torch_and_our_cut": torch_and_our_cut,
        "torch": lambda pixels, grid: cut_by_views(resize(pixels[None], grid)[0], grid),
        "torchvision": by_torchvision,
        "pillow_simd" if ".post" in PIL.__version__ else "pillow": by_pillow,
    }
    pixels = decode_image(jpeg, LIMITS)
    expected = by_torchvision(pixels, grid).astype(np.int16)  # as transformers' processor resizes
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(turns + 1):
        for name, way in ways.items():
            seconds[name].append(spent(jpeg, grid, way))
    for name, way in ways.items():
        resized, decoded = np.median(
            np.array(seconds[name][1:]), axis=0
        )  # the first touches memory and compiles
        differences = np.abs(way(pixels, grid) - expected)
        more = {
            "picture": picture,
            "patches": len(expected),
            "most_off": int(differences.max()),
            "values_off": round(float((differences > 0).mean()), 4),
            "median_of": turns,
        }
        for figure, value in (("resize", resized), ("decode_resize", decoded)):
            yield {
                "figure": f"{figure}_per_second_core_{name}",
                "value": round(1 / float(value), 1),
                "unit": "1/s",
                "better": "higher",
                **more,
            }


def spent(jpeg: bytes, grid: tuple[int, int], way: Way, count: int = 30) -> tuple[float, float]:
    """Seconds of process time a picture: resized and cut; with its decoding as well."""
    resized = 0.0
    begin = time.process_time()
    for _ in range(count):
        pixels = decode_image(jpeg, LIMITS)
        decoded = time.process_time()
        way(pixels, grid)
        resized += time.process_time() - decoded
    return resized / count, (time.process_time() - begin) / count


def torch_and_our_cut(pixels: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """torch resizes; our compiled loop cuts."""
    out = np.empty((grid[0] * grid[1], PATCH_VALUES), np.uint8)
    cut_into_patches(resize(pixels[None], grid)[0], 1, out)
    return out


def by_torchvision(pixels: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """As transformers' fast processors resize: channels first, bicubic with antialias on uint8."""
    tensor = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
    size = [grid[0] * PATCH_SIZE, grid[1] * PATCH_SIZE]
    resized = torchvision_functional.resize(tensor, size, InterpolationMode.BICUBIC, antialias=True)
    cut = resized.view(3, grid[0], PATCH_SIZE, grid[1], PATCH_SIZE).permute(1, 3, 0, 2, 4)
    return cut.reshape(-1, PATCH_VALUES).numpy()


def by_pillow(pixels: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Pillow's bicubic, which is always with antialias."""
    size = (grid[1] * PATCH_SIZE, grid[0] * PATCH_SIZE)
    resized = PillowImage.fromarray(pixels).resize(size, PillowImage.Resampling.BICUBIC)
    return cut_by_views(np.asarray(resized), grid)


def cut_by_views(pixels: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """(h, w, 3) into (patches, 588), by a reshape."""
    cut = pixels.reshape(grid[0], PATCH_SIZE, grid[1], PATCH_SIZE, 3).transpose(0, 2, 4, 1, 3)
    return cut.reshape(-1, PATCH_VALUES)


if __name__ == "__main__":
    main()
