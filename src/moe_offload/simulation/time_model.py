"""A clock for replayed routing: CPU, copies and GPU overlap as they do in the dispatcher.

Each layer passes in the dispatcher's order: dense work on the GPU; hits launched, copies queued,
misses on the CPU, all at once; the layer ends when both sides have. Copies go one at a time in
the order they were queued and carry on across layers and tokens. While the CPU computes and the
bus copies, both are slower by the cost model's shared speeds; with an emulated accelerator, which
computes on the CPU's own cores, so are its experts and the dense part.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from moe_offload.experts.cost_model import CostModel, PrefillSplit

_STAGING = -1  # a slot of no cache: the copy is waited for and used once
_NOTHING_US = 1e-6


@dataclass
class Busy:
    """How long each part has worked, in us."""

    cpu_us: float = 0.0
    gpu_us: float = 0.0
    copy_us: float = 0.0


class Timeline:
    """The modelled time of one run, and which copies have arrived by then."""

    def __init__(self, costs: CostModel) -> None:
        self.costs = costs
        self.now_us = 0.0
        self.busy = Busy()
        self._queue: deque[list[float]] = deque()  # [slot, us left at full speed]
        self._arrived: list[int] = []
        self._waited = 0  # of the queue's first copies, how many a prompt's layer waits for
        self._slowdown = costs.copy_us(shared=True) / costs.copy_us(shared=False)

    def arrived(self) -> list[int]:
        """The slots whose copies ended since the last call, in order."""
        slots, self._arrived = self._arrived, []
        return slots

    def pass_dense(self) -> None:
        """Let the attention and routing of one layer pass."""
        costs = self.costs
        factor = costs.dense_shared_factor
        self.busy.gpu_us += self._pass(costs.dense_us_per_layer, factor, factor > 1)

    def pass_experts(
        self, gpu_experts: int, cpu_experts: int, slots: Sequence[int], n_tokens: int = 1
    ) -> None:
        """Let one layer's experts pass.

        `gpu_experts` hits and `cpu_experts` misses have `n_tokens` each; copies into `slots` begin
        with them. Ends when both sides have; copies may be left over.
        """
        costs = self.costs
        self.queue(slots)
        self._pass_both(
            costs.cpu.us(cpu_experts, cpu_experts * n_tokens),
            costs.gpu.us(gpu_experts, gpu_experts * n_tokens),
        )

    def split_prefill(self, counts: Sequence[int], ready: Collection[int]) -> PrefillSplit:
        """Share a prompt layer's experts as the dispatcher does, behind the copies queued by now.

        `counts[e]` is the number of tokens on expert e; `ready` experts are cached. The backlog is
        the dispatcher's: it knows how many copies have not ended, not how far the first has come.
        """
        backlog_us = len(self._queue) * self.costs.copy_us(shared=True)
        return self.costs.split_prefill(counts, ready, backlog_us)

    def pass_prefill(
        self,
        split: PrefillSplit,
        counts: Sequence[int],
        warmed: Sequence[tuple[int, int]] = (),
        in_flight: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        """Let one layer's experts of a prompt pass as `split` shares them.

        `counts[e]` is the number of tokens on expert e; the experts of `warmed`, (expert, slot),
        are to be cached; `in_flight` maps those whose copies are queued by now to their slots. As
        in the dispatcher, what the layer waits for is copied first, an expert that is to be cached
        into its slot, any other into staging; one that is in flight is not copied again.
        """
        costs = self.costs
        slot_of = dict(warmed)
        waited = split.gpu_experts[len(split.gpu_experts) - split.n_copies :]
        awaited = {in_flight[e] for e in waited if e in in_flight}
        places = [place for place, (slot, _) in enumerate(self._queue, 1) if slot in awaited]
        copied = [slot_of.get(e, _STAGING) for e in waited if e not in in_flight]
        self.queue(copied)
        self._waited = len(self._queue) if copied else max(places, default=0)
        self.queue([slot for e, slot in warmed if e not in waited])
        last = split.gpu_experts[-1:] if waited else ()  # its arithmetic, no copy hides
        on_gpu = [counts[e] for e in split.gpu_experts if e not in last]
        self._pass_both(
            costs.cpu_us([counts[e] for e in split.cpu_experts]), costs.gpu.us_of(on_gpu)
        )
        while self._waited:
            self._pass_copy(self._queue[0][1], 1.0)
        self._pass_both(0.0, costs.gpu.us_of([counts[e] for e in last]))

    def queue(self, slots: Sequence[int]) -> None:
        """Queue copies that nothing waits for, such as the warm-up after a prompt's layer."""
        for slot in slots:
            self._queue.append([slot, self.costs.copy_us(shared=False)])

    def _pass_both(self, cpu_work_us: float, gpu_work_us: float) -> None:
        """Let a layer's work pass, each side's time given for a quiet machine."""
        costs = self.costs
        cpu_us, gpu_us = costs.compute_us(cpu_work_us, gpu_work_us)
        began_us = self.now_us
        cpu_us, gpu_us = self._pass_together(cpu_us, gpu_us)
        together_us = self.now_us - began_us
        cpu_us = self._pass(cpu_us, costs.cpu_shared_factor, slows_copies=True)
        factor = costs.gpu_shared_factor
        gpu_us = self._pass(gpu_us, factor, slows_copies=factor > 1)
        self.busy.cpu_us += together_us + cpu_us
        self.busy.gpu_us += together_us + gpu_us

    def _pass_together(self, cpu_us: float, gpu_us: float) -> tuple[float, float]:
        """Let both sides work until one has ended; returns what is left of each."""
        cpu_factor, gpu_factor = self.costs.together_factors
        while self._queue and min(cpu_us, gpu_us) > _NOTHING_US:
            copy_us = self._queue[0][1] * self._slowdown
            us = min(cpu_us * cpu_factor, gpu_us * gpu_factor, copy_us)
            self._pass_copy(us / self._slowdown, self._slowdown)
            cpu_us -= us / cpu_factor
            gpu_us -= us / gpu_factor
        us = max(0.0, min(cpu_us, gpu_us))
        self.now_us += us
        return cpu_us - us, gpu_us - us

    def _pass(self, work_us: float, factor: float, slows_copies: bool) -> float:
        """Let work pass that takes `work_us` alone and `factor` times that beside a copy.

        Returns how long it really took.
        """
        began_us = self.now_us
        copy_factor = self._slowdown if slows_copies else 1.0
        while self._queue and work_us > _NOTHING_US:
            us = min(work_us * factor, self._queue[0][1] * copy_factor)
            self._pass_copy(us / copy_factor, copy_factor)
            work_us -= us / factor
        self.now_us += max(work_us, 0.0)
        return self.now_us - began_us

    def _pass_copy(self, us: float, factor: float) -> None:
        """Let the first copy advance by `us` of its time alone, which takes `factor` times that."""
        copy = self._queue[0]
        self.now_us += us * factor
        self.busy.copy_us += us * factor
        copy[1] -= us
        if copy[1] < _NOTHING_US:
            self._queue.popleft()
            self._waited = max(0, self._waited - 1)
            if copy[0] != _STAGING:
                self._arrived.append(int(copy[0]))


def prefetch_step_us(costs: CostModel, n_layers: int, top_k: int) -> float:
    """A decode step that prefetches every layer's experts, without a cache, in us.

    The next layer's experts are known (Pre-gated MoE) and are copied while this layer computes.
    """
    compute_us = costs.dense_us_per_layer + costs.gpu.us(top_k, top_k)
    return n_layers * max(top_k * costs.copy_us(shared=False), compute_us)


def bound_us(costs: CostModel, n_layers: int, hits: float, misses: float) -> float:
    """The least time of a decode step, in us: perfect prediction and full overlap.

    `hits` and `misses` are the chosen experts of one step, over all its layers, that an optimal
    cache has and lacks. The misses are shared between CPU and bus so that both end together, the
    copies begin as early as they like, and nothing slows anything else.
    """
    gpu_us, cpu_us = hits * costs.gpu.one_us(1), costs.cpu.one_us(1)
    dense_us = n_layers * costs.dense_us_per_layer
    shared_us = (dense_us + misses * cpu_us) / (1 + cpu_us / costs.copy_us(shared=False))
    return max(dense_us + gpu_us, shared_us)
