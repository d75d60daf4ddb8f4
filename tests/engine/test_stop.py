"""A run that is asked to stop saves at the end of its step on all ranks, says so by its exit code, and goes on."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.engine.ends import LOADED, problem_of_end
from tests.engine.jobs import (
    kill_job,
    processes_of,
    start_job,
    wait_for_launcher,
    wait_for_rank,
    wait_until_gone,
)
from tests.engine.planted import PLANTED_AT
from tests.engine.runs import figures
from tests.engine.small_demo import small_demo_words
from vl3train.contracts.exit_codes import CODES_FOLDER, INTERRUPTED, STOPPED
from vl3train.engine.stop import SECONDS_BETWEEN_INTERRUPTS, StopRequest, seconds_since_start
from vl3train.launch import children
from vl3train.train import main

NUM_STEPS = 16


def to_launcher(number):
    """As ``kill PID`` does, and Ctrl-C where the launcher has the terminal: its ranks have sessions of their own."""
    return lambda launcher: os.kill(launcher, number)


def to_group_of_launcher(number):
    return lambda launcher: os.killpg(launcher, number)


def to_all(number):
    """As Slurm does: to the launcher, the ranks, their loader workers and decode processes."""

    def send(pid):
        below = children(pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        for child in below:
            send(child)

    return send


WAYS = {
    # how it is asked, with loader workers, the launcher's code
    "SIGTERM to all processes": (to_all(signal.SIGTERM), True, STOPPED),
    "Ctrl-C": (to_group_of_launcher(signal.SIGINT), False, STOPPED),
    "SIGUSR1": (to_launcher(signal.SIGUSR1), False, STOPPED),
    "SIGHUP of a closed terminal": (to_launcher(signal.SIGHUP), False, STOPPED),
    "kill -9 of the launcher": (to_launcher(signal.SIGKILL), True, 128 + signal.SIGKILL),
}


@pytest.fixture
def words(demo_root):
    own = ["stage=1", "run.evaluate_at_end=false", "run.save_steps=1000", f"run.num_steps={NUM_STEPS}"]
    return [*small_demo_words(demo_root), *own]


@pytest.fixture
def start(warm_python, words):
    """Starts a run of two ranks into a folder; the launcher and the mark of its processes."""
    jobs = []

    def start(folder, *more, out, planted=None, environment=None):
        process, job = start_job(
            warm_python,
            "tests.engine.planted" if planted else "vl3train.train",
            [*(planted or ()), *words, f"run.output_dir={folder}", *more],
            launcher="vl3train.launch",
            environment=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        jobs.append(job)
        return process, job

    yield start
    for job in jobs:
        kill_job(job)


@pytest.mark.two_processes
def test_each_way_to_ask_saves_and_the_same_command_goes_on(start, warm_python, words, tmp_path):
    """One run is stopped in every way, one after the other, fails in a resume, and becomes what a run becomes that
    nobody stopped."""
    straight, stopped, log = tmp_path / "straight", tmp_path / "run", tmp_path / "log of stops"
    mark = {PLANTED_AT: str(tmp_path / "planted")}
    with log.open("w") as file:
        assert start(straight, out=file)[0].wait(timeout=400) == 0
        for name, (ask, with_workers, wanted) in WAYS.items():
            before = len(figures(stopped)) if stopped.exists() else 0
            ours, theirs = pty.openpty() if "terminal" in name else (None, file.fileno())
            workers = f"data.num_workers={int(with_workers)}"
            process, job = start(stopped, workers, out=theirs, planted=("hold", "both"))
            launcher = wait_for_launcher(process, job)
            wait_for_steps(stopped, before + 1, process)
            if ours is not None:
                os.close(ours)  # whatever the run prints from now on is an error
                os.close(theirs)
            ask(launcher)
            assert process.wait(timeout=400) == wanted, (name, log.read_text()[-3000:])
            assert not wait_until_gone(job, 60), name
            assert_saved(stopped, name)
            assert len(figures(stopped)) == before + 2, name
        before = len(figures(stopped))
        with_workers = "data.num_workers=1"  # which hang from their third pack on
        waits, job = start(stopped, with_workers, out=file, planted=("wait@worker", "1"), environment=mark)
        asked = wait_for_rank(
            waits, job, "0"
        )  # the other one, which waits, gets no signal: as on another node
        wait_for_steps(stopped, before + 2, waits)
        for worker in loader_workers(job):
            os.kill(worker, signal.SIGSTOP)  # it does not hear that its rank ends
        os.kill(asked, signal.SIGTERM)
        assert waits.wait(timeout=60) == STOPPED, log.read_text()[-3000:]
        assert not wait_until_gone(job, 10)
        assert_saved(stopped, "a rank that waits for its data for ever")
        assert len(figures(stopped)) == before + 2, "the third step is not done"
        assert not (problem := problem_of_end(warm_python, LOADED, words, tmp_path)), problem
        process, job = start(stopped, "run.max_hours=0.0001", out=file)
        assert process.wait(timeout=400) == STOPPED, "0.36 s are over after the first step"
        assert not wait_until_gone(job, 10)
        assert_saved(stopped, "run.max_hours")
        assert start(stopped, out=file)[0].wait(timeout=400) == 0
    assert figures(stopped, "learning_rates") == figures(straight, "learning_rates")
    assert (stopped / "finished.json").exists()
    said = log.read_text()
    assert said.count("stopped on request after step") == len(WAYS) + 1
    assert "waited in vain for its data and is given up; stopped on request" in said
    assert "the launcher (torchrun) is gone: the run saves after this step and ends" in said
    assert "Traceback" not in said
    assert "(exitcode: " not in said, "torchrun would call a stop a failure"
    assert "closing signal" not in said, "torchrun ends the rank that saves a little longer"


@pytest.mark.two_processes
def test_a_second_interrupt_means_now(start, tmp_path):
    """Rank 1 takes for ever to save, and rank 0 waits for it in a collective."""
    mark, out = tmp_path / "saving", tmp_path / "run"
    with (tmp_path / "log").open("w") as file:
        planted, at = ("wait@save", "1"), {PLANTED_AT: str(mark)}
        process, job = start(out, "run.save_steps=1", out=file, planted=planted, environment=at)
        launcher = wait_for_launcher(process, job)
        wait_for_file(mark, process)
        while process.poll() is None:  # two that a loaded machine brings close together count as one
            os.kill(launcher, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=SECONDS_BETWEEN_INTERRUPTS + 0.5)
        assert process.returncode == INTERRUPTED, (tmp_path / "log").read_text()
    assert not wait_until_gone(job, 60)
    assert not list((out / "checkpoints").glob("step_????????"))


def test_a_launcher_that_waits_for_other_nodes_ends_at_once(warm_python):
    """None of its ranks is started before all nodes are there, which may be never."""
    with socket.create_server(("localhost", 0)) as one:
        port = one.getsockname()[1]
    address = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"]
    process = subprocess.Popen(
        [*warm_python, "-m", "vl3train.launch", *address, "-m", "vl3train.train"],
        stderr=subprocess.PIPE,
        text=True,
    )
    while socket.socket().connect_ex(("localhost", port)):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == STOPPED, said
    assert said.endswith("stopped on request before a rank was started\n")


def test_a_stop_is_no_failure_after_which_torchrun_starts_the_ranks_again(words, tmp_path, monkeypatch):
    """``--max-restarts`` does so after each code but 0."""
    (tmp_path / f"0.{STOPPED}").touch()
    monkeypatch.setenv(CODES_FOLDER, str(tmp_path))
    assert main([*words, f"run.output_dir={tmp_path / 'run'}"]) == STOPPED
    assert not (tmp_path / "run").exists()


def test_a_signal_is_heard_while_the_main_thread_waits_for_other_ranks():
    """In a collective, as here in a store: Python calls no handler before the library comes back."""
    store = dist.HashStore()
    with contextlib.closing(StopRequest()) as stop:

        def ask():
            os.kill(os.getpid(), signal.SIGTERM)
            deadline = time.monotonic() + 60
            while not stop.requested and time.monotonic() < deadline:
                time.sleep(0.01)
            store.set("heard", str(stop.requested))

        threading.Thread(target=ask).start()
        assert store.get("heard") == b"True"


def test_the_time_limit_counts_from_the_start_of_the_process_whatever_the_wall_clock_says(monkeypatch):
    age = seconds_since_start()
    assert 0 < age < 1e6
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 86_400)
    for more, wanted in ((-1, True), (3600, False)):
        with contextlib.closing(StopRequest((age + more) / 3600)) as stop:
            assert stop.requested is wanted


def loader_workers(job):
    """The processes that torch names so."""
    names = {pid: Path(f"/proc/{pid}/comm").read_text() for pid in processes_of(job)}
    found = [pid for pid, name in names.items() if name.startswith("pt_data_worker")]
    assert len(found) == 2, names
    return found


def wait_for_steps(folder, count, process):
    deadline = time.monotonic() + 400
    while not (folder / "metrics.jsonl").exists() or len(figures(folder)) < count:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_file(path, process):
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.02)


def assert_saved(folder, name):
    done = len(figures(folder))
    assert done < NUM_STEPS, f"{name}: it was stopped before it was done"
    assert (folder / "checkpoints" / "latest").read_text() == f"step_{done:08d}", name
    assert not (folder / "finished.json").exists(), name
