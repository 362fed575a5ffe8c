"""A clock for replayed routing: CPU, copies and GPU overlap as they do in the dispatcher.

Each layer passes in the dispatcher's order: dense work on the GPU; hits launched, copies queued,
misses on the CPU, all at once; the layer ends when both sides have. Copies go one at a time in
the order they were queued and carry on across layers and tokens. While the CPU computes and the
bus copies, both are slower by the cost model's shared speeds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from cost_model import CostModel


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
        self._slowdown = costs.copy_us(shared=True) / costs.copy_us(shared=False)

    def arrived(self) -> list[int]:
        """The slots whose copies ended since the last call, in order."""
        slots, self._arrived = self._arrived, []
        return slots

    def pass_dense(self) -> None:
        """Let the attention and routing of one layer pass."""
        self.busy.gpu_us += self.costs.dense_us_per_layer
        self._pass_alone(self.costs.dense_us_per_layer)

    def pass_experts(
        self, gpu_experts: int, cpu_experts: int, slots: Sequence[int], n_tokens: int = 1
    ) -> None:
        """Let one layer's experts pass.

        `gpu_experts` hits and `cpu_experts` misses have `n_tokens` each; copies into `slots` begin
        with them. Ends when both sides have; copies may be left over.
        """
        costs = self.costs
        cpu_work_us, gpu_us = costs.compute_us(
            costs.cpu.us(cpu_experts, cpu_experts * n_tokens),
            costs.gpu.us(gpu_experts, gpu_experts * n_tokens),
        )
        self.busy.gpu_us += gpu_us
        for slot in slots:
            self._queue.append([slot, costs.copy_us(shared=False)])
        cpu_us = self._pass_cpu(cpu_work_us)
        if gpu_us > cpu_us:
            self._pass_alone(gpu_us - cpu_us)

    def pass_prefill(self, counts: Sequence[int], ready: Sequence[int]) -> tuple[int, ...]:
        """Let one layer of a prompt pass: `counts[e]` tokens on expert e, `ready` ones cached.

        Returns the experts that it copied to the GPU.
        """
        split = self.costs.split_prefill(counts, ready)
        self.busy.cpu_us += split.cpu_us
        self.busy.gpu_us += self.costs.dense_us_per_layer + self.costs.gpu.us(
            len(split.gpu_experts), sum(counts[e] for e in split.gpu_experts)
        )
        self.busy.copy_us += split.n_copies * self.costs.copy_us(shared=False)
        self.now_us += self.costs.dense_us_per_layer + split.us
        return tuple(expert for expert in split.gpu_experts if expert not in ready)

    def queue(self, slots: Sequence[int]) -> None:
        """Queue copies that nothing waits for, such as the warm-up after a prompt's layer."""
        for slot in slots:
            self._queue.append([slot, self.costs.copy_us(shared=False)])

    def _pass_alone(self, us: float) -> None:
        """Let `us` pass in which the copies have the bus and the DRAM to themselves."""
        self.now_us += us
        while self._queue and us > 0:
            copy = self._queue[0]
            spent_us = min(us, copy[1])
            self.busy.copy_us += spent_us
            us -= spent_us
            self._spend(copy, spent_us)

    def _pass_cpu(self, work_us: float) -> float:
        """Let CPU work of `work_us` (on a quiet machine) pass; returns how long it really took."""
        began_us = self.now_us
        factor = self.costs.cpu_shared_factor
        while self._queue and work_us > 0:
            copy = self._queue[0]
            shared_us = min(work_us * factor, copy[1] * self._slowdown)
            self.now_us += shared_us
            self.busy.copy_us += shared_us
            work_us -= shared_us / factor
            self._spend(copy, shared_us / self._slowdown)
            if work_us < 1e-6:
                work_us = 0.0
        self.now_us += work_us
        self.busy.cpu_us += self.now_us - began_us
        return self.now_us - began_us

    def _spend(self, copy: list[float], us: float) -> None:
        copy[1] -= us
        if copy[1] < 1e-6:
            self._queue.popleft()
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
    gpu_us = hits * costs.gpu.expert_us
    cpu_us = costs.cpu.expert_us + costs.cpu.token_us
    dense_us = n_layers * costs.dense_us_per_layer
    shared_us = (dense_us + misses * cpu_us) / (1 + cpu_us / costs.copy_us(shared=False))
    return max(dense_us + gpu_us, shared_us)
