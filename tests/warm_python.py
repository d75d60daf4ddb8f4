"""A Python that has imported and compiled everything, for tests that start many processes: an import of torch,
transformers and DeepSpeed takes 5 to 10 s of a core, and compiling what numba compiles some 20 s.

``warm_python.py serve SOCKET PID`` listens as long as process PID lives. ``warm_python.py run SOCKET -m MODULE ...`` is
used like ``python -m MODULE ...``: the server forks itself, and the module runs in the fork with the arguments,
environment, folder and open files of the caller. Signals are passed on, and its exit code comes back. A torchrun that
is started so is torch's own, but its ranks and their fork servers of loader workers are forks of it as well.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import inspect
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from multiprocessing import util
from pathlib import Path
from typing import Any, NoReturn

JOB = "VL3TRAIN_TEST_JOB"
"""Variable of the environment by which all processes of a job are found."""

NO_JOB = "job-" + 32 * "0"
"""Of as many letters as the name of a job, which is written over it."""

HIGH = 1000
"""Numbers of open files from here on are free."""

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

MODULES = (
    "deepspeed",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # it calls torch.compile, which imports the compiler
    "numba.typed",
    "pandas",
    "peft",
    "pyarrow.dataset",
    "pyarrow.pandas_compat",
    "torch.distributed.elastic.agent.server.local_elastic_agent",
    "torch.distributed.elastic.rendezvous.c10d_rendezvous_backend",
    "torch.distributed.launcher.api",
    "transformers.models.qwen2.tokenization_qwen2",
    "transformers.models.siglip",
    "transformers.models.video_llama_3.modeling_video_llama_3",
    "transformers.models.video_llama_3.processing_video_llama_3",
    "transformers.models.video_llama_3.video_processing_video_llama_3",
    "vl3train.data.preload",
    "vl3train.engine.failure",
    "vl3train.engine.loop",
    "vl3train.preview.check_config",
)
"""What the server imports. None that is run by ``-m``: runpy would warn that it is imported already."""


def main() -> int:
    """Serve, or be a client."""
    what, address, *words = sys.argv[1:]
    if what == "run":
        return run(address, words)
    job = serve(address, int(words[0]))
    return 0 if job is None else job()


def warm_up() -> None:
    """What an import does not do, and each process would do anew: compile or load kernels, parse a first config, and
    read all modules' files, which torchrun does for the name of one function. It starts no thread.
    """
    from vl3train.config.load import read_config

    inspect.stack()
    for stage in range(1, 5):  # their groups stay merged
        cfg, _ = read_config([f"stage={stage}", "model=debug", "data=demo", "machine=cpu"])
    assert cfg is not None


@contextlib.contextmanager
def in_folder_of(address: str) -> Iterator[str]:
    """The name of a socket in what is now the working folder: a socket's path may have 104 letters only."""
    here = os.getcwd()
    os.chdir(os.path.dirname(address))
    yield os.path.basename(address)
    os.chdir(here)


def send(to: socket.socket, content: Mapping[str, Any], files: Sequence[int]) -> None:
    """Send what JSON can hold, and open files."""
    text = json.dumps(content).encode()
    socket.send_fds(to, [len(text).to_bytes(8, "big")], files)
    to.sendall(text)


def receive(sender: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """What ``send`` sent; nothing where the sender has ended."""
    size, files, _, _ = socket.recv_fds(sender, 8, 3)
    text = sender.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL) if size else b"{}"
    return json.loads(text), files


def run(address: str, words: list[str]) -> int:
    """The client: sends its words, environment, folder and files; waits, and returns the exit code."""
    server = socket.socket(socket.AF_UNIX)
    with in_folder_of(address) as name:
        server.connect(name)
    for number in FORWARDED:
        signal.signal(number, lambda number, _: server.sendall(bytes([number])))
    send(server, {"words": words, "folder": os.getcwd(), "environment": dict(os.environ)}, [0, 1, 2])
    code = server.recv(1)
    return code[0] if code else 128 + signal.SIGKILL


