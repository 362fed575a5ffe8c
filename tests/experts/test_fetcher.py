"""Copies into slots: contents, order against computation, failures, shutdown.

Every hazard test runs on the host back end and on the CUDA back end over emulated streams. Others
take one of the two waits out, and show that the same checks then fail.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from emulated_cuda import DeviceMemory, DeviceSlots, EmulatedCuda
from torch import Tensor

from moe_offload.experts.fetcher import (
    CopyCancelledError,
    CudaFetcher,
    ExpertFetcher,
    HostFetcher,
    make_fetcher,
)
from moe_offload.machine.streams import HostEvent, HostStream

BLOCK_BYTES = 4096
CUDA = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]


def block(value: int) -> Tensor:
    return torch.full((BLOCK_BYTES,), value, dtype=torch.uint8)


def empty_slots(n: int) -> Tensor:
    return torch.zeros(n, BLOCK_BYTES, dtype=torch.uint8)


def collect(fetcher: ExpertFetcher, n: int) -> list[tuple[int, Exception | None]]:
    """Poll, as the dispatcher does, until `n` copies have ended."""
    ended: list[tuple[int, Exception | None]] = []
    deadline = time.monotonic() + 20
    while len(ended) < n:
        ended += [(c.slot, c.error) for c in fetcher.poll()]
        assert time.monotonic() < deadline, f"{len(ended)} of {n} copies ended"
        time.sleep(0.0005)
    return ended


# --- copies ---------------------------------------------------------------------------------------


def test_copies_arrive_whole_and_are_counted():
    slots = empty_slots(8)
    fetcher = make_fetcher("cpu", slots)
    for slot in range(8):
        fetcher.fetch(slot, block(10 + slot))
    assert fetcher.in_flight == 8
    assert sorted(collect(fetcher, 8)) == [(slot, None) for slot in range(8)]
    for slot in range(8):
        assert (slots[slot] == 10 + slot).all()
    assert (fetcher.copies, fetcher.in_flight) == (8, 0)
    assert fetcher.poll() == []
    fetcher.close()


def test_the_host_never_blocks_on_a_copy():
    gate = threading.Event()
    fetcher = HostFetcher(empty_slots(2), before_copy=lambda slot: gate.wait())
    fetcher.fetch(0, block(1))
    fetcher.fetch(1, block(2))
    assert fetcher.poll() == []
    gate.set()
    assert [slot for slot, _ in collect(fetcher, 2)] == [0, 1]
    fetcher.close()


def test_copies_may_finish_out_of_order():
    gate, slots = threading.Event(), empty_slots(2)
    fetcher = HostFetcher(
        slots, before_copy=lambda slot: gate.wait() if slot == 0 else None, n_streams=2
    )
    fetcher.fetch(0, block(1))
    fetcher.fetch(1, block(2))
    assert collect(fetcher, 1) == [(1, None)]
    assert (slots[0] == 0).all()
    gate.set()
    assert collect(fetcher, 1) == [(0, None)]
    assert (slots[0] == 1).all()
    fetcher.close()


def test_two_copies_into_one_slot_keep_their_order_across_streams():
    calls, slots = [], empty_slots(1)

    def slow_first(slot: int) -> None:
        calls.append(slot)
        if len(calls) == 1:
            time.sleep(0.02)

    fetcher = HostFetcher(slots, before_copy=slow_first, n_streams=2)
    fetcher.fetch(0, block(1))
    fetcher.fetch(0, block(2))
    assert len(fetcher.drain()) == 2
    assert (slots[0] == 2).all()
    fetcher.close()


def test_a_copy_that_raises_is_reported_and_the_slot_can_be_used_again():
    slots, fail = empty_slots(3), {1}

    def before_copy(slot: int) -> None:
        if slot in fail:
            raise OSError("injected")

    fetcher = HostFetcher(slots, before_copy=before_copy)
    for slot in range(3):
        fetcher.fetch(slot, block(5))
    ended = dict(collect(fetcher, 3))
    assert ended[0] is None
    assert ended[2] is None
    assert isinstance(ended[1], OSError)
    assert (slots[1] == 0).all()
    assert fetcher.copies == 2

    accelerator = HostStream("reader")
    failed = fetcher.wait_ready([0, 1, 2], accelerator)
    assert [copy.slot for copy in failed] == [1]
    fail.clear()
    fetcher.fetch(1, block(6))
    assert collect(fetcher, 1) == [(1, None)]
    assert fetcher.wait_ready([1], accelerator) == []
    assert (slots[1] == 6).all()
    accelerator.close()
    fetcher.close()


def test_a_copy_that_cuda_refuses_is_reported_not_raised():
    cuda = EmulatedCuda()

    class Refusing(DeviceSlots):
        def __getitem__(self, slot):
            raise RuntimeError("CUDA error: invalid argument")

    fetcher = CudaFetcher(Refusing(empty_slots(1), cuda), cuda)
    fetcher.fetch(0, block(1))
    ((slot, error),) = collect(fetcher, 1)
    assert slot == 0
    assert "invalid argument" in str(error)
    assert fetcher.copies == 0
    fetcher.close()
    cuda.close()


def test_an_error_found_by_asking_cuda_is_reported():
    """CUDA reports a failed asynchronous copy from whichever call comes next."""
    cuda = EmulatedCuda()
    fetcher = CudaFetcher(DeviceSlots(empty_slots(1), cuda), cuda)
    fetcher.fetch(0, block(1))

    def broken() -> bool:
        raise RuntimeError("CUDA error: unspecified launch failure")

    fetcher._in_flight[0].ready.query = broken
    ((_, error),) = collect(fetcher, 1)
    assert "unspecified launch failure" in str(error)
    fetcher.close()
    cuda.close()


def test_the_emulated_link_takes_its_time():
    gbps, n, start_s = 1e-3, 5, time.perf_counter()
    fetcher = HostFetcher(empty_slots(1), emulate_pcie_gbps=gbps)
    for value in range(n):
        fetcher.fetch(0, block(value))
    fetcher.drain()
    assert time.perf_counter() - start_s >= n * BLOCK_BYTES / (gbps * 1e9)
    fetcher.close()


def test_the_emulated_link_copies_every_chunk(monkeypatch):
    chunk_bytes = 1000  # 4096 is no multiple of it
    monkeypatch.setattr("moe_offload.experts.fetcher._CHUNK_BYTES", chunk_bytes)
    slots = empty_slots(3)
    fetcher = HostFetcher(slots, emulate_pcie_gbps=1.0)
    sources = torch.arange(3 * BLOCK_BYTES, dtype=torch.int64).remainder(251).to(torch.uint8)
    for slot, source in enumerate(sources.view(3, BLOCK_BYTES)):
        fetcher.fetch(slot, source)
    assert [completion.error for completion in fetcher.drain()] == [None] * 3
    assert torch.equal(slots.flatten(), sources)
    fetcher.close()


# --- one copy engine for a direction --------------------------------------------------------------


def order_of_copies(n_blocks: int, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The slots in the order in which their parts are copied, and -1: something small that the
    compute stream sends while the first part is on its way and all the others are queued."""
    monkeypatch.setattr("moe_offload.experts.fetcher._CUDA_CHUNK_BYTES", chunk_bytes)
    gate, order = threading.Event(), []

    def copies(slot: int) -> None:
        if not order:
            assert gate.wait(20)
        order.append(slot)

    slots, small = empty_slots(n_blocks), torch.zeros(8, dtype=torch.uint8)
    cuda = EmulatedCuda(before_copy=copies)
    fetcher = CudaFetcher(DeviceSlots(slots, cuda), cuda)
    for slot in range(n_blocks):
        fetcher.fetch(slot, block(slot + 1))
    cuda.engine.wait_for_askers(1)
    DeviceMemory(small, cuda).copy_(torch.ones_like(small), non_blocking=True)
    cuda.engine.wait_for_askers(2)
    gate.set()
    cuda.compute.synchronize()
    fetcher.drain()
    fetcher.close()
    cuda.close()
    assert (small == 1).all()
    assert all((slots[slot] == slot + 1).all() for slot in range(n_blocks))
    return order


