"""A run's expert cache: which one the model and the memory allow, and the accelerator behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial

import torch

from moe_offload.checkpoint.model_config import experts_per_token
from moe_offload.config import CacheOptions, flag_of
from moe_offload.errors import UserError
from moe_offload.experts.accelerator import N_STAGING_SLOTS, Accelerator, Router
from moe_offload.experts.cache import ExpertCache, make_policy
from moe_offload.experts.costs import CostModel
from moe_offload.experts.fetcher import make_fetcher
from moe_offload.experts.slots import GpuExperts
from moe_offload.experts.store import ExpertStore
from moe_offload.model.decode_modules import chosen_experts, find_router
from moe_offload.model.loader import ModelSource, MoeSite
from moe_offload.simulation.trace_files import read_trace
from moe_offload.simulation.tuning import choose_cache

_BEYOND_GPU_CACHE_BYTES = 256 << 20  # the largest L2 met so far has 126 MB (NVIDIA B200)


def gpu_uuid(device: torch.device) -> str | None:
    """The GPU in use, as NVML knows it; None where `device` is no GPU."""
    if device.type != "cuda":
        return None
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def fitted_cache(cache: CacheOptions, source: ModelSource, notes: list[str]) -> CacheOptions:
    """The cache cut to what the model can use."""
    if not cache.wants_accelerator:
        return cache
    if len({(layout, n) for layout, n in zip(source.layouts, source.n_experts, strict=True)}) > 1:
        raise UserError(
            f"the MoE layers of {source.name} differ in shape, which the expert cache does not "
            "serve: run without --cache-nblocks"
        )
    n_layers, n_experts = len(source.layouts), source.n_experts[0]
    fitted = replace(
        cache, n_indexes=min(cache.n_indexes, n_layers), n_ways=min(cache.n_ways, n_experts)
    )
    if (fitted.n_indexes, fitted.n_ways) != (cache.n_indexes, cache.n_ways):
        notes.append(
            f"cache {cache.n_indexes} x {cache.n_ways} cut to {fitted.n_indexes} x "
            f"{fitted.n_ways}: the model has {n_layers} MoE layers of {n_experts} experts"
        )
    return fitted


def chosen_cache(
    options: CacheOptions, source: ModelSource, free_bytes: int, costs: CostModel, notes: list[str]
) -> CacheOptions:
    """`--cache-auto`: N, M and policy for `free_bytes` of slots, by this machine's speeds.

    No cache where none is worth its memory.
    """
    block_bytes = source.layouts[0].block_bytes
    if options.memory_gb is not None:
        free_bytes = min(free_bytes, int(options.memory_gb * 1e9))
    choice = choose_cache(
        max(0, free_bytes - N_STAGING_SLOTS * block_bytes),
        len(source.layouts),
        source.n_experts[0],
        experts_per_token(source.config) or 2,
        costs,
        None if options.trace is None else read_trace(options.trace),
    )
    chosen = replace(
        options,
        auto=False,
        memory_gb=None,
        trace=None,
        n_indexes=choice.n_indexes,
        n_ways=choice.n_ways,
        policy=choice.policy,
        prefetch=options.prefetch if choice.n_indexes else "off",
        miss_policy=options.miss_policy if choice.n_indexes else "cpu",
        emulate_pcie_gbps=options.emulate_pcie_gbps if choice.n_indexes else None,
    )
    notes.append(f"--cache-auto chose: {_flags(chosen)} ({choice.reason})")
    return chosen


def _flags(options: CacheOptions) -> str:
    """The command line that chooses `options` again, defaults left out."""
    if not options.wants_accelerator:
        return "--cache-nblocks 0"
    chosen = [(one, getattr(options, one.name)) for one in fields(options)]
    return " ".join(f"{flag_of(one).name} {value}" for one, value in chosen if value != one.default)


def slots_to_measure(source: ModelSource) -> int:
    """More experts than a GPU's own cache holds, of those that a layer has."""
    n_slots = math.ceil(_BEYOND_GPU_CACHE_BYTES / source.layouts[0].block_bytes)
    return max(N_STAGING_SLOTS, min(n_slots, source.n_experts[0]))


def build_accelerator(
    options: CacheOptions,
    gpu: GpuExperts,
    store: ExpertStore,
    sites: Sequence[MoeSite],
    costs: CostModel,
    notes: list[str],
) -> Accelerator:
    """Wire the cache, copies and computation together over the slots there are.

    UserError when not even one expert fits, or where routers cannot be asked ahead.
    """
    notes.extend(gpu.notices)
    options, n_slots = _shrunk(options, gpu.n_slots - N_STAGING_SLOTS, notes)
    if gpu.device.type == "cpu":
        link = options.emulate_pcie_gbps
        notes.append(
            "the accelerator is emulated: a CPU thread stands in for the GPU"
            + (f", copies run at {link:g} GB/s" if link else "")
        )
    ahead = sites if options.prefetch == "next-layer" else ()
    policy = make_policy(options.policy, options.seed)
    return Accelerator(
        store=store,
        cache=ExpertCache(options.n_indexes, options.n_ways, policy, n_slots),
        gpu=gpu,
        fetcher=make_fetcher(gpu.device, gpu.slots, options.emulate_pcie_gbps),
        quota=options.quota,
        miss_policy=options.miss_policy,
        costs=costs,
        routers=[_router(store, site) for site in ahead],
    )


def _router(store: ExpertStore, site: MoeSite) -> Router:
    router = find_router(site.block, store.layouts[site.layer].hidden_size)
    if router is None:
        raise UserError(
            f"--prefetch next-layer cannot call the router of {site.experts_path} on its own: "
            "use --prefetch off for this architecture"
        )
    return partial(chosen_experts, router)


def _shrunk(options: CacheOptions, n_slots: int, notes: list[str]) -> tuple[CacheOptions, int]:
    """The cache cut to `n_slots`, and how many of them it uses: fewer ways first, then indexes.

    Where only the last index falls short, it alone has fewer ways.
    """
    if n_slots >= options.n_slots:
        return options, options.n_slots
    if n_slots < 1:
        raise UserError(
            "not even one expert fits beside the model on the accelerator: use --cache-nblocks 0"
        )
    n_indexes = min(options.n_indexes, n_slots)
    n_ways = -(-n_slots // n_indexes)
    short = n_indexes * n_ways - n_slots
    if short >= n_ways:
        n_ways, short = n_slots // n_indexes, 0
    fitted = replace(options, n_indexes=n_indexes, n_ways=n_ways)
    cut = f", cut to {n_slots} slots," if short else ""
    notes.append(f"the cache is {n_indexes} x {n_ways}{cut} for lack of memory")
    return fitted, n_indexes * n_ways - short
