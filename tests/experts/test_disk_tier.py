"""Host memory over a folder on disk: the right bytes at any time, nobody's place taken, no hang."""

from __future__ import annotations

import errno
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_offload.checkpoint import block_file
from moe_offload.checkpoint.block import block_layout
from moe_offload.checkpoint.prepared import MoeLayer
from moe_offload.checkpoint.safetensors_file import plan_header, write_file
from moe_offload.errors import UserError
from moe_offload.experts.cache import make_policy
from moe_offload.experts.disk_reads import N_READERS, Read
from moe_offload.experts.disk_tier import DiskTier
from moe_offload.experts.fetcher import HostFetcher
from moe_offload.kernels.bindings import load_kernels
from moe_offload.kernels.cpu_experts import block_at

LAYOUT = block_layout("fp32", 64, 40)  # 8 pages: four pieces of a block, and more
N_LAYERS, N_EXPERTS = 3, 6


def block_of(layer: int, expert: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * layer + expert)
    return torch.randint(256, (LAYOUT.block_bytes,), generator=generator, dtype=torch.uint8)


def write_layer(folder: Path, layer: int) -> MoeLayer:
    shape = (N_EXPERTS, LAYOUT.block_bytes)
    header, (entry,) = plan_header([("blocks", torch.uint8, shape)], {})
    file = folder / f"experts-{layer:05d}.safetensors"
    n_bytes = len(header) + N_EXPERTS * LAYOUT.block_bytes
    blocks = [block_of(layer, expert) for expert in range(N_EXPERTS)]
    checksums = write_file(file, n_bytes, [header, *blocks])
    offset = entry.offset_bytes
    unsealed = ("m", file, n_bytes, offset, N_EXPERTS, LAYOUT, 0, (0,) * N_EXPERTS)
    return MoeLayer(*unsealed).sealed(checksums)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_file, "_LEAST_BYTES", 4096)


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> list[MoeLayer]:
    folder = tmp_path_factory.mktemp("disk-tier")
    return [write_layer(folder, layer) for layer in range(N_LAYERS)]


@pytest.fixture
def open_tier(layers: list[MoeLayer]) -> Iterator[Callable[..., DiskTier]]:
    opened = []

    def open_one(
        n_ways: int, policy: str = "LRU", of: list[MoeLayer] | None = None, n_spare: int = 2
    ) -> DiskTier:
        used = of or layers
        kernels = load_kernels()
        opened.append(DiskTier(used, [n_ways] * len(used), make_policy(policy), kernels, n_spare))
        return opened[-1]

    yield open_one
    for tier in opened:
        tier.close()


def computed(tier: DiskTier, layer: int, experts: list[int]) -> list[int]:
    """The experts in the order of their groups, each group's bytes compared while it is there."""
    order: list[int] = []
    for group in tier.arriving(layer, experts):
        pointers = tier.pointers(layer)
        for expert in group:
            assert torch.equal(
                block_at(int(pointers[expert]), LAYOUT.block_bytes), block_of(layer, expert)
            )
        order += group
    return order


@pytest.mark.parametrize(("n_ways", "n_spare"), [(1, 0), (1, 3), (2, 1), (5, 0), (N_EXPERTS, 2)])
def test_each_expert_comes_once_with_its_own_bytes(open_tier, n_ways, n_spare):
    tier = open_tier(n_ways, n_spare=n_spare)
    chosen = random.Random(n_ways)
    for _ in range(40):
        layer = chosen.randrange(N_LAYERS)
        experts = chosen.sample(range(N_EXPERTS), chosen.randint(0, N_EXPERTS))
        assert sorted(computed(tier, layer, experts)) == sorted(experts)
    assert tier.disk.hits > 0


@pytest.mark.parametrize("n_spare", [0, 2])
def test_places_between_layers_are_read_into_while_a_layer_has_no_more(
    open_tier, monkeypatch, n_spare
):
    tier, may_read = open_tier(1, n_spare=n_spare), threading.Event()
    with monkeypatch.context() as patch:
        with_reads(patch, lambda *_: may_read.wait())
        groups = tier.arriving(0, [3, 1, 0, 2])
        assert next(groups) == []
        assert sorted(tier._reads) == [(0, expert) for expert in range(1 + n_spare)]
        may_read.set()
    assert [expert for group in groups for expert in group] == [0, 1, 2, 3]
    assert list(tier.cache.ready(0)) == [3]
    assert len(tier._spare) == n_spare


