"""What a layer leaves of itself while it runs, and what is told of it when its pass has ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moe_offload.experts.device_clock import DeviceClock
from moe_offload.experts.plan import Plan
from moe_offload.experts.recorder import LayerEvent
from moe_offload.experts.slots import Pending


class Counters(NamedTuple):
    """What has been counted since loading: copies begun, evictions, and the disk's part."""

    fetches: int
    evictions: int
    host_hits: int
    host_misses: int
    disk_wait_s: float
    disk_bytes: int


@dataclass(slots=True)
class LayerRecord:
    """One layer of one pass. It waits for the pass's end, so it holds no tensor.

    The times, of `perf_counter`, follow each other: the layer before had ended, its own block
    began, its routing had come, its experts were computed, copies had been waited for, its sum was
    launched. `cpu_s` of them the CPU's experts took. `launches` have been asked for their result.
    """

    layer: int
    block_bytes: int
    ids: Sequence[Sequence[int]]
    plan: Plan
    is_decode: bool
    is_cached: bool
    launches: Sequence[Pending]
    clock: DeviceClock | None
    before: Counters
    after: Counters
    began_s: float
    block_began_s: float
    routed_s: float
    computed_s: float
    waited_s: float
    ended_s: float
    cpu_s: float

    def event(self) -> LayerEvent:
        """Asked when the pass has ended, on the device too."""
        counted = Counters._make(a - b for a, b in zip(self.after, self.before, strict=True))
        tokens = [token for token in self.ids if token[0] >= 0]  # the others are padding
        cpu_us, wait_us = self.cpu_s * 1e6, counted.disk_wait_s * 1e6
        attention_us = (self.block_began_s - self.began_s) * 1e6
        router_us = (self.routed_s - self.block_began_s) * 1e6
        plan_us = (self.computed_s - self.routed_s) * 1e6 - cpu_us - wait_us
        copy_wait_us = (self.waited_s - self.computed_s) * 1e6
        combine_us = (self.ended_s - self.waited_s) * 1e6
        if self.clock is not None:  # of these the host has only seen the plan
            spans = self.clock.spans(self.layer)
            attention_us, router_us = spans.attention_us, spans.router_us
            left_us = max(0.0, spans.experts_us - plan_us - cpu_us - wait_us)
            copy_wait_us = min(self.clock.stood_still_us(self.layer, self.launches), left_us)
            combine_us = left_us - copy_wait_us
        plan, block_bytes = self.plan, self.block_bytes
        hits_of_token = [sum(e in plan.hits for e in token) for token in tokens]
        n_hits = sum(hits_of_token)
        return LayerEvent(
            layer=self.layer,
            ids=tokens,
            n_hits_of_token=hits_of_token if self.is_cached else None,
            hits=n_hits if self.is_cached else 0,
            misses=sum(map(len, tokens)) - n_hits if self.is_cached else 0,
            fetches=counted.fetches,
            evictions=counted.evictions,
            host_hits=counted.host_hits,
            host_misses=counted.host_misses,
            attention_us=attention_us,
            router_us=router_us,
            plan_us=plan_us,
            cpu_us=cpu_us,
            gpu_us=sum(pending.resolve() for pending in self.launches),
            copy_wait_us=copy_wait_us,
            combine_us=combine_us,
            disk_wait_us=wait_us,
            cpu_bytes=len(plan.cpu) * block_bytes,
            gpu_bytes=(len(plan.hits) + len(plan.waited)) * block_bytes,
            waited_bytes=len(plan.waited) * block_bytes,
            fetch_bytes=counted.fetches * block_bytes,
            disk_bytes=counted.disk_bytes,
            waited=() if self.is_decode else plan.waited,
        )
