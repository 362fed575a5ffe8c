"""The GPU's side of a run, real or emulated: slots, their directory, and the copies into them.

With next-layer prefetch it also guesses: the residual stream changes little from layer to layer, so
the next layer's own router, given this layer's input, names most of the experts it will choose. A
guess is only ever used for fetching ahead; it never changes a result.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from moe_offload.experts.cache import ExpertCache
from moe_offload.experts.costs import CostModel
from moe_offload.experts.disk_tier import DiskTier, Router
from moe_offload.experts.fetcher import Copy, CopyCancelledError, ExpertFetcher
from moe_offload.experts.plan import MissMode, Trial
from moe_offload.experts.slots import GpuExperts
from moe_offload.experts.store import ExpertStore

N_STAGING_SLOTS = 2  # one is computed while the other is filled


@dataclass
class Accelerator:
    """Owns what the dispatcher needs beside the CPU. Driven by the thread of the forward pass.

    Slots beyond the cache's are for staging: experts streamed through once, on demand. `routers`
    has one entry per MoE layer when fetching ahead is on. `quota` is the most background fetches
    of one forward pass.
    """

    store: ExpertStore | DiskTier
    cache: ExpertCache
    gpu: GpuExperts
    fetcher: ExpertFetcher
    quota: int
    miss_policy: Literal["cpu", "fetch", "auto"] = "cpu"
    costs: CostModel | None = None
    routers: Sequence[Router] = ()

    def __post_init__(self) -> None:
        assert self.gpu.n_slots >= self.cache.n_slots + N_STAGING_SLOTS
        self.trial: Trial | None = Trial() if self.miss_policy == "auto" else None
        self.prefetch = PrefetchStats(block_bytes=self.gpu.layout.block_bytes)
        self.failed_copies = 0
        if isinstance(self.store, DiskTier):
            self.store.copying = self.fetcher.sources_in_flight
        self._quota_left = 0
        self._next_staging = 0

    @property
    def mode(self) -> MissMode:
        """How the current step treats a miss."""
        if self.trial is not None:
            return "costs" if self.trial.is_first else "cpu"
        return "fetch" if self.miss_policy == "fetch" else "cpu"

    @property
    def backlog_us(self) -> float:
        """Predicted time until the copies already queued are done."""
        if self.costs is None:
            return 0.0
        return self.fetcher.in_flight * self.costs.copy_us(shared=True)

    def begin_pass(self) -> None:
        """A forward pass begins: background fetches have their whole quota again."""
        self._quota_left = self.quota

    def collect_copies(self) -> None:
        """Tell the directory which copies have ended since the last call."""
        self._note(self.fetcher.poll())

    def recover(self) -> None:
        """After a pass that never ended, such as by a Ctrl-C.

        Work under way that nobody noted has ended then, and no slot awaits a copy that nobody
        started.
        """
        self.gpu.synchronize()
        self.collect_copies()
        awaited = self.fetcher.slots_in_flight()
        for slot in self.cache.in_flight():
            if slot not in awaited:
                self.cache.cancel(slot)

    @contextmanager
    def lending_slots(self) -> Iterator[None]:
        """Inside, anyone may write to the slots, and no layer may run; no copy is under way.

        Afterwards, whatever happened, each slot that was ready holds its expert again: the
        directory, the policy and their counters have seen nothing.
        """
        self._note(self.fetcher.drain())
        try:
            yield
        finally:
            for layer in range(self.cache.n_indexes):
                for expert, slot in self.cache.ready(layer).items():
                    self.gpu.slots[slot].copy_(self.store.block(layer, expert))

    def share(self, layer: int) -> int:
        """How many background fetches `layer` may start in this pass."""
        return self.cache.share(layer, self._background_quota(layer))

    def fetch_background(
        self, layer: int, experts: Sequence[int], at_most: int
    ) -> list[tuple[int, int]]:
        """Start copying `experts` for the tokens to come; returns (expert, slot) pairs.

        `at_most` is what is left of the layer's share.
        """
        pairs = self.cache.admit_most(layer, experts, min(at_most, self._quota_left))
        self._quota_left -= len(pairs)
        for expert, slot in pairs:
            self.fetch(layer, expert, slot)
        return pairs

    def warm(
        self, layer: int, tokens: Sequence[Sequence[int]], waited: Collection[int]
    ) -> dict[int, int]:
        """Give a prompt's last experts slots, expert -> slot, which the caller fills by `fetch`.

        `tokens` is [T][K]; `waited` experts the prompt copies anyway.
        """
        pairs = self.cache.warm(layer, tokens, self._background_quota(layer), waited)
        self._quota_left -= self.cache.warm_charge(pairs, waited)
        return dict(pairs)

    def _background_quota(self, layer: int) -> int:
        """What `layer` may spend of the pass's: nothing where its memory could not be pinned.

        CUDA copies from pageable memory on the calling thread, before the CPU's experts could
        start. What a layer waits for anyway still comes that way.
        """
        is_free = self.gpu.device.type == "cpu" or self.store.is_pinned(layer)
        return self._quota_left if is_free else 0

    def fetch(self, layer: int, expert: int, slot: int) -> None:
        """Start copying one expert into a slot that is its own or a staging slot."""
        self.fetcher.fetch(slot, self.store.block(layer, expert))

    def slot_for_waited(self, layer: int, expert: int, keep: Collection[int] | None) -> int:
        """A slot that holds or will hold `expert`, whose copy is started unless it is on its way.

        In a prompt, `keep` are the experts that have been given slots by `warm`; any other passes
        through a staging slot, which the caller computes from once. In decode it is None, and the
        expert is admitted where its index has a way.
        """
        slot = self.cache.slot_of(layer, expert)
        if slot is not None and (keep is None or expert not in keep):
            return slot
        if keep is None:
            slot = self.cache.admit(layer, expert)
        if slot is None:
            slot = self.cache.n_slots + self._next_staging
            self._next_staging = (self._next_staging + 1) % N_STAGING_SLOTS
        self.fetch(layer, expert, slot)
        return slot

    def guesses(self, layer: int) -> bool:
        """Whether what `layer` will choose is guessed, to fetch it ahead: where it is cached."""
        return layer < min(len(self.routers), self.cache.n_indexes)

    def guess(self, layer: int, hidden: Tensor) -> Tensor | None:
        """The experts that `layer` is expected to choose, int64 [T, K] on hidden's device.

        `hidden` [T, H] is the previous layer's input. None where there is no guessing.
        """
        return self.routers[layer](hidden) if self.guesses(layer) else None

    def fetch_ahead(self, layer: int, guessed: Sequence[int]) -> None:
        """Start copying the `guessed` experts of `layer`.

        Only while no other copy is under way, and never in the place of an expert that is guessed
        itself.
        """
        self.prefetch.guess(layer, guessed)
        self.collect_copies()  # one that has ended since keeps nobody from the bus
        guessed = [expert for expert in guessed if self.store.is_there(layer, expert)]
        if self.fetcher.in_flight or self._background_quota(layer) <= 0:
            return
        self.cache.protect(layer, guessed)
        for expert, slot in self.fetch_background(layer, guessed, self.share(layer)):
            self.prefetch.fetch(slot, layer, expert)
        self.cache.end_step(layer)

    def notes(self) -> list[str]:
        """What was learnt during the run, as lines for the summary."""
        lines = []
        if self.trial is not None:
            lines.append(self.trial.line("miss policy auto", "waiting for copies by cost", "cpu"))
        if self.prefetch.chosen:
            lines.append(
                f"next-layer prefetch: recall {100 * self.prefetch.recall:.1f}%, "
                f"{self.prefetch.fetched} experts fetched, "
                f"{self.prefetch.wasted_bytes / 1e9:.3f} GB of it wasted"
            )
        if self.failed_copies:
            lines.append(f"{self.failed_copies} copies failed; the CPU computed those experts")
        return lines

    def close(self) -> None:
        """End all copies and computations; slots are not to be used afterwards."""
        self.fetcher.close()
        self.gpu.close()

    def _note(self, ended: Sequence[Copy]) -> None:
        """Tell the directory of copies that have ended; the user, of the first that failed."""
        for copy in ended:
            if copy.slot < self.cache.n_slots:
                is_there = copy.error is None
                (self.cache.mark_ready if is_there else self.cache.cancel)(copy.slot)
            if not isinstance(copy.error, CopyCancelledError | None):
                if self.failed_copies == 0:
                    print(
                        f"warning: a copy to the accelerator failed ({copy.error}); the CPU "
                        "computes such experts instead, results are not affected",
                        file=sys.stderr,
                    )
                self.failed_copies += 1


@dataclass
class PrefetchStats:
    """What fetching ahead was worth.

    `recalled` of `chosen` experts had been guessed; of `fetched` copies for a guess, `used` were
    hit before they were evicted.
    """

    block_bytes: int
    chosen: int = 0
    recalled: int = 0
    fetched: int = 0
    used: int = 0
    _unused_slots: dict[int, tuple[int, int]] = field(default_factory=dict)
    _guessed: dict[int, Sequence[int]] = field(default_factory=dict)

    @property
    def recall(self) -> float:
        return self.recalled / max(self.chosen, 1)

    @property
    def wasted_bytes(self) -> int:
        return (self.fetched - self.used) * self.block_bytes

    def guess(self, layer: int, experts: Sequence[int]) -> None:
        self._guessed[layer] = experts

    def fetch(self, slot: int, layer: int, expert: int) -> None:
        """A guessed expert's copy into `slot` began."""
        self.fetched += 1
        self._unused_slots[slot] = (layer, expert)

    def observe(self, layer: int, slots: Mapping[int, int], chosen: Collection[int]) -> None:
        """The layer's real choice: `slots` maps those that hit to their slots."""
        guessed = self._guessed.pop(layer, None)
        if guessed is not None:
            self.chosen += len(chosen)
            self.recalled += len(set(guessed).intersection(chosen))
        for expert, slot in slots.items():
            if self._unused_slots.get(slot) == (layer, expert):
                self.used += 1
                del self._unused_slots[slot]
