"""Experts larger than host memory, on a modelled clock: GPU slots over host memory over a disk.

The directories are the engine's. In a layer the GPU's hits, the CPU's experts and the disk's reads
run at once; what is missed is computed when it has arrived, so a layer ends with the last of them.
Copies to the GPU are taken to end before their next use. A bound stands beside the policy: the
optimum's misses, known in advance, and a step that waits for nothing but the busiest part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from moe_offload.config import CacheOptions
from moe_offload.experts.cache import ExpertCache, make_policy
from moe_offload.experts.costs import CostModel
from moe_offload.simulation.replay import bound_us, most_hits
from moe_offload.simulation.traces import Trace, distinct_experts


@dataclass
class TierReplay:
    """What decode asked of host memory, by expert and pass, and the modelled times.

    `disk_us` is how long the disk read, `waited_us` what layers took longer for it.
    """

    hits: int = 0
    misses: int = 0
    gpu_hits: int = 0
    n_decode_tokens: int = 0
    decode_us: float = 0.0
    prefill_us: float = 0.0
    disk_us: float = 0.0
    waited_us: float = 0.0

    @property
    def hit_percent(self) -> float:
        return 100 * self.hits / max(self.hits + self.misses, 1)

    @property
    def tokens_per_s(self) -> float:
        return self.n_decode_tokens / self.decode_us * 1e6 if self.decode_us else 0.0


def replay_tiers(
    trace: Trace,
    ways: Sequence[int],
    policy: str,
    costs: CostModel,
    gpu: CacheOptions | None = None,
) -> TierReplay:
    """Run `trace` with `ways` experts of each layer in host memory, all empty at first.

    `policy` is host memory's, by name; `gpu` the cache above it; `costs` know the disk.
    """
    assert costs.disk is not None
    host = ExpertCache(trace.n_layers, max(ways), make_policy(policy), ways=ways)
    gpu = gpu or CacheOptions()
    cache = ExpertCache(gpu.n_indexes, gpu.n_ways, make_policy(gpu.policy))
    result = TierReplay()
    for one in trace.passes:
        is_decode, quota, pass_us = one.phase == "decode", gpu.quota, costs.step_us
        for layer, tokens in enumerate(one.ids):
            experts, counts = distinct_experts(tokens), Counter(chain.from_iterable(tokens))
            found = cache.lookup(layer, experts) if is_decode else [-1] * len(experts)
            asked = [e for e, slot in zip(experts, found, strict=True) if slot < 0]
            missed = ask_host(host, layer, asked)
            cpu_us = costs.cpu_us([counts[e] for e in asked])
            if is_decode:
                arriving = [e for e in asked if e not in missed] + missed
                fetches = cache.start_fetches(layer, arriving, quota)
                quota -= len(fetches)
                cache.end_step(layer)
                for _, slot in fetches:
                    cache.mark_ready(slot)
                cpu_us *= costs.cpu_shared_factor if fetches else 1.0
            gpu_us = costs.gpu.us_of([counts[e] for e in experts if e not in asked])
            without_us = max(cpu_us, gpu_us)
            experts_us = costs.with_reads_us(without_us, len(missed))
            pass_us += costs.dense_us_per_layer + experts_us
            if is_decode:
                result.gpu_hits += len(experts) - len(asked)
                result.hits += len(asked) - len(missed)
                result.misses += len(missed)
                result.disk_us += costs.disk.us(len(missed) * costs.block_bytes)
                result.waited_us += experts_us - without_us
        if is_decode:
            result.decode_us += pass_us
            result.n_decode_tokens += len(one.ids[0])
        else:
            result.prefill_us += pass_us
    return result


def ask_host(host: ExpertCache, layer: int, experts: list[int]) -> list[int]:
    """Ask for a layer's experts as `DiskTier.arriving` does; those missed, in the file's order.

    Where the misses wait for ways, experts that are there give theirs up one at a time. Reads end
    in the order of their start, none before all that was there has been computed.
    """
    slots = host.lookup(layer, experts)
    there = [expert for expert, slot in zip(experts, slots, strict=True) if slot >= 0]
    missed = sorted(set(experts).difference(there))
    waiting, reading = list(missed), list[int]()
    while there or waiting or reading:
        while waiting and (slot := host.admit(layer, waiting[0])) is not None:
            waiting.pop(0)
            reading.append(slot)
        del there[: 1 if waiting else len(there)]
        host.end_step(layer)
        if not there and reading:
            host.mark_ready(reading.pop(0))
            there.append(missed[len(missed) - len(waiting) - len(reading) - 1])
        host.protect(layer, there)
    return missed


def bound_tokens_per_s(trace: Trace, n_ways: int, costs: CostModel) -> float:
    """The most that any policy and any prediction reach without GPU slots, tokens/s.

    The disk reads what even the optimum misses and never rests; CPU and bus share all experts as
    they like; the longer of the two is what a token takes.
    """
    assert costs.disk is not None
    n_passes = sum(one.phase == "decode" for one in trace.passes)
    missed = trace.n_chosen - most_hits(trace.passes, trace.n_layers, n_ways)
    compute_us = n_passes * bound_us(costs, trace.n_layers, 0, trace.n_chosen / n_passes)
    disk_us = missed * costs.block_bytes / costs.disk.gbps / 1e3
    return trace.passes.n_decoded / max(compute_us, disk_us) * 1e6
