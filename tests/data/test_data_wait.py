"""The wait for data ends when it shall, and not by a signal that another program sends."""

from __future__ import annotations

import os
import queue
import signal
import threading

import pytest

from vl3train.data.data_wait import GIVE_UP_SIGNAL, DataWait


@pytest.fixture
def wait():
    wait = DataWait()
    before = signal.signal(GIVE_UP_SIGNAL, wait.on_signal)
    yield wait
    signal.signal(GIVE_UP_SIGNAL, before)


def from_now_on(act):
    """Act again and again, as the thread does that watches for a stop."""
    ends = threading.Event()

    def call():
        while not ends.wait(0.01):
            act()

    threading.Thread(target=call, daemon=True).start()
    return ends


def test_what_comes_is_given(wait):
    assert [wait.next(packs) for packs in [iter("ab")] * 2] == ["a", "b"]
    assert not wait.is_given_up


def test_what_never_comes_is_given_up_and_so_is_what_would_come_after_it(wait):
    def packs():
        while True:
            try:
                yield queue.Queue().get()
            except Exception:
                raise AssertionError("a library took the signal for an error of its own") from None

    ends = from_now_on(lambda: wait.end(threading.main_thread().ident))
    assert wait.next(packs()) is None
    ends.set()
    assert wait.is_given_up
    assert wait.next(iter("a")) is None


def test_a_signal_of_another_program_ends_no_wait(wait):
    def packs():
        os.kill(os.getpid(), GIVE_UP_SIGNAL)
        yield "a"

    assert wait.next(packs()) == "a"
    wait.end(threading.main_thread().ident)  # nothing is waited for
    assert not wait.is_given_up
