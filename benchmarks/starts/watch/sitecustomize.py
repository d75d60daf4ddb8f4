"""Where the seconds of a start go: a thread that looks at the main thread, in a process that trains.

Python imports this file by its name in every process whose PYTHONPATH has this folder. It knows nothing of the build
that it watches, so that two builds can be watched alike. VL3TRAIN_WATCH names a folder: each rank keeps the counts
there in a file of its own, written anew twice a second, because the process is killed after its first step.
"""

from __future__ import annotations

import collections
import json
import os
import resource
import struct
import sys
import threading
import time
from types import FrameType

LOOK_SECONDS = 0.01
WRITE_SECONDS = 0.5
PHASE_PLACE = 64
"""Where a record of contracts/progress/record.py has the name of its phase: two bytes of length, then the text."""

KINDS = (
    # the first whose words are in the file of a frame, looking from the innermost frame outwards
    ("flash-attn-4", ("/flash_attn/",)),
    ("quack", ("/quack/",)),
    ("numba", ("/numba/", "/llvmlite/")),
    ("read weights", ("/safetensors/", "/transformers/modeling_utils", "/transformers/core_model_loading")),
    ("deepspeed", ("/deepspeed/",)),
    ("check of kernels", ("/attention/check.py", "/kernels/check.py", "/kernels/gemm_cases.py")),
    ("blank batches", ("/data/extremes.py", "/data/collate.py")),
    ("data", ("/vl3train/data/",)),
    ("other of vl3train", ("/vl3train/",)),
)
COMPILER = "torch._dynamo.convert_frame"
"""Once torch's compiler is there, stacks are left alone: in Python 3.11 it puts frames of its own between others, and a
walk over them from another thread has met freed memory. Its own clocks say what it is busy with."""


def kind_of(files: list[str]) -> str:
    """What a stack is busy with; ``files`` from the innermost frame outwards."""
    if any(file.startswith("<frozen importlib") for file in files):
        return "imports"
    for file in files:
        for name, words in KINDS:
            if any(word in file for word in words):
                return name
    return "other"


def compile_seconds() -> dict[str, float]:
    """Seconds of each part of torch's compiler, which lie within each other."""
    times = getattr(sys.modules.get("torch._dynamo.utils"), "compilation_time_metrics", None)
    return {name: sum(found) for name, found in list(times.items())} if isinstance(times, dict) else {}


def frames_of(frame: FrameType | None) -> list[tuple[str, str]]:
    """(file, function) of each frame, from the innermost outwards."""
    found = []
    while frame is not None:
        found.append((frame.f_code.co_filename, frame.f_code.co_name))
        frame = frame.f_back
    return found


def short(frames: list[tuple[str, str]]) -> str:
    """The innermost frames in few words."""
    return " < ".join(f"{'/'.join(file.split('/')[-2:])}:{name}" for file, name in frames[:4])


def phase_now() -> str:
    """The phase that the process says it is in."""
    module = sys.modules.get("vl3train.contracts.progress.record")
    memory = getattr(getattr(module, "progress", None), "_memory", None)
    if memory is None:
        return "command line"
    (length,) = struct.unpack_from("<H", memory, PHASE_PLACE)
    return (
        bytes(memory[PHASE_PLACE + 2 : PHASE_PLACE + 2 + min(length, 126)]).decode(errors="replace")
        or "imports"
    )


def watch(folder: str, main_thread: int, age: float) -> None:
    """Look until the process ends. ``age``: seconds that it is old already."""
    path = os.path.join(folder, f"rank-{os.environ.get('RANK', '0')}-{os.getpid()}.json")
    kinds: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    kinds["python itself"]["imports"] += age
    cpu: collections.Counter[str] = collections.Counter()
    places: collections.Counter[str] = collections.Counter()
    before, cpu_before, written = time.perf_counter(), 0.0, 0.0
    while True:
        time.sleep(LOOK_SECONDS)
        is_walked = COMPILER not in sys.modules
        frames = frames_of(sys._current_frames().get(main_thread)) if is_walked else []
        now, phase = time.perf_counter(), phase_now()
        used = resource.getrusage(resource.RUSAGE_SELF)
        cpu_now = used.ru_utime + used.ru_stime
        kinds[phase][kind_of([file for file, _ in frames]) if is_walked else "not looked into"] += (
            now - before
        )
        cpu[phase] += cpu_now - cpu_before
        if is_walked:
            places[short(frames)] += now - before
        before, cpu_before = now, cpu_now
        if now - written > WRITE_SECONDS:
            written = now
            found = {"kinds": kinds, "cpu": cpu, "places": dict(places.most_common(60))}
            text = json.dumps({**found, "compiler": compile_seconds()})
            with open(f"{path}.new", "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(f"{path}.new", path)


def age_of_process() -> float:
    """Seconds since this process began."""
    with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])
    with open("/proc/uptime", encoding="ascii") as file:
        return float(file.read().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")


if "VL3TRAIN_WATCH" in os.environ and "RANK" in os.environ and "vl3train.train" in sys.orig_argv:
    threading.Thread(
        target=watch,
        args=(os.environ["VL3TRAIN_WATCH"], threading.get_ident(), age_of_process()),
        name="watch",
        daemon=True,
    ).start()
