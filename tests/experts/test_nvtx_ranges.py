"""NVTX ranges nest as the passes and layers do, and off means that nothing is called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import nvtx

from moe_offload.experts.recorder import NvtxRanges


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
