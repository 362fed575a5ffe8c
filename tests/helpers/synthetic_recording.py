"""Recordings of made-up runs for the tests of reports, summary and figures.

Routing is random but seeded; hits come from the production cache, whose copies arrive at once;
durations are simple functions of the counts. Prefill stays on the CPU and leaves the cache alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from moe_offload.experts.cache import ExpertCache, make_policy
from moe_offload.experts.recorder import LayerEvent, Recorder
from moe_offload.machine.sensors import Sample

START_UNIX_S = 1_700_000_000.25
QUOTA = 64


@dataclass(frozen=True)
class Shape:
    """A run's shape: L layers, E experts, top-k K, N x M cache, tokens per prompt."""

    n_layers: int = 3
    n_experts: int = 8
    top_k: int = 2
    n_indexes: int = 2
    n_ways: int = 4
    policy: str = "LRU"
    block_bytes: int = 4096
    prompt_lengths: tuple[int, ...] = (5,)
    n_tokens: int = 6
    batch: int = 1


def record_run(shape: Shape, seed: int = 0) -> Recorder:
    """A finished run: every prompt's prefill, its first token, then `n_tokens - 1` decode steps."""
    rng = random.Random(seed)
    recorder = Recorder()
    cache = ExpertCache(shape.n_indexes, shape.n_ways, make_policy(shape.policy))
    now_s = START_UNIX_S
    for first in range(0, len(shape.prompt_lengths), shape.batch):
        prompts = list(range(len(shape.prompt_lengths)))[first : first + shape.batch]
        n_prompt_tokens = sum(shape.prompt_lengths[p] for p in prompts)
        for step in range(shape.n_tokens):
            recorder.begin_pass(
                "decode" if step else "prefill", len(prompts) if step else n_prompt_tokens, first
            )
            us = 0.0
            for layer in range(shape.n_layers):
                n_rows = len(prompts) if step else n_prompt_tokens
                ids = [rng.sample(range(shape.n_experts), shape.top_k) for _ in range(n_rows)]
                us += _record_layer(recorder, cache, shape, layer, ids, decode=step > 0)
            step_s = round((us + 100) / 1e6, 9)
            now_s += step_s
            recorder.end_pass(step_s)
            for prompt in prompts:
                recorder.token(prompt, step_s, now_s)
    return recorder


def _record_layer(
    recorder: Recorder,
    cache: ExpertCache,
    shape: Shape,
    layer: int,
    ids: Sequence[Sequence[int]],
    decode: bool,
) -> float:
    """Record one layer; returns what its disjoint durations add up to, us."""
    is_cached = layer < shape.n_indexes
    experts = list(dict.fromkeys(expert for row in ids for expert in row))
    missed = experts
    n_fetches = n_evictions = 0
    if is_cached and decode:
        slots = cache.lookup(layer, experts)
        missed = [e for e, slot in zip(experts, slots, strict=True) if slot < 0]
        n_evictions = -cache.evictions
        fetches = cache.start_fetches(layer, missed, QUOTA)
        n_evictions += cache.evictions
        n_fetches = len(fetches)
        for _, slot in fetches:
            cache.mark_ready(slot)
        cache.end_step(layer)
    n_hits_of_token = [sum(expert not in missed for expert in row) for row in ids]
    n_hits = sum(n_hits_of_token)
    cpu_us, gpu_us = 200.0 * len(missed), 20.0 * (len(experts) - len(missed))
    combine_us = 5.0 + max(0.0, gpu_us - cpu_us)
    event = LayerEvent(
        layer,
        ids,
        n_hits_of_token if is_cached else None,
        hits=n_hits if is_cached else 0,
        misses=len(ids) * shape.top_k - n_hits if is_cached else 0,
        fetches=n_fetches,
        evictions=n_evictions,
        attention_us=50.0,
        router_us=10.0,
        plan_us=2.0,
        cpu_us=cpu_us,
        gpu_us=gpu_us,
        copy_wait_us=1.0,
        combine_us=combine_us,
        cpu_bytes=len(missed) * shape.block_bytes,
        gpu_bytes=(len(experts) - len(missed)) * shape.block_bytes,
        fetch_bytes=n_fetches * shape.block_bytes,
    )
    recorder.layer(event)
    return 50.0 + 10.0 + 2.0 + cpu_us + 1.0 + combine_us


def sensor_samples(
    seconds: int = 4, cpu_w: float = 40.0, gpu_w: float = 100.0, step_s: float = 1.0
) -> list[Sample]:
    """Samples of a machine with every sensor, drawing constant power from START_UNIX_S on."""
    return [
        Sample(
            unix_s=START_UNIX_S + n * step_s,
            busiest_mhz=3000.0 + n,
            cpu_temperature_c=50.0 + n,
            cpu_energy_j=cpu_w * n * step_s,
            gpu_energy_j=gpu_w * n * step_s,
            gpu_power_w=gpu_w,
        )
        for n in range(seconds)
    ]
