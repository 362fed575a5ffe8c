"""Do CPU, accelerator and copies really run at once? Needs no GPU.

`PYTHONPATH=src python3 benchmarks/bench_overlap.py [--steps N] [--json FILE]`

Decode steps of the dispatcher on random Qwen3-30B-sized experts (H 2048, I 768, bf16, two layers):
one hit, 31 misses and one background copy per layer. The accelerator is the emulated one, slowed
down by a delay, and the link is throttled, so that the three parts take comparable times. The many
misses keep small what the accelerator's and the copy's real work takes from the same cores and
memory. Each part is first timed alone; a step would take their sum if they took turns, and their
maximum if they overlapped perfectly. Fails when less than half of what could be hidden is hidden.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from moe_offload.checkpoint.block import Activation, block_layout
from moe_offload.experts.accelerator import N_STAGING_SLOTS, Accelerator
from moe_offload.experts.cache import ExpertCache, make_policy
from moe_offload.experts.dispatcher import MoeDispatcher, MoeExperts
from moe_offload.experts.fetcher import HostFetcher
from moe_offload.experts.recorder import NullRecorder
from moe_offload.experts.slots import GpuExperts
from moe_offload.experts.store import ExpertStore
from moe_offload.kernels.cpu_experts import CpuExperts

HIDDEN, INTERMEDIATE, N_EXPERTS, TOP_K, N_LAYERS, N_WAYS = 2048, 768, 64, 32, 2, 2
LEAST_HIDDEN = 0.5


@dataclass
class Slowness:
    """What makes the emulated accelerator slow; changed between scenarios."""

    delay_s: float = 0.0

    def __call__(self, n_hits: int) -> None:
        if n_hits:
            time.sleep(self.delay_s)


@dataclass(frozen=True)
class Row:
    """Milliseconds per layer, medians."""

    scenario: str
    cpu_ms: float
    accelerator_ms: float
    copy_ms: float
    step_ms: float
    copies_per_layer: float

    @property
    def parts(self) -> tuple[float, float, float]:
        return self.cpu_ms, self.accelerator_ms, self.copy_ms * self.copies_per_layer

    @property
    def hidden(self) -> float:
        """1 when a step takes its longest part, 0 when it takes the sum of the parts."""
        longest, total = max(self.parts), sum(self.parts)
        return (total - self.step_ms) / (total - longest)


class DecodeSteps(nn.Module):
    """A model of MoE layers only; its routing makes one hit and 31 misses of every layer."""

    def __init__(self, dispatcher: MoeDispatcher, cache: ExpertCache) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MoeExperts(dispatcher, i) for i in range(N_LAYERS))
        self._cache = cache
        self._generator = torch.Generator().manual_seed(0)
        dispatcher.attach(self, [])

    def forward(self, input_ids: Tensor) -> Tensor:  # the dispatcher reads its shape
        hidden = torch.full((1, HIDDEN), 0.01, dtype=torch.bfloat16)
        weights = torch.full((1, TOP_K), 1 / TOP_K)
        for layer, experts in enumerate(self.layers):
            experts(hidden, self._route(layer), weights)
        return hidden

    def _route(self, layer: int) -> Tensor:
        hit = list(self._cache.ready(layer))[-1:]
        order = torch.randperm(N_EXPERTS, generator=self._generator).tolist()
        there = self._cache.slot_of
        misses = [expert for expert in order if there(layer, expert) is None]
        return torch.tensor([(hit + misses)[:TOP_K]])


def median_s(body: Callable[[], object], n: int) -> float:
    times = []
    for _ in range(n):
        start = time.perf_counter()
        body()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


class Bench:
    """The parts of a run, wired as the engine wires them."""

    def __init__(self) -> None:
        layout = block_layout("bf16", HIDDEN, INTERMEDIATE)
        activation = Activation("silu")
        self.store = ExpertStore([layout] * N_LAYERS, [N_EXPERTS] * N_LAYERS)
        for layer in range(N_LAYERS):
            weights = self.store.blocks(layer).view(torch.bfloat16)
            weights.copy_(torch.randn(weights.shape[1]).mul_(0.02))
        self.cpu = CpuExperts(layout, activation)
        self.slowness = Slowness()
        n_slots = N_LAYERS * N_WAYS + N_STAGING_SLOTS
        self.gpu = GpuExperts(layout, activation, n_slots, "cpu", before_compute=self.slowness)
        self.hidden = torch.full((1, HIDDEN), 0.01, dtype=torch.bfloat16)
        self.weights = torch.full((1, TOP_K), 1 / TOP_K)
        self._next = 0

    def cpu_alone(self) -> None:
        """The misses of a layer, half of them others than the last time: cold caches."""
        first = self._next = (self._next + TOP_K) % N_EXPERTS
        index = (torch.arange(TOP_K - 1) + first)[None] % N_EXPERTS
        self.cpu.run(
            self.hidden,
            self.store.pointers(0),
            torch.ones(N_EXPERTS, dtype=torch.uint8),
            index,
            self.weights[:, 1:].contiguous(),
            torch.empty(1, HIDDEN),
        )

    def run(self, scenario: str, delay_s: float, copy_s: float, n_steps: int) -> Row:
        """Time each part alone, then `n_steps` decode steps."""
        self.slowness.delay_s = delay_s
        gbps = self.store.layouts[0].block_bytes / copy_s / 1e9
        fetcher = HostFetcher(self.gpu.slots, emulate_pcie_gbps=gbps)
        cache = ExpertCache(N_LAYERS, N_WAYS, make_policy("LRU"))
        slot_of_pair = [0] + [-1] * (TOP_K - 1)

        def copy_alone() -> None:
            fetcher.fetch(0, self.store.block(0, 0))
            fetcher.drain()

        copy_alone_s = median_s(copy_alone, 15)
        accelerator_s = median_s(
            lambda: self.gpu.launch(self.hidden, slot_of_pair, self.weights, fetcher).result(), 15
        )
        cpu_s = median_s(self.cpu_alone, 30)
        dispatcher = MoeDispatcher(
            self.store,
            [self.cpu] * N_LAYERS,
            NullRecorder(),
            Accelerator(self.store, cache, self.gpu, fetcher, quota=64),
        )
        model, token = DecodeSteps(dispatcher, cache), torch.zeros(1, 1, dtype=torch.int64)
        for _ in range(10):  # the cache fills, then a step has its one hit
            model(token)
        copies, hits = fetcher.copies, cache.hits
        step_s = median_s(lambda: model(token), n_steps)
        fetcher.drain()
        assert cache.hits - hits == n_steps * N_LAYERS, "a layer had no hit"
        n_copies = fetcher.copies - copies
        fetcher.close()
        return Row(
            scenario,
            cpu_s * 1e3,
            accelerator_s * 1e3,
            copy_alone_s * 1e3,
            step_s / N_LAYERS * 1e3,
            n_copies / n_steps / N_LAYERS,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    bench = Bench()
    cpu_s = median_s(bench.cpu_alone, 30)
    print(f"CPU: {bench.cpu.description}; {bench.gpu.description}; ms per layer, medians")
    print(f"{'':22}    cpu  accel.   copy x n     sum     max    step  step/max  hidden")
    rows = []
    for scenario, delay, copy in (
        ("three equal parts", 0.8, 0.9),
        ("slow accelerator", 2.0, 0.9),
        ("fast accelerator", 0.3, 0.5),
    ):
        row = bench.run(scenario, delay * cpu_s, copy * cpu_s, args.steps)
        rows.append(row)
        longest, total = max(row.parts), sum(row.parts)
        print(
            f"{scenario:22} {row.cpu_ms:6.2f}  {row.accelerator_ms:6.2f} "
            f"{row.copy_ms:6.2f} x{row.copies_per_layer:4.2f} {total:6.2f}  {longest:6.2f}  "
            f"{row.step_ms:6.2f}  {row.step_ms / longest:8.2f} {row.hidden:7.0%}"
        )
    bench.gpu.close()
    if args.json:
        args.json.write_text(
            json.dumps([{**asdict(row), "hidden": row.hidden} for row in rows], indent=2) + "\n"
        )
    worst = min(rows, key=lambda row: row.hidden)
    if worst.hidden < LEAST_HIDDEN:
        sys.exit(
            f"overlap: expected at least {LEAST_HIDDEN:.0%} of what can be hidden to be hidden, "
            f"found {worst.hidden:.0%} with {worst.scenario}; is another program using the cores?"
        )


if __name__ == "__main__":
    main()
