"""Small real things that many tests share: a tokenizer, a processor, a model of two layers."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB__DISABLE_STATS", "true")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # a pool of compilers would import torch anew

import pytest

try:
    ctypes.CDLL("libcuda.so.1")
except OSError:
    # Without a driver, torch looks for it in all folders each time it is asked whether there is a GPU: a twelfth of the
    # time in which it traces a layer.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from tests.warm_python import JOB, NO_JOB

TEXTS = [
    "Time 0.0s: Time 1.5s: Time 12.3s: user assistant system stream\n",
    "How many red circles are in the picture? There are three red circles and one blue square.",
    "What is the capital of France? The capital of France is Paris.",
    "The quick brown fox jumps over the lazy dog, 0123456789 times! (really?)",
    "Describe the video. A green triangle moves from left to right, then a square appears.",
]


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that ``make(folder)`` fills, once for all of pytest's workers. No test may change what is in it."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        folder = tmp_path_factory.mktemp(name)
        make(folder)
        return folder
    session = tmp_path_factory.getbasetemp().parent  # each worker has a folder of its own in it
    folder, done = session / name, session / f"{name}.done"
    with (session / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # closing the file lets go
        if not done.exists():
            make(folder)
            done.touch()
    return folder


gc.disable()  # Imports make a million objects that stay: looking through them thirteen times takes 4 s.


def pytest_collection_finish() -> None:
    """From now on garbage is collected, and what the imports made is not looked at."""
    gc.freeze()
    # Tracing a layer makes so many objects that a collection for each 700 of them takes a twelfth of the time.
    gc.set_threshold(50_000, 20, 100)
    gc.enable()


SLOW = (
    "test_quickstart.py",
    "model/layers/test_fused_layers.py",
    "finetuning/test_flow.py",
    "engine/test_loop.py",
    "engine/test_failure.py",
    "engine/test_silence.py",
    "engine/test_stop.py",
    "engine/test_loop_processes.py",
    "engine/test_bad_steps.py",
    "model/layers/test_lora_halves.py",
    "model/test_compile_cache.py",
    "engine/zero/test_gradient_sums.py",
    "benchmarks/test_rows.py",
    "engine/memory/test_fit_steps.py",
    "model/layers/test_nf4_linear.py",
    "engine/test_loop_compiled.py",
)
"""Files whose tests take the most, the longest first. Tests of one file share what they have made or compiled."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests marked long, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked ``long`` stay out, unless --long or a -m asks for them, or their file is named.

    Each of pytest's workers begins with its share of the slowest files: a test that began last would run alone. Workers
    first get a part of the list each, and later take from the end of another's.
    """
    if not (config.option.long or config.option.markexpr):
        named = {str(Path(word.partition("::")[0]).resolve()) for word in config.args}
        out = [one for one in items if one.get_closest_marker("long") and str(one.path) not in named]
        config.hook.pytest_deselected(items=out)
        items[:] = [one for one in items if one not in out]
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers == 1:
        return
    tests = Path(__file__).parent
    slow = [[one for one in items if one.path == tests / name] for name in SLOW]
    others = [one for one in items if str(one.path.relative_to(tests)) not in SLOW]
    ordered: list[pytest.Item] = []
    for worker in range(workers):
        mine = [one for file in slow[worker::workers] for one in file]
        share = (len(items) - len(ordered)) // (workers - worker)
        num_others = max(0, share - len(mine))
        ordered += mine + others[:num_others]
        del others[:num_others]
    items[:] = ordered


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The words that stand for ``python`` in a command, and save its imports: tests/warm_python.py."""
    script = str(Path(__file__).parent / "warm_python.py")
    # The server ends with pytest: with the process that started this worker, where there are workers.
    owner = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()

    def make(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        with (folder / "log").open("w") as log:
            server = subprocess.Popen(
                [sys.executable, script, "serve", str(folder / "socket"), str(owner)],
                env={**os.environ, JOB: NO_JOB},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        while not (folder / "socket").exists():
            assert server.poll() is None, (folder / "log").read_text()
            time.sleep(0.05)

    folder = made_once(tmp_path_factory, "warm_python", make)
    return [sys.executable, script, "run", str(folder / "socket")]


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer in Qwen2's form, trained on a few sentences."""
    from vl3train.demo.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, folder, vocab_size=400)
    return folder


@pytest.fixture(scope="session")
def processor(tokenizer_dir: Path):  # type: ignore[no-untyped-def]
    """A real VideoLlama3Processor with the published pixel budgets."""
    from vl3train.model.weights.processor import build_processor

    return build_processor(tokenizer_dir)


def tiny_config(vocab_size: int, image_token_id: int, video_token_id: int):  # type: ignore[no-untyped-def]
    """Two layers of everything, heads as in the real model in kind, not in size."""
    from transformers import VideoLlama3Config

    return VideoLlama3Config(
        text_config={
            "model_type": "qwen2",
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": vocab_size,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
            "use_cache": False,
        },
        vision_config={
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_channels": 3,
            "patch_size": 14,
        },
        image_token_id=image_token_id,
        video_token_id=video_token_id,
        tie_word_embeddings=True,
    )


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, processor) -> Path:  # type: ignore[no-untyped-def]
    """A video_llama_3 checkpoint of two layers with random weights, with its processor."""
    import torch
    from transformers import VideoLlama3ForConditionalGeneration

    folder = tmp_path_factory.mktemp("tiny_model")
    torch.manual_seed(0)
    config = tiny_config(len(processor.tokenizer) + 64, processor.image_token_id, processor.video_token_id)
    model = VideoLlama3ForConditionalGeneration(config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def lively_model_dir(tiny_model_dir: Path, processor, tmp_path_factory: pytest.TempPathFactory) -> Path:  # type: ignore[no-untyped-def]
    """The tiny model with weights large enough that what it says depends on what it is shown."""
    import torch
    from transformers import VideoLlama3ForConditionalGeneration

    from vl3train.model.weights.hf_folder import save_weights

    model = VideoLlama3ForConditionalGeneration.from_pretrained(tiny_model_dir)
    draw = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embed_tokens" not in name:
            parameter.data.normal_(std=0.25, generator=draw)
    return save_weights(model, processor, tmp_path_factory.mktemp("lively") / "model")


@pytest.fixture(scope="module")
def nothing_compiled() -> None:
    """For a file whose tests share graphs: what one has compiled, a later one finds where its graph is equal."""
    import torch

    torch._dynamo.reset()


@pytest.fixture
def compile_on_cpu(monkeypatch: pytest.MonkeyPatch, nothing_compiled: None) -> None:
    """Layers are traced and cut into forward and backward as on a GPU; only the kernels are torch's own."""
    import torch

    backend = "aot_eager_decomp_partition"
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
