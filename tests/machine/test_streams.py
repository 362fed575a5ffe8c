"""Emulated streams and events mean what CUDA's mean."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from moe_offload.machine.streams import HostEvent, HostPool, HostStream


@pytest.fixture
def stream():
    stream = HostStream("under test")
    yield stream
    stream.close()


@pytest.fixture
def other():
    stream = HostStream("other")
    yield stream
    stream.close()


def test_work_runs_in_order_on_one_thread(stream):
    seen = []
    for i in range(100):
        stream.submit(lambda i=i: seen.append((i, threading.get_ident())))
    stream.synchronize()
    assert [i for i, _ in seen] == list(range(100))
    assert {ident for _, ident in seen} != {threading.get_ident()}
    assert len({ident for _, ident in seen}) == 1


def test_an_event_never_recorded_counts_as_reached(stream):
    event = HostEvent()
    assert event.query()
    stream.wait_event(event)
    stream.synchronize()


def test_waiting_holds_later_work_but_not_the_host(stream, other):
    gate, order, event = threading.Event(), [], HostEvent()
    other.submit(gate.wait)
    other.submit(lambda: order.append("first"))
    event.record(other)
    stream.wait_event(event)
    stream.submit(lambda: order.append("second"))
    assert not event.query()
    assert order == []
    gate.set()
    stream.synchronize()
    assert order == ["first", "second"]
    assert event.query()


def test_a_wait_keeps_the_recording_it_was_issued_for(stream, other):
    """Else a reader would wait for the copy that evicts what it reads: a deadlock."""
    event, gate = HostEvent(), threading.Event()
    event.record(other)
    stream.wait_event(event)
    other.submit(gate.wait)
    event.record(other)
    stream.synchronize()
    assert not event.query()
    gate.set()
    event.synchronize()
    assert event.query()


def test_elapsed_time_spans_the_work_between(stream):
    start, end = HostEvent(), HostEvent()
    start.record(stream)
    stream.submit(lambda: threading.Event().wait(0.02))
    end.record(stream)
    end.synchronize()
    assert start.elapsed_time(end) >= 20


def test_closing_finishes_what_was_submitted():
    stream, seen = HostStream("closing"), []
    stream.submit(lambda: threading.Event().wait(0.02))
    stream.submit(lambda: seen.append(1))
    stream.close()
    stream.close()
    assert seen == [1]
    with pytest.raises(RuntimeError, match="closing is closed"):
        stream.submit(lambda: None)


def test_cancelling_ends_a_wait_that_would_never_end(other):
    stream, never, gate = HostStream("cancelled"), HostEvent(), threading.Event()
    other.submit(gate.wait)
    never.record(other)
    stream.wait_event(never)
    seen = []
    stream.submit(lambda: seen.append(stream.cancelled.is_set()))
    stream.close(cancel=True)
    assert seen == [True]
    gate.set()


PROGRAM = """
import torch
from moe_offload.machine.streams import HostEvent, HostStream

busy, blocked, idle = (HostStream(name) for name in ("busy", "blocked", "idle"))
gate = HostEvent()
for _ in range(200):
    busy.submit(lambda: torch.randn(256, 256) @ torch.randn(256, 256))
gate.record(busy)
blocked.wait_event(gate)
blocked.submit(lambda: print("done", flush=True))
"""


def test_a_program_that_closes_nothing_still_ends_well():
    source = Path(__file__).resolve().parents[2] / "src"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_a_stream_that_nobody_holds_any_more_ends_its_thread():
    before = set(threading.enumerate())
    stream = HostStream("forgotten")
    other = HostStream("also forgotten")
    event = HostEvent()
    event.record(stream)
    other.wait_event(event)
    other.synchronize()
    started = set(threading.enumerate()) - before
    assert len(started) == 2
    del stream, other
    gc.collect()
    for thread in started:
        thread.join(timeout=20)
        assert not thread.is_alive()


def test_a_pool_runs_all_that_was_submitted_on_all_its_threads():
    before = set(threading.enumerate())
    pool, together, ran = HostPool("few", 3), threading.Barrier(3), []
    for _ in range(3):
        pool.submit(together.wait)  # none would end alone
    for n in range(20):
        pool.submit(lambda n=n: ran.append(n))
    pool.close()
    assert sorted(ran) == list(range(20))
    forgotten = HostPool("forgotten", 2)
    started = set(threading.enumerate()) - before
    assert len(started) == 2
    del forgotten
    gc.collect()
    for thread in started:
        thread.join(timeout=20)
        assert not thread.is_alive()