def test_those_in_memory_come_first_and_misses_in_the_order_of_the_file(open_tier):
    tier = open_tier(4)
    computed(tier, 0, [5, 2])
    groups = [sorted(group) for group in tier.arriving(0, [5, 3, 2, 1])]
    assert groups[0] == [2, 5]
    assert (tier.disk.hits, tier.disk.misses) == (2, 4)
    assert tier.disk.n_bytes == 4 * LAYOUT.block_bytes
    streamed = open_tier(1)
    assert computed(streamed, 0, [4, 0, 3, 1]) == [0, 1, 3, 4]


def test_both_levels_under_random_steps(open_tier):
    """Slots of an accelerator over host memory over disk: bytes right, nothing in use evicted."""
    chosen = random.Random(7)
    for n_ways, n_slots in ((1, 2), (2, 3), (4, 4)):
        tier = reading_ahead(open_tier(n_ways, "LFRU"))
        slots = torch.zeros(n_slots, LAYOUT.block_bytes, dtype=torch.uint8)
        fetcher = HostFetcher(slots, before_copy=lambda _: time.sleep(chosen.random() / 2000))
        tier.copying = fetcher.sources_in_flight
        holds: dict[int, tuple[int, int]] = {}
        for _ in range(60):
            layer = chosen.randrange(N_LAYERS - 1)
            experts = chosen.sample(range(N_EXPERTS), chosen.randint(1, 4))
            tier.read_ahead_later(layer + 1, chosen.sample(range(N_EXPERTS), 2))
            for group in tier.arriving(layer, experts):
                pointers = tier.pointers(layer)
                for expert in group:
                    if chosen.random() < 0.5:
                        slot = chosen.randrange(n_slots)
                        fetcher.fetch(slot, tier.block(layer, expert))
                        holds[slot] = layer, expert
                for expert in group:
                    assert torch.equal(
                        block_at(int(pointers[expert]), LAYOUT.block_bytes), block_of(layer, expert)
                    )
            fetcher.poll()
            if chosen.random() < 0.2:
                assert all(copy.error is None for copy in fetcher.drain())
                for slot, (of_layer, expert) in holds.items():
                    assert torch.equal(slots[slot], block_of(of_layer, expert))
        assert tier.n_ahead_used > 0
        fetcher.close()


def test_a_block_that_a_copy_still_reads_is_not_overwritten(open_tier):
    tier, may_copy = open_tier(1), threading.Event()
    slots = torch.zeros(1, LAYOUT.block_bytes, dtype=torch.uint8)
    fetcher = HostFetcher(slots, before_copy=lambda _: may_copy.wait())
    tier.copying = fetcher.sources_in_flight
    fetcher.fetch(0, tier.block(0, 1))
    threading.Timer(0.05, may_copy.set).start()
    assert computed(tier, 0, [2]) == [2]  # its only way was the copy's until then
    fetcher.drain()
    assert torch.equal(slots[0], block_of(0, 1))
    fetcher.close()


def until(holds: Callable[[], bool]) -> None:
    """Wait for what threads are about to do."""
    while not holds():
        time.sleep(1e-3)


def damaged(tmp_path: Path, change: Callable[[Path, MoeLayer], None]) -> list[MoeLayer]:
    layer = write_layer(tmp_path, 0)
    change(layer.file, layer)
    return [layer]


def flip(path: Path, layer: MoeLayer) -> None:
    with path.open("r+b") as file:
        file.seek(layer.block_offset_bytes(3) + 100)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def zero(path: Path, layer: MoeLayer) -> None:
    """What a hole in the file reads as."""
    with path.open("r+b") as file:
        file.seek(layer.block_offset_bytes(3))
        file.write(bytes(LAYOUT.block_bytes))


@pytest.mark.parametrize("change", [flip, zero])
def test_a_damaged_block_is_never_computed(open_tier, tmp_path, change):
    tier = open_tier(4, of=damaged(tmp_path, change))
    assert sorted(computed(tier, 0, [0, 1])) == [0, 1]
    for _ in range(2):  # and not the second time either
        with pytest.raises(UserError, match=r"is corrupt: the checksum of expert 3 does not match"):
            computed(tier, 0, [3, 4])
    assert sorted(computed(tier, 0, [4, 0])) == [0, 4]


def test_a_block_that_is_damaged_later_is_never_computed_either(open_tier, tmp_path):
    layer = write_layer(tmp_path, 0)
    tier = open_tier(1, of=[layer])
    assert [computed(tier, 0, [expert]) for expert in (3, 0)] == [[3], [0]]
    flip(layer.file, layer)
    with pytest.raises(UserError, match=r"is corrupt: the checksum of expert 3 does not match"):
        computed(tier, 0, [3])