def test_whole_experts_hold_up_whatever_else_is_copied(monkeypatch):
    """What the engine of the emulation is for; a card's copies waited 12 ms for such a queue."""
    assert order_of_copies(3, 4 * BLOCK_BYTES, monkeypatch) == [0, 1, 2, -1]


@pytest.mark.parametrize(("chunk_bytes", "n_parts"), [(BLOCK_BYTES, 1), (BLOCK_BYTES // 4, 4)])
def test_a_copy_waits_for_one_chunk_of_experts_at_most(monkeypatch, chunk_bytes, n_parts):
    order = order_of_copies(3, chunk_bytes, monkeypatch)
    assert order.index(-1) == 1
    assert sorted(order) == [-1, *(slot for slot in range(3) for _ in range(n_parts))]


def test_a_chunk_that_is_no_divisor_copies_everything(monkeypatch):
    order = order_of_copies(2, 1000, monkeypatch)  # a block has 4096 bytes
    assert [slot for slot in order if slot >= 0] == [0] * 5 + [1] * 5


def test_what_a_kernel_reads_from_host_memory_waits_for_no_copy():
    """So the CPU's sum is combined while every queued expert is still to come."""
    gate = threading.Event()
    cuda = EmulatedCuda(before_copy=lambda slot: gate.wait())
    fetcher = CudaFetcher(DeviceSlots(empty_slots(3), cuda), cuda)
    for slot in range(3):
        fetcher.fetch(slot, block(1))
    on_host, out = torch.full((8,), 2.0), torch.zeros(8)
    cuda.compute.submit(lambda: out.copy_(on_host))  # a kernel's work: no copy command
    cuda.compute.synchronize()
    assert fetcher.poll() == [] and (out == 2).all()
    gate.set()
    assert len(fetcher.drain()) == 3
    fetcher.close()
    cuda.close()


# --- shutdown -------------------------------------------------------------------------------------


def test_close_finishes_what_began_and_cancels_the_rest():
    slots, began = empty_slots(4), threading.Event()

    def slow(slot: int) -> None:
        began.set()
        time.sleep(0.03)

    fetcher = HostFetcher(slots, before_copy=slow)
    for slot in range(4):
        fetcher.fetch(slot, block(9))
    assert began.wait(10)
    fetcher.close()
    fetcher.close()
    ended = {c.slot: c.error for c in fetcher.poll()}
    assert ended[0] is None
    assert (slots[0] == 9).all()
    for slot in (1, 2, 3):
        assert isinstance(ended[slot], CopyCancelledError)
        assert (slots[slot] == 0).all()


def test_close_does_not_wait_for_a_reader_that_never_ends():
    slots, gate, accelerator = empty_slots(1), threading.Event(), HostStream("reader")
    fetcher = HostFetcher(slots)
    accelerator.submit(gate.wait)
    read = HostEvent()
    read.record(accelerator)
    fetcher.mark_released([0], read)
    fetcher.fetch(0, block(7))
    fetcher.close()
    assert (slots[0] == 0).all(), "a cancelled copy overwrote what is being read"
    gate.set()
    accelerator.close()


def test_close_lets_a_reader_of_a_cancelled_copy_go():
    gate = threading.Event()
    fetcher = HostFetcher(empty_slots(2), before_copy=lambda slot: gate.wait(0.05))
    accelerator = HostStream("reader")
    fetcher.fetch(0, block(1))
    fetcher.fetch(1, block(1))
    (copy,) = fetcher.wait_ready([1], accelerator)
    fetcher.close()
    accelerator.synchronize()
    assert isinstance(copy.error, CopyCancelledError)
    accelerator.close()


def test_closing_cuda_waits_for_copies_in_flight():
    slots = empty_slots(3)
    cuda = EmulatedCuda(before_copy=lambda slot: time.sleep(0.005))
    fetcher = CudaFetcher(DeviceSlots(slots, cuda), cuda)
    for slot in range(3):
        fetcher.fetch(slot, block(4))
    fetcher.close()
    assert (slots == 4).all()
    assert fetcher.copies == 3
    cuda.close()


# --- hazards --------------------------------------------------------------------------------------

Mutation = Callable[[type[ExpertFetcher]], type[ExpertFetcher]]


def intact(back_end: type[ExpertFetcher]) -> type[ExpertFetcher]:
    return back_end


def without_ready_wait(back_end: type[ExpertFetcher]) -> type[ExpertFetcher]:
    class Mutant(back_end):
        def wait_ready(self, slots, stream):
            return []

    return Mutant


def without_released_wait(back_end: type[ExpertFetcher]) -> type[ExpertFetcher]:
    class Mutant(back_end):
        def _wait_released(self, slot, stream):
            pass

    return Mutant


class Rig:
    """A fetcher and a computation that looks at a slot twice, with delays in between."""

    def __init__(self, back_end: str, mutation: Mutation, n_slots: int) -> None:
        self.memory = empty_slots(n_slots)
        self.copy_delay_s = 0.0
        self.corrupt: list[tuple[int, int]] = []
        self._closers: list[Callable[[], None]] = []
        if back_end == "host":
            self.accelerator = HostStream("accelerator")
            self.fetcher = mutation(HostFetcher)(self.memory, before_copy=self._delay)
            self._closers = [self.accelerator.close]
        else:
            cuda = EmulatedCuda(before_copy=self._delay)
            self.accelerator = cuda.compute
            self.fetcher = mutation(CudaFetcher)(DeviceSlots(self.memory, cuda), cuda)
            self._closers = [cuda.close]

    def _delay(self, slot: int) -> None:
        time.sleep(self.copy_delay_s)

    def launch(self, slot: int, expected: int, delay_s: float) -> None:
        def compute() -> None:
            for pause_s in (delay_s, 0.0):
                if not (self.memory[slot] == expected).all():
                    self.corrupt.append((slot, expected))
                    return
                time.sleep(pause_s)

        self.fetcher.wait_ready([slot], self.accelerator)
        self.accelerator.submit(compute)
        read = self.fetcher._new_event()
        read.record(self.accelerator)
        self.fetcher.mark_released([slot], read)

    def close(self) -> None:
        self.accelerator.synchronize()
        self.fetcher.drain()
        self.fetcher.close()
        for close in self._closers:
            close()


@pytest.fixture
def rig() -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make(back_end: str, mutation: Mutation, n_slots: int = 1) -> Rig:
        rigs.append(Rig(back_end, mutation, n_slots))
        return rigs[-1]

    yield make
    for made in rigs:
        made.fetcher.close()


def evict_under_load(rig: Rig, copy_delay_s: float, compute_delay_s: float) -> int:
    """Fetch, compute, and evict at once, six times over one slot; the number of corrupt reads."""
    rig.copy_delay_s = copy_delay_s
    for value in range(1, 7):
        rig.fetcher.fetch(0, block(value))
        rig.launch(0, value, compute_delay_s)
    rig.close()
    return len(rig.corrupt)


BACK_ENDS = ["host", "cuda logic"]
SLOW_COPY = {"copy_delay_s": 0.01, "compute_delay_s": 0.0}
SLOW_COMPUTE = {"copy_delay_s": 0.0, "compute_delay_s": 0.01}


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("delays", [SLOW_COPY, SLOW_COMPUTE], ids=["slow copy", "slow compute"])
def test_a_slot_is_neither_read_early_nor_overwritten_early(rig, back_end, delays):
    assert evict_under_load(rig(back_end, intact), **delays) == 0


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_without_the_ready_wait_a_slot_is_read_early(rig, back_end):
    assert evict_under_load(rig(back_end, without_ready_wait), **SLOW_COPY) > 0


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_without_the_released_wait_a_slot_is_overwritten_while_read(rig, back_end):
    assert evict_under_load(rig(back_end, without_released_wait), **SLOW_COMPUTE) > 0


def soak(rig: Rig, n_steps: int, seed: int) -> int:
    """Random fetches, computations and polls with random delays; the number of corrupt reads."""
    rng = random.Random(seed)
    n_slots = len(rig.memory)
    content: dict[int, int] = {}
    n_ended = n_fetched = 0
    rig.copy_delay_s = 0.0001
    for _ in range(n_steps):
        slot = rng.randrange(n_slots)
        if slot not in content or rng.random() < 0.4:
            content[slot] = rng.randrange(1, 256)
            rig.fetcher.fetch(slot, block(content[slot]))
            n_fetched += 1
        else:
            rig.launch(slot, content[slot], rng.choice((0.0, 0.0, 0.0, 0.0003)))
        if rng.random() < 0.2:
            n_ended += len(rig.fetcher.poll())
    n_ended += len(rig.fetcher.drain())
    assert n_ended == n_fetched == rig.fetcher.copies
    rig.close()
    for slot, value in content.items():
        assert (rig.memory[slot] == value).all()
    return len(rig.corrupt)


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("seed", range(2))
def test_soak(rig, back_end, seed):
    assert soak(rig(back_end, intact, n_slots=4), n_steps=3000, seed=seed) == 0


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("mutation", [without_ready_wait, without_released_wait])
def test_the_soak_notices_a_missing_wait(rig, back_end, mutation):
    assert soak(rig(back_end, mutation, n_slots=4), n_steps=3000, seed=0) > 0


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.fixture
def gpu_fetcher():
    slots = torch.zeros(2, 1 << 20, dtype=torch.uint8, device="cuda")
    fetcher = make_fetcher("cuda", slots)
    yield fetcher, slots
    fetcher.close()


def pinned(value: int) -> Tensor:
    return torch.full((1 << 20,), value, dtype=torch.uint8).pin_memory()


class TestCuda:
    pytestmark = CUDA

    def test_copies_arrive_whole(self, gpu_fetcher):
        fetcher, slots = gpu_fetcher
        fetcher.fetch(0, pinned(3))
        fetcher.fetch(1, pinned(4))
        assert sorted(collect(fetcher, 2)) == [(0, None), (1, None)]
        assert (slots[0] == 3).all()
        assert (slots[1] == 4).all()

    def test_a_reader_waits_for_its_copy_and_an_eviction_for_its_reader(self, gpu_fetcher):
        fetcher, slots = gpu_fetcher
        stream = torch.cuda.current_stream()
        seen = []
        for value in range(1, 20):
            fetcher.fetch(0, pinned(value))
            fetcher.wait_ready([0], stream)
            before = slots[0].clone()
            torch.cuda._sleep(2_000_000)  # about a millisecond: the next copy has time to do harm
            seen.append((value, before, slots[0].clone()))
            fetcher.mark_released([0], stream.record_event())
        torch.cuda.synchronize()
        for value, before, after in seen:
            assert (before == value).all()
            assert (after == value).all()

    def test_an_eviction_does_harm_without_the_released_wait(self):
        slots = torch.zeros(1, 1 << 20, dtype=torch.uint8, device="cuda")
        fetcher = without_released_wait(CudaFetcher)(slots)
        stream = torch.cuda.current_stream()
        source = [pinned(value) for value in range(1, 10)]
        after = []
        for value in source:
            fetcher.fetch(0, value)
            fetcher.wait_ready([0], stream)
            torch.cuda._sleep(20_000_000)
            after.append(slots[0].clone())
            fetcher.mark_released([0], stream.record_event())
        torch.cuda.synchronize()
        assert any(
            (seen != value.to("cuda")).any() for seen, value in zip(after, source, strict=True)
        )
        fetcher.close()
