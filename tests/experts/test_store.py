"""A machine that will not lock memory: one clear line, pageable copies, right results, no end."""

from __future__ import annotations

import gc
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_offload.checkpoint.block import block_layout
from moe_offload.engine.probes import cpu_runner
from moe_offload.experts import layer as layer_module
from moe_offload.experts.layer import HostHandoff
from moe_offload.experts.store import ExpertStore

LAYOUT = block_layout("fp32", 16, 16)


class Runtime:
    """`torch.cuda.cudart()` with room for so many registrations."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.registered: dict[int, int] = {}

    def cudaHostRegister(self, pointer: int, n_bytes: int, flags: int) -> int:
        if len(self.registered) == self.room:
            return 2  # cudaErrorMemoryAllocation
        self.registered[pointer] = n_bytes
        return 0

    def cudaHostUnregister(self, pointer: int) -> int:
        del self.registered[pointer]
        return 0


@pytest.fixture
def store() -> ExpertStore:
    store = ExpertStore([LAYOUT] * 3, [4] * 3)
    for layer in range(3):
        store.blocks(layer).fill_(layer + 1)
    return store


def with_runtime(monkeypatch: pytest.MonkeyPatch, room: int) -> Runtime:
    """CUDA's error after a refusal is raised by the next launch, as on a GPU."""
    runtime, zeros = Runtime(room), torch.zeros
    launched: list[object] = []

    def launch(*size: object, **options: object) -> Tensor:
        if options.get("device") != "cuda":
            return zeros(*size, **options)  # type: ignore[call-overload, no-any-return]
        launched.append(size)
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch, "zeros", launch)
    return runtime


def test_all_memory_is_registered_where_it_lies_and_given_back(store, monkeypatch):
    runtime = with_runtime(monkeypatch, room=3)
    assert store.pin() is None
    assert all(store.is_pinned(layer) for layer in range(3))
    assert runtime.registered == {
        store.blocks(layer).data_ptr(): 4 * LAYOUT.block_bytes for layer in range(3)
    }
    store.close()
    assert runtime.registered == {}


@pytest.mark.parametrize("room", [0, 2])
def test_a_refusal_is_one_line_and_the_first_layers_stay_pinned(store, monkeypatch, room):
    runtime = with_runtime(monkeypatch, room)
    line = store.pin()
    assert line is not None
    assert "\n" not in line
    gigabytes = 3 * 4 * LAYOUT.block_bytes / 1e9
    assert line.startswith("pinning experts was refused after 0.0 of ")
    assert f"{gigabytes:.1f} GB (CUDA error 2)" in line
    assert f"layers from {room} on use pageable memory" in line
    assert "none of them is started in the background" in line and "ulimit -l" in line
    assert [store.is_pinned(layer) for layer in range(3)] == [layer < room for layer in range(3)]
    assert list(runtime.registered) == [store.blocks(layer).data_ptr() for layer in range(room)]
    assert [int(store.block(layer, 3)[0]) for layer in range(3)] == [1, 2, 3]
    store.close()
    store.close()
    assert runtime.registered == {}


def test_pages_that_are_still_registered_are_no_matter_of_a_limit(store, monkeypatch):
    runtime = with_runtime(monkeypatch, room=3)
    monkeypatch.setattr(runtime, "cudaHostRegister", lambda *_: 712)
    line = store.pin()
    assert line is not None
    assert "close what this program loaded before" in line and "ulimit" not in line


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_that_nobody_holds_any_more_is_unregistered_before_it_is_gone(monkeypatch):
    runtime = with_runtime(monkeypatch, room=3)
    was_mapped = []

    def unregister(pointer: int) -> int:
        ranges = re.findall(r"^(\w+)-(\w+) ", Path("/proc/self/maps").read_text(), re.MULTILINE)
        was_mapped.append(any(int(a, 16) <= pointer < int(b, 16) for a, b in ranges))
        return Runtime.cudaHostUnregister(runtime, pointer)

    monkeypatch.setattr(runtime, "cudaHostUnregister", unregister)
    forgotten = ExpertStore([LAYOUT] * 3, [600] * 3)
    assert forgotten.pin() is None
    held = forgotten.block(1, 5)
    del forgotten
    gc.collect()
    assert list(runtime.registered) == [held.data_ptr() - 5 * LAYOUT.block_bytes]
    del held
    gc.collect()
    assert runtime.registered == {}
    assert was_mapped == [True] * 3


def test_staging_memory_that_cannot_be_pinned_is_pageable(monkeypatch, capsys):
    empty = torch.empty

    def refuses(*size: object, **options: object) -> Tensor:
        if options.get("pin_memory"):
            raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")
        return empty(*size, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch, "empty", refuses)
    handoff = HostHandoff()
    result = handoff.result(3, 5, torch.device("cuda"))
    assert result.shape == (3, 5) and result.dtype == torch.float32
    assert not handoff.is_mapped  # no kernel may read it
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("warning: no memory could be pinned to hand layers over (CUDA error: o")
    memory, is_pinned = layer_module.staging(7, torch.uint8)
    assert (memory.shape, is_pinned) == ((7,), False)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_experts_lie_in_private_huge_pages_that_no_child_copies():
    store = ExpertStore([LAYOUT], [600])
    address = store.block(0, 0).data_ptr()
    flags: list[str] = []
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        if inside and line.startswith("VmFlags:"):
            flags = line.split()[1:]
    assert "sh" not in flags  # Linux gives shared memory no huge pages unless told to
    assert "dc" in flags
    if Path("/sys/kernel/mm/transparent_hugepage").exists():
        assert "hg" in flags


def test_layers_without_memory_of_their_own_use_that_of_others_in_turn(monkeypatch):
    store = ExpertStore([LAYOUT] * 5, [4] * 5, n_stored=2)
    for layer in range(2):
        store.blocks(layer).fill_(layer + 1)
    assert [int(store.block(layer, 3)[0]) for layer in range(5)] == [1, 2, 1, 2, 1]
    assert store.pointers(4).tolist() == store.pointers(0).tolist()
    assert store.total_bytes == 2 * 4 * LAYOUT.block_bytes
    runtime = with_runtime(monkeypatch, 2)
    assert store.pin() is None
    assert len(runtime.registered) == 2
    store.close()
    assert runtime.registered == {}


def test_a_calibration_reads_all_that_is_in_memory_before_it_reads_anything_again():
    """What is read again soon may come from the CPU's caches, and is timed too short."""

    class Reads:
        def run(self, hidden, pointers, mask, index, weights, out):
            read.extend(pointers[index.flatten()].tolist())

    read: list[int] = []
    run = cpu_runner(ExpertStore([LAYOUT] * 5, [4] * 5, n_stored=2), Reads(), torch.float32)
    for _ in range(2 * 4):
        run((1,))
    assert len(set(read)) == len(read) == 2 * 4