def test_a_file_cut_while_it_is_read_is_told(open_tier, tmp_path):
    layer = write_layer(tmp_path, 0)
    tier = open_tier(3, of=[layer])
    assert computed(tier, 0, [5]) == [5]
    os.truncate(layer.file, layer.block_offset_bytes(2) + 5 * 4096 + 100)
    assert computed(tier, 0, [1, 5]) == [5, 1]
    with pytest.raises(UserError, match=r"is truncated: expert 2 ends \d+ bytes early"):
        computed(tier, 0, [2])


def with_reads(monkeypatch: pytest.MonkeyPatch, before: Callable[..., object]) -> None:
    """Have `before` called with each read's file, buffers and place in the file."""
    preadv = os.preadv

    def read(*arguments: Any) -> int:
        before(*arguments)
        return preadv(*arguments)

    monkeypatch.setattr(block_file.os, "preadv", read)


def test_a_disk_that_fails_is_one_sentence_and_may_come_back(open_tier, monkeypatch):
    tier = open_tier(2)

    def fail(_file: int, _buffers: Any, place: int) -> None:
        if place // 4096 % 3 == 0:  # some piece of the block, and not all of them
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        with_reads(patch, fail)
        with pytest.raises(UserError, match=r"cannot read expert 4 of .*: Input/output error; "):
            computed(tier, 1, [4])
    assert computed(tier, 1, [4]) == [4]


def test_a_slow_disk_is_waited_for(open_tier, monkeypatch):
    with_reads(monkeypatch, lambda *_: time.sleep(0.02))
    tier = open_tier(2)
    assert sorted(computed(tier, 0, [0, 1, 2, 3, 4])) == [0, 1, 2, 3, 4]
    assert tier.disk.wait_s > 0.02


