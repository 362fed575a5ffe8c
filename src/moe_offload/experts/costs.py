"""What a layer's experts cost on the CPU, on the GPU and on the bus between them.

Each is measured on this machine (`calibration`) or computed from a hardware file (`machine_file`);
nothing here knows a constant of its own. The predictions overlap the sides as the dispatcher does:
hits on the GPU, misses on the CPU and copies on the bus, at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

_NO_TIME_US = 1e12  # eleven days: no call takes as long


@dataclass(frozen=True)
class SideCost:
    """One side's time for a call over some experts: `call_us`, and each expert's by its tokens.

    An expert with n tokens takes `expert_us + token_us * n`: reading its weights, and arithmetic.
    Few tokens may cost another sum, for arithmetic hides behind the reading and kernels change with
    n: `few` then holds measured (tokens, us) of one expert, from one token on, and the cost is the
    broken line through them; from the last of them on the straight one goes on (its `expert_us`, at
    no token, is then only where that line begins, and may be negative). All in microseconds.
    """

    call_us: float
    expert_us: float
    token_us: float
    few: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        times_us = (self.call_us, self.token_us, *(us for _, us in self.few))
        if not all(0 <= us < _NO_TIME_US for us in times_us) or math.isnan(self.expert_us):
            raise ValueError(f"times that no machine takes: {self}")

    def one_us(self, n_tokens: float) -> float:
        """Return what one expert with `n_tokens` adds to a call, in us."""
        if n_tokens == 1 and self.few:  # all that decode asks, often
            return self.few[0][1]
        for (tokens, us), (more_tokens, more_us) in pairwise(self.few):
            if n_tokens < more_tokens:
                return us + (more_us - us) * (n_tokens - tokens) / (more_tokens - tokens)
        return self.expert_us + self.token_us * n_tokens

    def us(self, n_experts: int, n_tokens: int) -> float:
        """Return the time of one call in us; `n_tokens`, over all experts, are spread evenly."""
        if not n_experts:
            return 0.0
        return self.call_us + n_experts * self.one_us(n_tokens / n_experts)

    def us_of(self, counts: Sequence[int]) -> float:
        """Return the time of one call over experts with so many tokens each, in us."""
        return self.call_us + sum(map(self.one_us, counts)) if counts else 0.0


@dataclass(frozen=True)
class DiskCost:
    """What reads of whole experts reach, several in flight, and how long the first one takes.

    `resume_us`: how much longer the experts after a wait for the disk take, on threads that rested.
    """

    gbps: float
    latency_us: float
    resume_us: float = 0.0

    def __post_init__(self) -> None:
        times_us = self.latency_us, self.resume_us
        if not (0 < self.gbps < float("inf") and all(0 <= us < _NO_TIME_US for us in times_us)):
            raise ValueError(f"a disk that no machine has: {self}")

    def us(self, n_bytes: float) -> float:
        """Return the time to read so many bytes, in us."""
        return self.latency_us + n_bytes / self.gbps / 1e3 if n_bytes else 0.0


@dataclass(frozen=True)
class CostModel:
    """The measured costs of one machine for one model's experts.

    `copy_call_us` is the fixed cost of a host-to-device copy; `copy_gbps` its speed alone and
    `copy_gbps_shared` while the CPU computes experts; `cpu_shared_factor` (>= 1) how many times
    longer the CPU takes while a copy runs: both read the same DRAM. `block_bytes` is one expert;
    `dense_us_per_layer` everything of a decode layer that is not experts, and `step_us` what a
    decode step takes once, however many layers it has: the head and all else around them.

    `sum_wait_us` is how much later the CPU's sum is on the GPU while a copy is under way.

    `cpu_many` is what an expert with `cpu_many_tokens` tokens or more costs on the CPU where
    another way to compute it is faster from there on; None where there is none. `disk` is known
    where experts outgrow host memory.
    """

    cpu: SideCost
    gpu: SideCost
    copy_call_us: float
    copy_gbps: float
    copy_gbps_shared: float
    cpu_shared_factor: float
    block_bytes: int
    dense_us_per_layer: float
    cpu_many: SideCost | None = None
    cpu_many_tokens: int = 0
    step_us: float = 0.0
    disk: DiskCost | None = None
    sum_wait_us: float = 0.0

    def __post_init__(self) -> None:
        speeds = self.copy_gbps, self.copy_gbps_shared
        times_us = (
            self.copy_call_us, self.dense_us_per_layer, self.step_us, self.sum_wait_us,
        )  # fmt: skip
        if not (
            all(0 < gbps < float("inf") for gbps in speeds)
            and all(0 <= us < _NO_TIME_US for us in times_us)
            and 1 <= self.cpu_shared_factor < float("inf")
            and self.block_bytes > 0
        ):
            raise ValueError(f"costs that no machine has: {self}")

    def cpu_us(self, counts: Sequence[int]) -> float:
        """Return the time of the CPU's call over experts with so many tokens each, in us."""
        return self._cpu_left_us(sorted(counts, reverse=True))[0]

    def _cpu_left_us(self, counts: Sequence[int]) -> list[float]:
        """The CPU's time for all experts, for all but the first, and so on to none.

        `counts` are their tokens, descending.
        """
        left_us = [0.0]
        called = None  # which way to compute has been begun
        for n in reversed(counts):
            side = self.cpu
            if self.cpu_many is not None and n >= self.cpu_many_tokens:
                side = self.cpu_many
            call_us = 0.0 if side is called else side.call_us
            left_us.append(left_us[-1] + call_us + side.one_us(n))
            called = side
        return left_us[::-1]

    def copy_us(self, shared: bool) -> float:
        """Return the time to copy one expert in us; `shared`: while the CPU computes experts."""
        gbps = self.copy_gbps_shared if shared else self.copy_gbps
        return self.copy_call_us + self.block_bytes / gbps / 1e3

    def with_reads_us(self, experts_us: float, n_reads: int) -> float:
        """Return what a layer's experts take, us, where `n_reads` of them come from disk.

        `experts_us` is what they take from memory. Each is computed as it arrives: the last, alone.
        """
        if not n_reads or self.disk is None:
            return experts_us
        read_us = self.disk.us(n_reads * self.block_bytes) + self.cpu.us(1, 1)
        return max(experts_us, read_us) + self.disk.resume_us

    def overlap_us(self, cpu_us: float, n_copies: float) -> tuple[float, float]:
        """Return when CPU work and copies that begin together each end, in us.

        `cpu_us` is the work's time on a quiet machine. Both are slower while both run, and each
        has its full speed again when the other has ended.
        """
        if not cpu_us or not n_copies:
            return cpu_us, n_copies * self.copy_us(shared=False)
        copies_us = n_copies * self.copy_us(shared=True)
        slow_us = cpu_us * self.cpu_shared_factor
        if copies_us <= slow_us:
            return cpu_us + copies_us * (1 - 1 / self.cpu_shared_factor), copies_us
        left = (copies_us - slow_us) / self.copy_us(shared=True)
        return slow_us, slow_us + left * self.copy_us(shared=False)

    def decode_layer_us(
        self, n_hits: int, n_misses: int, copying: bool, n_waited: int = 0, n_reads: int = 0
    ) -> float:
        """Return one decode layer in us: hits on the GPU while the CPU computes the misses.

        `copying`: background copies keep the bus busy all the while. `n_waited` further misses
        are computed on the GPU, each by a call of its own once its copy is there. `n_reads` of all
        misses come from disk first.
        """
        cpu_us, copies_us = self.cpu.us(n_misses, n_misses), 0.0
        gpu_us = self.gpu.us(n_hits, n_hits) + n_waited * self.gpu.us(1, 1)
        if n_waited:
            cpu_us, copies_us = self.overlap_us(cpu_us, n_waited)
            copies_us += self.gpu.us(1, 1)  # the others' arithmetic hides behind the next copy
        elif copying:
            cpu_us *= self.cpu_shared_factor
        if n_misses and (copying or n_waited):
            cpu_us += self.sum_wait_us
        experts_us = max(cpu_us, gpu_us, copies_us)
        return self.dense_us_per_layer + self.with_reads_us(experts_us, n_reads)

    def split(
        self, held: Mapping[int, int], missed: Mapping[int, int], backlog_us: float = 0.0
    ) -> tuple[int, ...]:
        """Which missed experts of a layer to copy to the GPU, so that it and the CPU end together.

        `held` experts are ready on the GPU and computed there, `missed` ones are not: expert ->
        tokens. `backlog_us` is the copy time already queued, behind which every copy of this layer
        waits. The missed are shared by tokens: the fuller an expert, the more the GPU saves for the
        same copy. They are copied in this order, so that copies overlap with arithmetic from the
        start. Every such split is tried and the fastest is returned; ties copy less. Whole
        experts are compared and no share of the bus is rounded, so that an answer of no copies
        never starves the cache: misses may still be fetched in the background. O(E log E).
        """
        order = sorted(missed, key=lambda e: -missed[e])
        left_us = self._cpu_left_us([missed[e] for e in order])
        gpu_us_of_experts = sum(map(self.gpu.one_us, held.values()))
        backlog = backlog_us / self.copy_us(shared=True)
        best_n, best_us = 0, math.inf
        for n in range(len(order) + 1):
            last = missed[order[n - 1]] if n else 0
            if n:
                gpu_us_of_experts += self.gpu.one_us(last)
            cpu_us, copies_us = self.overlap_us(left_us[n], backlog + n)
            gpu_us = self.gpu.call_us + gpu_us_of_experts if held or n else 0.0
            if n:  # double-buffered: only the last copy's arithmetic is not hidden
                gpu_us = max(gpu_us, copies_us + self.gpu.us(1, last))
            if max(gpu_us, cpu_us) < best_us:
                best_n, best_us = n, max(gpu_us, cpu_us)
        return tuple(order[:best_n])