def serve(address: str, owner: int) -> Callable[[], NoReturn] | None:
    """Returns with None when ``owner`` has ended, and in each forked process with what that shall do."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # as engine/ranks.py does before DeepSpeed is imported
    gc.disable()  # what imports make stays: there is nothing to collect
    for name in MODULES:
        import_module(name)
    warm_up()
    gc.freeze()  # else each fork would copy the memory of all objects when it collects garbage
    gc.enable()
    alive = os.pidfd_open(owner)
    listener = socket.socket(socket.AF_UNIX)
    with in_folder_of(address) as name:
        listener.bind(f"{name}.new")
        listener.listen(64)
        os.rename(f"{name}.new", name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a keeper
    while True:
        ready, _, _ = select.select([alive, listener], [], [])
        if alive in ready:
            return None
        client, _ = listener.accept()
        if os.fork():
            client.close()
        else:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.close(alive)
            listener.close()
            return start(client)


def start(client: socket.socket) -> Callable[[], NoReturn]:
    """Start what a client asks for. Returns in the new process, and in its keeper."""
    request, files = receive(client)
    write_job(request["environment"].get(JOB, NO_JOB))
    pid = os.fork()
    if pid:
        for number in files:
            os.close(number)
        return lambda: keep(client, pid)
    os.setsid()
    os.chdir(request["folder"])
    settle(request["environment"], dict(enumerate(files)))
    return lambda: end_as_python(request["words"])


def keep(client: socket.socket, pid: int) -> NoReturn:
    """Pass signals on to process ``pid`` and its exit code back; kill it when the client has ended."""
    ended = os.pidfd_open(pid)
    while ended not in select.select([ended, client], [], [])[0]:
        number = client.recv(1)
        os.kill(pid, number[0] if number else signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        client.sendall(bytes([code if code >= 0 else 128 - code]))
    os._exit(0)  # without a second for Python to take down all modules


def write_job(job: str) -> None:
    """Put the job's name where /proc/PID/environ is read from. A fork copies it."""
    assert len(job) == len(NO_JOB), job
    first, end = map(int, Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[47:49])
    mark = f"{JOB}=".encode()
    place = first + ctypes.string_at(first, end - first).index(mark) + len(mark)
    ctypes.memmove(place, job.encode(), len(job))


def settle(environment: Mapping[str, str], files: Mapping[int, int]) -> None:
    """Give this forked process its environment and signal handlers, and files by the numbers it has for them."""
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # it was looked up in the environment of the server
    moved = [os.dup2(number, HIGH + number) for number in files.values()]
    os.closerange(3, HIGH)
    for place, number in zip(files, moved, strict=True):
        os.dup2(number, place)
        os.close(number)
    for name in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGCHLD):
        signal.signal(name, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def as_python(words: Sequence[str]) -> int:
    """What ``python -m MODULE ...`` and ``python -c CODE ...`` do, in this process."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous

    subprocess_handler.Popen = ForkedRank  # type: ignore[misc, assignment]
    # For its log torchrun asks for the stack 18 times, and each time inspect looks through every module that is
    # imported: 2 to 3 s of a core in a Python that has imported everything.
    dynamic_rendezvous.get_method_name = lambda depth=2: sys._getframe(depth).f_code.co_name
    util.spawnv_passfds = with_fork_server(util.spawnv_passfds)
    option, what, *arguments = words[1:] if words[0] == "-u" else words
    sys.argv = [option, *arguments]
    sys.path[0] = os.getcwd()
    if option == "-c":
        exec(what, {"__name__": "__main__"})
    else:
        assert option == "-m", words
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    return 0


class ForkedRank:
    """In place of the Popen with which torchrun starts a rank."""

    def __init__(
        self, args: Sequence[str], env: Mapping[str, str], stdout: None, stderr: None, start_new_session: bool
    ) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            if start_new_session:
                os.setsid()
            settle(env, {})
            weakref.finalize._registry.clear()  # type: ignore[attr-defined]  # its launcher's folders are not for it to delete
            end_as_python(args[1:])

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> None:
        """Wait for its end. Raises subprocess.TimeoutExpired."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.02)


def end_as_python(words: Sequence[str]) -> NoReturn:
    """``as_python``, and the end of this process."""
    code: object = 1
    try:
        code = as_python(words)
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def with_fork_server(spawn: Callable[..., int]) -> Callable[..., int]:
    """``spawn``, but multiprocessing's fork server is a process that is forked now and waits to be asked."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        be_fork_server(theirs)
    theirs.close()

    def spawn_or_ask(path: str, args: Sequence[str], files: Sequence[int]) -> int:
        if "multiprocessing.forkserver" not in args[-1]:
            return spawn(path, args, files)
        util.spawnv_passfds = spawn
        blocked = list(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        wanted = {"blocked": blocked, "environment": dict(os.environ), "files": files, "code": args[-1]}
        send(ours, wanted, files)
        ours.close()
        return pid

    return spawn_or_ask


def be_fork_server(asker: socket.socket) -> None:
    """Wait for the call of multiprocessing, and run it with its files under the numbers that it names."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C to the group of a launcher, which asks for nothing
    wanted, files = receive(asker)
    if wanted:
        settle(wanted["environment"], dict(zip(wanted["files"], files, strict=True)))
        signal.pthread_sigmask(signal.SIG_SETMASK, wanted["blocked"])
        with contextlib.suppress(
            SystemExit
        ):  # its end; what the process before the fork does at its end is not ours
            exec(wanted["code"])
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
