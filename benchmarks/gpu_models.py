"""The models that `gpu_check.py` measures, sized to the machine, and the ways to serve a miss."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.gpu_check import Format
from moe_offload.checkpoint.block import block_layout
from moe_offload.config import CacheOptions, ModelOptions
from moe_offload.errors import UserError
from moe_offload.experts.plan import TRIAL_STEPS
from moe_offload.experts.store import ExpertStore
from moe_offload.machine.hardware import available_bytes
from moe_offload.model.dummy import DummyModel

# The paper's cache on 24 GB: 14 x 4 for Mixtral, 16 x 8 for Phi; a quarter of the others' experts.
PAPER_CACHE = {
    "mixtral-8x7b": (14, 4), "phi-3.5-moe": (16, 8), "qwen3-30b-a3b": (48, 32),
    "gpt-oss-20b": (24, 8),
}  # fmt: skip
# Of a model's experts in memory, the other layers using them again. Many times any last-level
# cache, and little enough for a machine of 32 GB.
STORED_BYTES = 16e9
HOST_MEMORY_SHARE = 0.8
WARM_UP_STEPS = 8
N_CORE_SETTINGS = 3  # of `settings`, the first: they are measured of every model before the others
_TRIED_BLOCKS = 2
_COPIED_BYTES = 1 << 28


@dataclass(frozen=True)
class Setting:
    """One way to serve a miss; `forced` routing is the trace's, else the model's own.

    With `prompts`, long prompts are measured too. Without `records_hits` a graph's layers launch
    their hits and sums as eager ones do, without `overlap` a layer's misses run after its hits,
    without `tiles` a prompt's experts are launched one by one.
    """

    name: str
    cache: CacheOptions
    forced: bool = True
    prompts: bool = False
    graphs: bool = True
    records_hits: bool = True
    overlap: bool = True
    tiles: bool = True

    @property
    def warm_up_steps(self) -> int:
        """Decode steps before what is measured: `auto` must have come to its verdict."""
        return TRIAL_STEPS + WARM_UP_STEPS if self.cache.miss_policy == "auto" else WARM_UP_STEPS


def settings(shape: str, n_layers: int, n_experts: int, memory_gb: float) -> list[Setting]:
    """The ways to serve a miss, the most telling first."""
    n, m = PAPER_CACHE.get(shape, (n_layers, max(1, n_experts // 2)))
    cached: dict[str, Any] = {"n_indexes": n, "n_ways": m, "policy": "LRU"}
    prefetching = CacheOptions(miss_policy="fetch", prefetch="next-layer", **cached)
    return [
        Setting("cpu only", CacheOptions(), prompts=True),
        Setting("paper", CacheOptions(**cached), prompts=True),
        Setting("paper, hits launched", CacheOptions(**cached), records_hits=False),
        Setting("paper, serial", CacheOptions(**cached), overlap=False),
        Setting("--cache-auto", CacheOptions(auto=True, miss_policy="auto", memory_gb=memory_gb)),
        Setting("fetch on demand", CacheOptions(miss_policy="fetch"), prompts=True),
        Setting("next-layer prefetch", prefetching, forced=False),
        Setting("paper, no graphs", CacheOptions(**cached), graphs=False),
        Setting("paper, quota 4", CacheOptions(quota=4, **cached)),
        Setting("paper, one by one", CacheOptions(**cached), prompts=True, tiles=False),
        Setting("fetch, cached", CacheOptions(miss_policy="fetch", **cached), forced=False),
        Setting("paper, auto misses", CacheOptions(miss_policy="auto", **cached)),
        Setting("fetch on demand, cached", CacheOptions(miss_policy="fetch", **cached)),
    ]


def load_s_per_byte(device: str) -> float:
    """Seconds per byte to fill memory for experts and, for a GPU, to pin it: tried on a little."""
    if device == "cuda":
        torch.zeros(1, device=device)  # the first call makes the context: seconds of its own
    started_s = time.monotonic()
    layout = block_layout("bf16", 4096, 14336)
    store = ExpertStore([layout], [_TRIED_BLOCKS])
    source = torch.ones(layout.block_bytes, dtype=torch.uint8)
    for expert in range(_TRIED_BLOCKS):
        store.block(0, expert).copy_(source)
    if device == "cuda":
        store.pin()
    store.close()
    return (time.monotonic() - started_s) / store.total_bytes


def card_speeds(device: str) -> dict[str, float]:
    """GB/s that the card's own copies reach: bytes read and written within it, bytes over the link.

    Nothing without a card.
    """
    if device == "cpu":
        return {}
    on_card = torch.zeros(2, _COPIED_BYTES, dtype=torch.uint8, device=device)
    on_host = torch.zeros(_COPIED_BYTES, dtype=torch.uint8, pin_memory=True)

    def gbps(n_bytes: int, source: torch.Tensor) -> float:
        times_s = []
        for _ in range(5):
            torch.cuda.synchronize()
            started_s = time.perf_counter()
            on_card[0].copy_(source, non_blocking=True)
            torch.cuda.synchronize()
            times_s.append(time.perf_counter() - started_s)
        return n_bytes / min(times_s) / 1e9

    return {
        "card_copy_gbps": gbps(2 * _COPIED_BYTES, on_card[1]),
        "link_gbps": gbps(_COPIED_BYTES, on_host),
    }


def open_source(
    shape: str, weight_format: Format, layers: int | None, most_bytes: float = float("inf")
) -> DummyModel:
    """A model of `layers`, or of all it has, with as many layers' experts in memory as are enough
    and fit the host's memory and `most_bytes`, at least one.

    UserError when the memory does not hold one layer.
    """
    options = ModelOptions(None, dummy_shape=shape, dummy_layers=layers, dummy_format=weight_format)
    one = DummyModel(replace(options, dummy_layers=1))
    layer_bytes = one.layouts[0].block_bytes * one.n_experts[0]
    room_bytes = HOST_MEMORY_SHARE * available_bytes()
    if room_bytes < layer_bytes:
        raise UserError(f"one layer of {shape} needs {layer_bytes / 1e9:.1f} GB of host memory")
    stored_bytes = min(room_bytes, most_bytes, STORED_BYTES)
    return DummyModel(options, n_stored_layers=max(1, int(stored_bytes / layer_bytes)))
