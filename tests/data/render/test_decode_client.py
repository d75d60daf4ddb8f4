"""A sample that hangs, crashes or eats memory costs itself and nothing else."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import tempfile
import time

import numpy as np
import pytest

from tests.data.conftest import LIMITS, drawn_picture, picture_bytes, still_and_moving
from tests.data.render.test_samples import SETTINGS, assistant, user
from vl3train.contracts.records import SampleError
from vl3train.data.records.conversation import Conversation, Image, Video
from vl3train.data.render import decode_client
from vl3train.data.render import decode_server as render_decode_server
from vl3train.data.render.chat_tokens import ChatTokenizer
from vl3train.data.render.decode_client import Decoder, DecodeServer, decode_server
from vl3train.data.render.samples import measure_sample, render_sample

PICTURE = Conversation((user(Image("0.jpg"), "What is it?"), assistant("A cat."))).to_json()
CLIP = Conversation((user(Video("0.mp4"), "Describe."), assistant("It moves."))).to_json()
MOST_PATCHES = 4000


@pytest.fixture(scope="module")
def address(tokenizer_dir):
    with decode_server(SETTINGS, tokenizer_dir, LIMITS) as address:
        yield address


@pytest.fixture
def decoder(address):
    decoder = Decoder(address, 20.0, MOST_PATCHES)
    yield decoder
    decoder.close()


@pytest.fixture
def picture():
    return {"0.jpg": picture_bytes(drawn_picture(61, 143), "JPEG", quality=90)}


@pytest.fixture
def hanging(tokenizer_dir, monkeypatch):
    """A server whose decode processes do, on pictures of a certain size, what a broken native decoder does.

    The decode process runs the planted code because the server, forked from this process, has it too.
    """
    import multiprocessing

    def planted(request, *rest):
        if b"HANG" in request.conversation:
            libc = ctypes.PyDLL(None)  # holds the interpreter's lock: no Python signal handler ever runs
            while True:
                libc.sleep(1000)
        if b"CRASH" in request.conversation:
            faulthandler.disable()
            ctypes.string_at(0)
        if b"MEMORY" in request.conversation:
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does
        if b"STOP" in request.conversation:
            os.kill(os.getpid(), signal.SIGSTOP)
        if b"BUG" in request.conversation:
            raise ZeroDivisionError
        return real(request, *rest)

    real = render_decode_server._answer
    monkeypatch.setattr(render_decode_server, "_answer", planted)
    monkeypatch.setattr(decode_client, "clean_processes", lambda: multiprocessing.get_context("fork"))
    with decode_server(SETTINGS, tokenizer_dir, LIMITS) as address:
        yield address


def test_inside_and_outside_of_the_decode_sandbox_samples_are_equal(
    decoder, tokenizer_dir, picture, encode_clip
):
    tokenizer = ChatTokenizer.from_folder(tokenizer_dir)
    clip = {"0.mp4": encode_clip(still_and_moving(30, 96, 130), rate=10)}
    start = 0
    for conversation, parts in ((PICTURE, picture), (CLIP, clip)):
        planned = decoder.measure(conversation, parts)
        assert planned == measure_sample(conversation, parts, SETTINGS, tokenizer, LIMITS)
        ours = decoder.render(conversation, parts, planned, key="k", source=3, first_patch=start)
        plain = render_sample(conversation, parts, SETTINGS, tokenizer, LIMITS, key="k", planned=planned)
        assert ours.source == 3
        for name in set(plain.__slots__) - {"source"}:
            np.testing.assert_array_equal(getattr(ours, name), getattr(plain, name), err_msg=name)
            assert getattr(ours, name).__class__ is getattr(plain, name).__class__
        assert not ours.keep_mask.all() or conversation == PICTURE
        start += planned.num_patches
    assert start <= MOST_PATCHES


def test_bad_samples_say_why_and_the_process_lives_on(decoder, picture):
    pid = None
    for bad in (b"", b"no picture", picture["0.jpg"][:200]):
        with pytest.raises(SampleError, match="cannot be read"):
            decoder.measure(PICTURE, {"0.jpg": bad})
        assert pid in (None, decoder._pid)
        pid = decoder._pid
    assert decoder.measure(PICTURE, picture).num_patches


def test_a_native_hang_is_killed_at_the_limit_and_the_next_sample_decodes(hanging, picture):
    decoder = Decoder(hanging, 0.5)
    for what in (b"HANG", b"STOP"):
        begin = time.monotonic()
        with pytest.raises(SampleError, match=r"longer than data\.decode_seconds=0\.5"):
            decoder.measure(what, picture)
        assert 0.4 < time.monotonic() - begin < 3
        assert decoder.measure(PICTURE, picture).num_patches


@pytest.mark.parametrize("what", [b"CRASH", b"MEMORY"])
def test_a_decoder_that_dies_takes_nothing_with_it(hanging, picture, what):
    decoder = Decoder(hanging, 20.0)
    with pytest.raises(SampleError, match="died of it twice"):
        decoder.measure(what, picture)
    assert decoder.measure(PICTURE, picture).num_patches


def test_one_death_is_forgiven(address, picture):
    decoder = Decoder(address, 20.0)
    planned = decoder.measure(PICTURE, picture)
    os.kill(decoder._pid, signal.SIGKILL)
    assert decoder.measure(PICTURE, picture) == planned


def test_our_own_bugs_are_no_bad_samples(address, decoder, picture):
    with pytest.raises(RuntimeError, match=r"(?s)in the decode process.*TypeError"):
        decoder.measure(17, picture)


def test_a_sample_larger_than_the_shared_memory_and_the_next_one(decoder, picture):
    """Also as the first of all, and after a decode process died."""
    before = decoder.measure(PICTURE, picture)
    large = {"0.jpg": picture["0.jpg"] + bytes(5 * 2**20), "9.jpg": bytes(100)}
    for _ in range(2):
        assert decoder.measure(PICTURE, large) == before
        assert decoder.measure(PICTURE, picture) == before
        os.kill(decoder._pid, signal.SIGKILL)


def test_nothing_is_left_when_the_server_ends(tokenizer_dir, picture):
    server = DecodeServer(SETTINGS, tokenizer_dir, LIMITS)
    decoder = Decoder(server.address, 20.0)
    decoder.measure(PICTURE, picture)
    pid = decoder._pid
    os.kill(pid, 0)
    server.close()
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.02)
    else:
        pytest.fail("the decode process outlived its server")
    with pytest.raises(RuntimeError, match="server is gone"):
        decoder.measure(PICTURE, picture)


def test_the_socket_lies_in_a_private_folder_and_a_long_one_for_temporary_files_is_no_obstacle(
    tmp_path, tokenizer_dir, decoder, picture, monkeypatch
):
    """``decoder``: Python's own fork server, whose socket would lie in the long folder, runs already."""
    deep = tmp_path / ("x" * 80) / ("y" * 80)
    deep.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    before = os.umask(0)
    try:
        with decode_server(SETTINGS, tokenizer_dir, LIMITS) as address:
            # What comes over the socket is unpickled: nobody else may reach it.
            assert os.stat(os.path.dirname(address)).st_mode & 0o777 == 0o700
            assert Decoder(address, 20.0).measure(PICTURE, picture).num_patches
    finally:
        os.umask(before)
    assert not list(deep.iterdir())


def test_an_orphan_that_hangs_is_ended_by_the_kernel(hanging, picture):
    decoder = Decoder(hanging, 0.2)
    decoder._connect()
    pid = decoder._pid
    decoder._connection.send(render_decode_server.Request(b"HANG", decoder._mailbox.put(picture), 0.2))
    decoder.close()  # as if its worker had been killed
    time.sleep(0.3)
    os.kill(pid, 0)
    time.sleep(2.0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
