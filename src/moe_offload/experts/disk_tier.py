"""Experts that outgrow host memory: it caches them over the prepared folder on disk.

The GPU's cache one level down: the same directory and policies, an index for every layer, as many
ways as the memory allows. A layer's experts are computed as they come: those in memory at once,
while reads of the others are in flight, several at a time.

    for group in tier.arriving(layer, experts):  # each expert once; starts the reads
        compute(group)                           # its blocks stay until the next group

No expert is evicted while it is computed, copied to the accelerator or read from disk.

Some places belong to no layer. What finds no way free, since they are still being computed, is read
into one of these, and the place becomes its way's as soon as that is free, in exchange for the old.

In decode the disk may read ahead into such places, behind all that a layer itself needs: what the
next layer's router chooses, given this layer's input. What that layer does not ask for is given up,
so no expert is evicted for a guess. The first steps try whether it pays (`plan.Trial`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from moe_offload.checkpoint.prepared import MoeLayer
from moe_offload.experts.cache import ExpertCache, ReplacementPolicy
from moe_offload.experts.costs import DiskCost
from moe_offload.experts.disk_reads import DiskReads, Read
from moe_offload.experts.plan import Trial
from moe_offload.experts.store import DiskCounts, ExpertStore
from moe_offload.kernels.bindings import CpuKernels

Router = Callable[[Tensor], Tensor]  # hidden [T, H] -> ids int64 [T, K]

_COPY_WAIT_S: Final = 1e-4  # between looks whether a copy has ended that keeps the last way


class DiskTier:
    """Host memory for `ways` experts of each layer, over their files; close it in the end.

    `n_spare` more have room between layers, where all blocks are of one size.

    Takes an `ExpertStore`'s place. One thread drives it, as it does the model; threads of its own
    read, and check what they read with `kernels`. `copying` gives the addresses that copies to the
    accelerator still read from. UserError, from whatever waits for an expert, when its block cannot
    be read.
    """

    def __init__(
        self,
        layers: Sequence[MoeLayer],
        ways: Sequence[int],
        policy: ReplacementPolicy,
        kernels: CpuKernels | None = None,
        n_spare: int = 0,
    ) -> None:
        self.layouts = tuple(layer.layout for layer in layers)
        self.n_experts = tuple(layer.n_experts for layer in layers)
        self.total_bytes = sum(one.n_experts * one.layout.block_bytes for one in layers)
        self.memory = ExpertStore(self.layouts, ways)
        self.cache = ExpertCache(len(layers), max(ways), policy, ways=ways)
        self.disk = DiskCounts()
        self.copying: Callable[[], Collection[int]] = tuple
        self.routers: Sequence[Router] = ()  # of all layers, where the tier may read ahead
        self.trial: Trial | None = None  # of doing so
        self.n_ahead = self.n_ahead_used = 0
        self._guess: tuple[int, Sequence[int]] = -1, ()
        self._unused: set[tuple[int, int]] = set()  # read ahead and not asked for yet
        self._addresses = [torch.zeros(n, dtype=torch.int64) for n in self.n_experts]
        self._reads: dict[tuple[int, int], Read] = {}  # under way, by layer and expert
        self._arrived: dict[tuple[int, int], Tensor] = {}  # whole, in places that are no way's
        self._failed: dict[tuple[int, int], Exception] = {}
        self._has_ended = threading.Event()  # a read, since somebody looked
        self.device = layers[0].file.stat().st_dev  # the number of the disk
        self._disk = DiskReads(layers, self._has_ended, kernels)
        is_one_size = len({layout.block_bytes for layout in self.layouts}) == 1
        between = [n_spare] if n_spare and is_one_size else []
        self._between = ExpertStore(self.layouts[: len(between)], between)
        for store in (self.memory, self._between):
            for layer in range(store.n_layers):
                store.blocks(layer).zero_()  # all is had now, not in the middle of an answer
        self._spare = _blocks(self._between)
        self._place: dict[int, Tensor] = {  # of each slot
            layer * self.cache.n_ways + way: block
            for layer in range(self.n_layers)
            for way, block in enumerate(self.memory.blocks(layer))
        }

    @property
    def n_layers(self) -> int:
        return len(self.layouts)

    @property
    def is_direct(self) -> bool:
        """Whether reads go past the page cache."""
        return self._disk.is_direct

    def is_pinned(self, layer: int) -> bool:
        """Whether a GPU copies this layer's blocks without the host's help."""
        return self.memory.is_pinned(layer)

    def pin(self) -> str | None:
        """Register the memory with CUDA; returns a line for the user when it was refused."""
        refused = self.memory.pin() or self._between.pin()
        if refused:  # every layer keeps its own places, pinned or not
            self._spare.clear()
        return refused

    def pointers(self, layer: int) -> Tensor:
        """The addresses of one layer's blocks, int64 [E]; right for those of the latest group."""
        return self._addresses[layer]

    def is_there(self, layer: int, expert: int) -> bool:
        """Whether the expert is in memory."""
        self._collect()
        return expert in self.cache.ready(layer)

    def block(self, layer: int, expert: int) -> Tensor:
        """The block of one expert, a uint8 [block_bytes] view: valid until another is asked for.

        While a copy reads it, it stays.
        """
        slot = self.cache.slot_of(layer, expert) if self.is_there(layer, expert) else None
        if slot is None:
            for _ in self.arriving(layer, [expert]):
                slot = self.cache.slot_of(layer, expert)
        assert slot is not None
        return self._place[slot]

    def read_ahead_with(self, routers: Sequence[Router]) -> None:
        """Read ahead from now on where it pays; the layers' routers give ids [T, K] for [T, H]."""
        self.routers, self.trial = routers, Trial()

    def guess(self, layer: int, hidden: Tensor) -> Tensor | None:
        """What `layer` is expected to choose, given the layer before it `hidden` [T, H].

        None where nothing is to be read ahead.
        """
        if self.trial is None or not self.trial.is_first or layer >= len(self.routers):
            return None
        return self.routers[layer](hidden)

    def read_ahead_later(self, layer: int, experts: Sequence[int]) -> None:
        """Read these behind what the layer before `layer` needs."""
        if self.trial is not None and self.trial.is_first:
            self._guess = layer, experts

    def arriving(self, layer: int, experts: Sequence[int]) -> Iterator[list[int]]:
        """Groups of `experts` as they are in memory, until each has been in one.

        The first comes at once. A group stays in memory until the next is asked for; it is empty
        where nothing has come since the last. Misses are read in the file's order. While some of
        them wait for a way, an expert at a time is given out, so that its way is free for the next
        as soon as can be.
        """
        self._collect()
        self._failed.clear()  # of a layer that did not come to its end, as are marks of its step
        self.cache.end_step(layer)
        self._note_use(layer, experts)
        slots = self.cache.lookup(layer, experts)
        there = [expert for expert, slot in zip(experts, slots, strict=True) if slot >= 0]
        awaited = sorted(expert for expert, slot in zip(experts, slots, strict=True) if slot < 0)
        n_missed = sum((layer, expert) not in self._arrived for expert in awaited)
        self.disk.hits += len(experts) - n_missed
        self.disk.misses += n_missed
        while True:
            self.cache.protect(layer, awaited)
            has_way = self._start(layer, awaited)
            if awaited:
                ready = self.cache.ready(layer)
                arrived = [expert for expert in awaited if expert in ready]
                self.cache.protect(layer, arrived)
                there = there + arrived
                awaited = [expert for expert in awaited if expert not in arrived]
            group = there if has_way else there[:1]
            yield group
            there = there[len(group) :]
            self.cache.end_step(layer)
            self.cache.protect(layer, there)
            if not (there or awaited):
                return
            if not there:
                self._wait(layer, awaited)
            self._collect()
            for expert in awaited:
                if error := self._failed.pop((layer, expert), None):
                    raise error

    def warm(self, layer: int, experts: Sequence[int]) -> None:
        """Fill a layer's ways with the first of `experts`, which are the most wanted.

        To the policy each has then been used twice, the most wanted last.
        """
        wanted = experts[: len(self.memory.blocks(layer))]
        for _ in self.arriving(layer, wanted):
            pass
        self.cache.lookup(layer, wanted[::-1])
        self.cache.end_step(layer)

    def measured(self, compute: Callable[[], None]) -> DiskCost:
        """What reads of experts cost, one alone and several in flight: `DiskReads.measured`."""
        return self._disk.measured(compute)

    def notes(self) -> list[str]:
        """What was learnt during the run, as lines for the summary."""
        lines = []
        if self.disk.busy_s:
            gbps = self.disk.n_bytes / self.disk.busy_s / 1e9
            lines.append(f"disk: {gbps:.2f} GB/s while experts were read, {self.disk.busy_s:.2f} s")
        if self.trial is not None:
            lines.append(self.trial.line("reading ahead from disk", "with it", "without"))
        if self.n_ahead:
            lines.append(f"experts read ahead: {self.n_ahead}, {self.n_ahead_used} of them used")
        return lines

    def recover(self) -> None:
        """After a pass that never ended, such as by a Ctrl-C: no read is under way then."""
        for read in self._reads.values():
            read.is_cancelled = True
            self._disk.start(read)  # an interrupt may have come before: else it is never done
        self._collect()
        while self._reads:
            self._has_ended.wait()
            self._has_ended.clear()
            self._collect()
        for slot in self.cache.in_flight():  # admitted, and nobody read for it
            self.cache.cancel(slot)
        self._arrived.clear()
        used = {place.data_ptr() for place in self._place.values()}
        places = [*_blocks(self.memory), *_blocks(self._between)]
        self._spare = [place for place in places if place.data_ptr() not in used]

    def close(self) -> None:
        """End all reads and give files and pinned memory back."""
        self._disk.close()
        self.memory.close()
        self._between.close()

    def _start(self, layer: int, awaited: Sequence[int]) -> bool:
        """Start reads of all that have a place to go to; whether each has a way of its own."""
        waiting = [expert for expert in awaited if self.cache.slot_of(layer, expert) is None]
        if waiting:
            self._protect_copied(layer)
        n_admitted = 0
        while n_admitted < len(waiting) and self._admit(layer, waiting[n_admitted]):
            n_admitted += 1
        if all(self._read_between(layer, expert, False) for expert in waiting[n_admitted:]):
            self._read_ahead(layer + 1)
        return n_admitted == len(waiting)

    def _admit(self, layer: int, expert: int) -> bool:
        """Give an expert a way; False where none is free. It is read there, or was elsewhere."""
        slot = self.cache.admit(layer, expert)
        if slot is None:
            return False
        before, read = self._place[slot], self._reads.get((layer, expert))
        arrived = self._arrived.get((layer, expert))
        place = read.out if read is not None else before if arrived is None else arrived
        # In this order, so that `recover` makes good whatever an interrupt leaves half done.
        self._addresses[layer][expert] = place.data_ptr()
        self._place[slot] = place
        if place is not before:
            self._spare.append(before)
        elif read is None:
            self._read(layer, expert, place, False)
        if arrived is not None:
            self.cache.protect(layer, [expert])  # until it has been given out
            self.cache.mark_ready(slot)
            del self._arrived[layer, expert]
        return True

    def _read_between(self, layer: int, expert: int, is_ahead: bool) -> bool:
        """Read an expert that has no way into a place that is no way's; False where none is."""
        if (layer, expert) in self._reads or (layer, expert) in self._arrived:
            return True
        if not self._spare:
            return False
        self._read(layer, expert, self._spare.pop(), is_ahead)
        return True

    def _read(self, layer: int, expert: int, place: Tensor, is_ahead: bool) -> None:
        read = self._reads[layer, expert] = Read(layer, expert, place, is_ahead)
        self._disk.start(read)

    def _read_ahead(self, layer: int) -> None:
        """Start reading what was guessed of `layer` and is not there."""
        (of_layer, experts), self._guess = self._guess, (-1, ())
        if of_layer != layer:
            return
        for expert in sorted(experts):
            if not self._spare:
                return
            if self.cache.slot_of(layer, expert) is None and (layer, expert) not in self._reads:
                self._read(layer, expert, self._spare.pop(), True)
                self.n_ahead += 1
                self._unused.add((layer, expert))

    def _note_use(self, layer: int, experts: Sequence[int]) -> None:
        """A layer asks: what has no way, such as what was read ahead, was worth it or not."""
        if not (self._reads or self._arrived):
            return
        asked = {(layer, expert) for expert in experts}
        self.n_ahead_used += len(asked & self._unused)
        self._unused.clear()
        for key in self._arrived.keys() - asked:
            self._spare.append(self._arrived.pop(key))
        for key, read in self._reads.items():
            if key in asked:
                read.is_ahead = False
            elif self.cache.slot_of(*key) is None:
                read.is_cancelled = True

    def _protect_copied(self, layer: int) -> None:
        """Keep what a copy still reads from being a victim until the layer's step ends."""
        if copied := set(self.copying()):
            ready = self.cache.ready(layer).items()
            kept = [e for e, slot in ready if self._place[slot].data_ptr() in copied]
            self.cache.protect(layer, kept)

    def _collect(self) -> None:
        """Take note of the reads that have ended since the last call."""
        for key, read in list(self._reads.items()):
            if not read.is_done:
                continue
            del self._reads[key]
            self.disk.busy_s = self._disk.busy_s
            slot = self.cache.slot_of(*key)
            has_way = slot is not None and self._place[slot] is read.out
            if read.is_whole:
                self.disk.n_bytes += read.out.numel()
            # Given up, or asked by nobody: whoever asks reads it again.
            elif read.error is not None and not (read.is_cancelled or read.is_ahead):
                self._failed[key] = read.error
            if slot is not None and has_way:
                (self.cache.mark_ready if read.is_whole else self.cache.cancel)(slot)
            elif read.is_whole and not read.is_cancelled:
                self._arrived[key] = read.out
            else:
                self._spare.append(read.out)

    def _wait(self, layer: int, awaited: Sequence[int]) -> None:
        """Until a read may have ended or, where there is none, a copy that keeps the last way."""
        began_s = time.perf_counter()
        if any((layer, expert) in self._reads for expert in awaited):
            self._has_ended.wait()
            self._has_ended.clear()
        else:
            time.sleep(_COPY_WAIT_S)
        self.disk.wait_s += time.perf_counter() - began_s


def _blocks(store: ExpertStore) -> list[Tensor]:
    return [block for layer in range(store.n_layers) for block in store.blocks(layer)]
