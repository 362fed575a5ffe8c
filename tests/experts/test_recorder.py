"""The recorder keeps what it is told, in order and compactly; NVTX ranges nest, or cost nothing."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import nvtx
import pytest

from moe_offload.experts.recorder import LayerEvent, NullRecorder, NvtxRanges, Recorder


def test_events_come_back_typed_and_in_order() -> None:
    recorder = Recorder()
    recorder.begin_pass("prefill", 2, 7)
    spans_us = (1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 8.5)
    first = LayerEvent(0, [[5, 1], [3, 5]], [1, 2], 3, 1, 1, 1, 2, 5, *spans_us, 8, 9, 4, 10, 11)
    uncached = LayerEvent(1, [[0, 1], [2, 3]], None)
    recorder.layer(first)
    recorder.layer(uncached)
    recorder.end_pass(0.25, 1000.25)
    recorder.token(7, 0.25, 1000.5)
    recorder.begin_pass("decode", 1, 7)
    decode = LayerEvent(0, [[6, -1]], [0], misses=2, cpu_bytes=2**40)
    recorder.layer(decode)
    recorder.end_pass(0.125, 1000.5)
    recorder.token(7, 0.125, 1000.75)

    assert list(recorder.layer_events()) == [
        first,
        uncached,
        decode._replace(pass_index=1),
    ]
    row = recorder.layer_table()[0]
    named = {name: row[name].item() for name in row.dtype.names}
    assert [named.pop(name) for name in ("n_tokens", "top_k", "cached")] == [2, 2, 1]
    assert named == {name: value for name, value in first._asdict().items() if name in named}
    assert recorder.pass_table().tolist() == [
        (False, 2, 7, 0.25, 1, 1000.25),
        (True, 1, 7, 0.125, 1, 1000.5),
    ]
    assert recorder.token_table().tolist() == [(0, 7, 0.25, 1000.5), (1, 7, 0.125, 1000.75)]


def test_what_is_left_for_the_end_is_recorded_then_and_in_order() -> None:
    recorder, asked = Recorder(), []

    def event(layer: int, expert: int) -> LayerEvent:
        asked.append(layer)
        return LayerEvent(layer, [[expert]], None, gpu_us=22.0)

    recorder.begin_pass("decode", 1, 0)
    recorder.at_end(partial(event, 0, 3))
    recorder.at_end(partial(event, 1, 4))
    assert asked == []
    recorder.end_pass(0.1)
    recorder.begin_pass("decode", 1, 0)
    recorder.end_pass(0.1)
    assert asked == [0, 1]
    events = list(recorder.layer_events())
    assert [(event.layer, event.ids, event.gpu_us) for event in events] == [
        (0, [[3]], 22.0),
        (1, [[4]], 22.0),
    ]


def test_a_pass_that_never_ended_is_left_out() -> None:
    recorder = Recorder()
    for duration_s in (0.1, None):
        recorder.begin_pass("decode", 1, 0)
        recorder.layer(LayerEvent(0, [[1, 2]], [1], hits=1, misses=1))
        if duration_s is not None:
            recorder.end_pass(duration_s)
    assert len(recorder.pass_table()) == 1
    assert len(recorder.layer_table()) == 1
    assert recorder.expert_ids().tolist() == [1, 2]
    assert recorder.hits_of_tokens().tolist() == [1]


@pytest.mark.parametrize("n_recorded", [0, 1, 2])
def test_an_interrupt_as_a_pass_ends_leaves_that_pass_out(n_recorded: int) -> None:
    recorder = Recorder()

    def interrupt() -> LayerEvent:
        raise KeyboardInterrupt

    def run(expert: int, *, waited: tuple[int, ...] = (), interrupted: bool = False) -> None:
        recorder.begin_pass("prefill", 1, 0)
        for layer in range(2):
            if interrupted and layer == n_recorded:
                recorder.at_end(interrupt)
            event = LayerEvent(
                layer, [[expert, layer]], [layer], 1, 1, gpu_us=float(expert), waited=waited
            )
            recorder.at_end(lambda event=event: event)
        if interrupted:
            recorder.at_end(interrupt)
        recorder.end_pass(0.1)

    run(5)
    with pytest.raises(KeyboardInterrupt):
        run(6, waited=(6,), interrupted=True)
    assert [event.ids for event in recorder.layer_events()] == [[[5, 0]], [[5, 1]]]
    assert len(recorder.pass_table()) == 1
    run(7)
    assert len(recorder.pass_table()) == 2
    events = list(recorder.layer_events())
    assert [event.pass_index for event in events] == [0, 0, 1, 1]
    assert [event.ids for event in events] == [[[5, 0]], [[5, 1]], [[7, 0]], [[7, 1]]]
    assert [event.n_hits_of_token for event in events] == [[0], [1], [0], [1]]
    assert [event.gpu_us for event in events] == [5.0, 5.0, 7.0, 7.0]
    assert all(event.waited == () for event in events)


def test_an_empty_recorder_reads_as_empty() -> None:
    recorder = Recorder()
    assert list(recorder.layer_events()) == []
    assert len(recorder.pass_table()) == len(recorder.token_table()) == 0


def test_passes_that_nobody_says_tokens_of_give_one_per_sequence() -> None:
    """As under a bare generate(): a batch of two, then a prompt in two chunks."""
    recorder = Recorder()
    for phase, prompt, n_sequences, duration_s, unix_s in (
        ("prefill", 0, 2, 0.5, 100.5),
        ("decode", 0, 2, 0.1, 100.625),
        ("prefill", 2, 1, 0.5, 200.5),
        ("prefill", 2, 1, 0.25, 200.75),
        ("decode", 2, 1, 0.1, 201.0),
    ):
        recorder.begin_pass(phase, 4, prompt, n_sequences)  # type: ignore[arg-type]
        recorder.end_pass(duration_s, unix_s)
    assert recorder.token_table().tolist() == [
        (0, 0, 0.5, 100.5),
        (0, 1, 0.5, 100.5),
        (1, 0, 0.125, 100.625),  # with what lies between the passes, such as sampling
        (1, 1, 0.125, 100.625),
        (3, 2, 0.75, 200.75),
        (4, 2, 0.25, 201.0),
    ]
    recorder.token(5, 0.125, 300.0)  # once somebody says them, that alone counts
    assert recorder.token_table().tolist() == [(4, 5, 0.125, 300.0)]


def test_events_leave_the_garbage_collector_nothing_to_walk() -> None:
    recorder = Recorder()
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(1000):
        recorder.begin_pass("decode", 1, 0)
        recorder.layer(LayerEvent(0, [[1, 2]], [1], hits=1, misses=1))
        recorder.end_pass(0.1)
        recorder.token(0, 0.1, 1.0)
    gc.collect()
    assert len(gc.get_objects()) - before < 100


def test_the_null_recorder_takes_the_same_calls_and_keeps_no_layers() -> None:
    recorder = NullRecorder()
    recorder.begin_pass("decode", 1, 0)
    recorder.layer(LayerEvent(0, [[1, 2]], [1], 1, 1, cpu_us=3.0, fetch_bytes=4))
    recorder.end_pass(0.1)
    recorder.token(0, 0.1, 1.0)
    assert len(recorder.layer_table()) == 0
    assert len(recorder.pass_table()) == len(recorder.token_table()) == 1
    assert not recorder.enabled
    assert Recorder().enabled


# --- NVTX ranges ----------------------------------------------------------------------------------


class FakeNvtx:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def push_range(self, name: str) -> None:
        self.calls.append(f"push {name}")

    def pop_range(self) -> None:
        self.calls.append("pop")

    @contextmanager
    def annotate(self, name: str) -> Iterator[None]:
        self.calls.append(f"enter {name}")
        yield
        self.calls.append(f"exit {name}")


def one_pass(ranges: NvtxRanges) -> None:
    ranges.begin_pass("decode")
    for layer in range(2):
        ranges.part(layer, "attention")
        ranges.part(layer, "plan")
        with ranges.layer(layer, "launch"):
            pass
        ranges.part(layer, "cpu experts")
    ranges.end_pass()


def test_ranges_nest_per_pass_and_layer() -> None:
    library = FakeNvtx()
    one_pass(NvtxRanges(enabled=True, library=library))
    assert library.calls == [
        "push decode",
        *("push layer 0 attention", "pop", "push layer 0 plan"),
        *("enter layer 0 launch", "exit layer 0 launch", "pop", "push layer 0 cpu experts", "pop"),
        *("push layer 1 attention", "pop", "push layer 1 plan"),
        *("enter layer 1 launch", "exit layer 1 launch", "pop", "push layer 1 cpu experts", "pop"),
        "pop",
    ]


def test_a_pass_that_was_cut_short_leaves_no_range_open() -> None:
    library = FakeNvtx()
    ranges = NvtxRanges(enabled=True, library=library)
    ranges.begin_pass("prefill")
    ranges.part(0, "router")
    one_pass(ranges)
    assert library.calls[:5] == ["push prefill", "push layer 0 router", "pop", "pop", "push decode"]
    pushes = sum(call.startswith("push") for call in library.calls)
    assert pushes == library.calls.count("pop")


def test_off_calls_nothing() -> None:
    library = FakeNvtx()
    ranges = NvtxRanges(enabled=False, library=library)
    one_pass(ranges)
    assert library.calls == []
    assert ranges.layer(0, "plan") is ranges.layer(1, "plan")  # nothing is made


def test_the_real_library_takes_the_calls() -> None:
    ranges = NvtxRanges(enabled=True)
    one_pass(ranges)
    assert isinstance(ranges.layer(0, "plan"), nvtx.annotate)