def test_an_interrupt_while_reads_are_in_flight_leaves_all_in_order(open_tier, monkeypatch):
    tier, may_read = open_tier(4), threading.Event()
    with monkeypatch.context() as patch:
        with_reads(patch, lambda *_: may_read.wait())
        groups = tier.arriving(0, [0, 1, 2, 3])
        assert next(groups) == []
        patch.setattr(tier, "_wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(groups)
        threading.Timer(0.02, may_read.set).start()
        tier.recover()
    assert not tier.cache.in_flight()
    assert sorted(computed(tier, 0, [0, 1, 2, 3])) == [0, 1, 2, 3]


class Interruption:
    """While it is entered: a Ctrl-C at the `at`-th line of the product's that this thread runs."""

    PACKAGE = str(Path(block_file.__file__).parents[1])

    def __init__(self, at: float = float("inf")) -> None:
        self.at, self.n_lines = at, 0

    def __enter__(self) -> Interruption:
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.startswith(self.PACKAGE):
            return None
        self.n_lines += event == "line"
        if self.n_lines == self.at and event == "line":
            raise KeyboardInterrupt
        return self._trace


def test_an_interrupt_at_any_line_leaves_all_in_order(open_tier):
    tier, chosen = reading_ahead(open_tier(2, "LFRU")), random.Random(5)
    with Interruption() as counted:
        computed(tier, 0, list(range(4)))
    n_interrupts = 0
    for _ in range(150):
        layer, experts = chosen.randrange(N_LAYERS), chosen.sample(range(N_EXPERTS), 4)
        if layer + 1 < N_LAYERS:
            tier.read_ahead_later(layer + 1, chosen.sample(range(N_EXPERTS), 2))
        try:
            with Interruption(chosen.randrange(1, counted.n_lines)):
                computed(tier, layer, experts)
        except KeyboardInterrupt:
            n_interrupts += 1
            tier.recover()
            assert not tier.cache.in_flight()
            assert len(tier._spare) == 2
        assert sorted(computed(tier, layer, experts)) == sorted(experts)
    assert n_interrupts > 10  # of the others most ended before their line came


def test_a_measurement_that_is_interrupted_leaves_no_read_waiting(open_tier, monkeypatch):
    tier = open_tier(2)
    with monkeypatch.context() as patch:
        patch.setattr(tier._disk._readers, "submit", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tier.measured(lambda: None)
    assert sorted(computed(tier, 0, [0, 1, 2])) == [0, 1, 2]


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_closing_gives_reads_up(layers, monkeypatch):
    """What is under way ends with its piece, and what waits behind it is not begun."""
    tier = DiskTier(layers, [N_EXPERTS] * N_LAYERS, make_policy("LRU"))
    began, may_end = [], threading.Event()
    with_reads(monkeypatch, lambda *_: (began.append(1), may_end.wait()))
    next(tier.arriving(0, list(range(N_EXPERTS))))
    next(tier.arriving(1, list(range(N_EXPERTS))))
    until(lambda: len(began) == N_READERS)

    def end_once_closing() -> None:
        until(lambda: tier._disk._is_closed)
        may_end.set()

    ending = threading.Thread(target=end_once_closing)
    ending.start()
    tier.close()
    ending.join()
    assert len(began) == N_READERS
    assert not any(thread.is_alive() for thread in tier._disk._readers._threads)


def test_where_direct_reads_are_refused_the_bytes_are_the_same(open_tier, monkeypatch):
    opened = os.open

    def refuse(path: Any, flags: int, *more: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return opened(path, flags, *more)

    def no_advice(*_: object) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(block_file.os, "open", refuse)
    tier = open_tier(2)
    assert not tier.is_direct
    assert sorted(computed(tier, 0, [0, 1, 2, 3])) == [0, 1, 2, 3]
    monkeypatch.setattr(block_file.os, "posix_fadvise", no_advice)
    assert sorted(computed(tier, 0, [0, 1, 2, 3])) == [0, 1, 2, 3]


def reading_ahead(tier: DiskTier) -> DiskTier:
    """With routers that name experts 0 and 1, whatever they are given; the trial lets it."""
    tier.read_ahead_with([lambda hidden: torch.tensor([[0, 1]])] * N_LAYERS)
    assert tier.trial is not None
    for _ in range(4):
        tier.trial.record(1.0)
    assert tier.trial.is_first
    return tier


def test_an_idle_disk_reads_ahead_what_the_next_router_chooses(open_tier):
    tier = reading_ahead(open_tier(3))
    computed(tier, 0, [4, 5])
    guess = tier.guess(1, torch.zeros(1, 64))
    tier.read_ahead_later(1, guess.flatten().tolist())
    computed(tier, 0, [4, 5])
    until(lambda: all(read.is_done for read in tier._reads.values()))
    before = tier.disk.misses
    assert sorted(computed(tier, 1, [0, 1])) == [0, 1]
    assert tier.disk.misses == before
    assert (tier.n_ahead, tier.n_ahead_used) == (2, 2)
    assert tier.guess(N_LAYERS, torch.zeros(1, 64)) is None  # there is no such layer


def test_a_miss_gives_up_what_is_read_ahead(open_tier, monkeypatch):
    tier, may_read = reading_ahead(open_tier(2)), threading.Event()
    computed(tier, 0, [4])
    computed(tier, 1, [2, 3])
    with monkeypatch.context() as patch:
        with_reads(patch, lambda *_: may_read.wait())
        tier.read_ahead_later(1, [0, 1])
        computed(tier, 0, [4])
        ahead = list(tier._reads.values())
        assert [read.expert for read in ahead] == [0, 1]
        assert sorted(tier.cache.ready(1)) == [2, 3]  # nobody gave up its place for a guess
        threading.Timer(0.02, may_read.set).start()
        assert sorted(computed(tier, 1, [3, 5])) == [3, 5]
    assert all(read.is_cancelled for read in ahead)
    assert sorted(computed(tier, 1, [0, 1])) == [0, 1]
    assert len(tier._spare) == 2


def test_the_disk_is_measured_beside_what_memory_holds(open_tier):
    tier = open_tier(2)
    computed(tier, 0, [4, 5])
    before = tier.disk.n_bytes, tier._disk.busy_s
    disk = tier.measured(lambda: None)
    assert disk.gbps > 0 <= min(disk.latency_us, disk.resume_us)
    assert (tier.disk.n_bytes, tier._disk.busy_s) == before
    assert computed(tier, 0, [4, 5]) == [4, 5]
    assert tier.disk.misses == 2


def test_what_is_asked_for_goes_before_what_is_read_ahead_in_a_full_queue(open_tier, monkeypatch):
    tier, may_read = open_tier(N_EXPERTS), threading.Event()
    begun: list[int] = []  # the places in the file

    def note(_file: int, _buffers: Any, place: int) -> None:
        begun.append(place)
        may_read.wait()

    with_reads(monkeypatch, note)
    reads = [Read(0, expert, tier.memory.block(0, expert), expert < 5) for expert in range(6)]
    tier._disk.start(reads[0])
    until(lambda: len(begun) == N_READERS)  # all threads are busy
    for read in reads[1:]:
        tier._disk.start(read)
    reads[4].is_ahead = False  # now somebody asks
    reads[3].is_cancelled = True
    tier._disk.start(reads[2])  # once more, as after an interrupt
    may_read.set()
    until(lambda: all(read.is_done for read in reads))
    assert [read.is_whole for read in reads] == [True, True, True, False, True, True]
    experts = [(place - min(begun)) // LAYOUT.block_bytes for place in begun]
    assert 3 not in experts
    assert experts.index(5) < experts.index(1) and experts.index(4) < experts.index(1)
    assert sorted(experts) == sorted([0, 1, 2, 4, 5] * 4)
