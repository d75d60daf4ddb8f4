"""The commands that serve: they start, end with Ctrl-C, and the examples of their page work."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.inference.asked import draw_media
from tests.serving.conftest import ask, said
from vl3train.cli.main import main

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"


@contextlib.contextmanager
def started(python, *words):
    """A command that serves, and its address."""
    command = [*python, "-m", "vl3train.cli.main", *map(str, words), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if found := re.search(r"serving .* at http://(\S+);", line):
                yield process, found[1]
                return
        pytest.fail(f"it did not start:\n{''.join(lines)}")
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.two_processes
def test_it_serves_the_examples_of_its_page_and_ends_with_ctrl_c(warm_python, lively_model_dir, tmp_path):
    media = draw_media(tmp_path)
    (media / "long.mp4").rename(media / "clip.mp4")
    blocks = re.findall(r"```(bash|python)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    with started(warm_python, "chat", lively_model_dir, "--max-new-tokens", "16") as (process, address):
        for kind, block in blocks[1:]:
            text = block.replace("127.0.0.1:8000", address).replace('"max_tokens": 64', '"max_tokens": 16')
            assert text != block
            if kind == "bash":
                if shutil.which("curl") is None:
                    continue
                done = subprocess.run(
                    ["bash", "-c", text], cwd=media, capture_output=True, text=True, timeout=120
                )
                assert '"object": "chat.completion"' in done.stdout
            else:
                pytest.importorskip("openai")
                words = [sys.executable, "-c", text]
                done = subprocess.run(words, cwd=media, capture_output=True, text=True, timeout=120)
                assert done.returncode == 0, done.stderr
                assert len(done.stdout) > 3
        assert ask(address, said("x", max_tokens=2))[0] == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
        assert process.stdout.read().endswith("ending\n")


def test_what_cannot_be_served_is_told(lively_model_dir, tmp_path, capsys):
    assert main(["serve", str(tmp_path / "gone"), "--port", "0"]) == 1
    assert "there is no folder" in capsys.readouterr().err
    words = ["--max-running", "0", "--media-root", str(tmp_path / "none"), "--port", "99999"]
    assert main(["serve", str(lively_model_dir), *words]) == 1
    told = capsys.readouterr().err
    assert all(text in told for text in ("num_slots=0", "port=99999", "none is no folder"))
    assert main(["chat", str(lively_model_dir), str(lively_model_dir)]) == 1
    assert ": given twice" in capsys.readouterr().err
    assert main(["serve", str(lively_model_dir), "--host", "203.0.113.7", "--port", "0"]) == 1
    assert "203.0.113.7" in capsys.readouterr().err
