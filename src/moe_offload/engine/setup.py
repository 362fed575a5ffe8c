"""A run's expert cache: which one the model and the memory allow, and the accelerator behind it."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch

from moe_offload.checkpoint.model_config import experts_per_token
from moe_offload.config import CacheOptions, ModelOptions, flag_of
from moe_offload.engine.memory import Budget
from moe_offload.errors import UserError
from moe_offload.experts.accelerator import N_STAGING_SLOTS, Accelerator
from moe_offload.experts.cache import ExpertCache, make_policy, policy_name, ways_within
from moe_offload.experts.costs import CostModel
from moe_offload.experts.disk_tier import DiskTier, Router
from moe_offload.experts.fetcher import make_fetcher
from moe_offload.experts.slots import GpuExperts
from moe_offload.experts.store import ExpertStore
from moe_offload.files import require_regular
from moe_offload.kernels.bindings import load_kernels
from moe_offload.model.decode_modules import chosen_experts, find_router
from moe_offload.model.dummy import ModelSource
from moe_offload.model.loader import MoeSite, PreparedModel
from moe_offload.simulation.trace_files import read_trace
from moe_offload.simulation.tuning import choose_cache

_LARGEST_COUNTS_BYTES = 64 << 20  # a hundred thousand experts have 2 MB
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


@dataclass(frozen=True)
class HostPlaces:
    """Of how many experts of each layer host memory holds the blocks, and how many between them."""

    ways: Sequence[int]
    n_between: int


def host_places(
    options: ModelOptions, source: ModelSource, budget: Budget, notes: list[str]
) -> HostPlaces | None:
    """The places of a host memory that cannot or may not hold all experts; else None.

    What it holds beside as many of each layer are places between layers, as many as a token chooses
    in one, and then one more of the first layers.

    UserError where not even one has. Random weights are on no disk, so they have no other place.
    """
    if not isinstance(source, PreparedModel):
        return None
    room_bytes = free_bytes = budget.expert_room_bytes
    asked = options.host_memory_gb
    if asked is not None:
        room_bytes = int(asked * 1e9)
    if source.expert_bytes <= room_bytes:
        return None
    block_bytes = [layout.block_bytes for layout in source.layouts]
    ways, n_experts = ways_within(room_bytes, block_bytes, source.n_experts), max(source.n_experts)
    if not min(ways):
        if asked is None:  # the budget says what is missing, and what would help
            return None
        raise UserError(
            f"expected room for at least one expert of each layer in --host-memory-gb {asked:g}: "
            f"with this model that is {sum(block_bytes) / 1e9:.3g} GB or more"
        )
    n_between = 0
    if len(set(block_bytes)) == 1:
        n_beside = sum(ways) - sum(min(min(ways), n) for n in source.n_experts)
        n_between = min(n_beside, experts_per_token(source.config) or 2)
        room_bytes -= n_between * block_bytes[0]
        ways = ways_within(room_bytes, block_bytes, source.n_experts)
    why = "" if asked is not None else f", for {free_bytes / 1e9:.1f} GB are free for them"
    least, most = min(ways), max(ways)
    span = f"{least}" if least == most else f"{least} to {most}"
    notes.append(
        f"host memory holds {span} of {n_experts} experts of each layer"
        f"{why}; the others are read from disk when they are needed"
    )
    return HostPlaces(ways, n_between)


def read_favourites(path: Path, n_experts: Sequence[int]) -> list[list[int]]:
    """The experts of each layer in a run's expert_counts.csv, most chosen first.

    UserError for a file that is none, or is of another model.
    """
    counts: list[dict[int, int]] = [{} for _ in n_experts]
    number = 1
    try:
        require_regular(path, _LARGEST_COUNTS_BYTES)
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                number += 1
                layer, expert, count = (int(row[name]) for name in ("Layer", "Expert", "Count"))
                if not (0 <= layer < len(n_experts) and 0 <= expert < n_experts[layer]):
                    raise UserError(
                        f"expected the expert counts of a model of {len(n_experts)} MoE layers of "
                        f"{max(n_experts)} experts, found layer {layer}, expert {expert} in "
                        f"{path}: give this model's own file"
                    )
                counts[layer][expert] = count
        if number == 1:
            raise ValueError
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; correct --warm-start") from error
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(
            f"expected columns Layer, Expert and Count of whole numbers in {path}, found others "
            f"in line {number}: give the expert_counts.csv that a run has written"
        ) from error
    return [sorted(of_layer, key=lambda expert: -of_layer[expert]) for of_layer in counts]


def open_experts(
    places: HostPlaces | None, options: ModelOptions, source: ModelSource, notes: list[str]
) -> ExpertStore | DiskTier:
    """Where the experts live; without `places`, all in host memory, which `load_experts` fills."""
    kernels = load_kernels(options.cpu_kernel, options.cpu_isa, options.cpu_affinity)
    if places is None or not isinstance(source, PreparedModel):
        return ExpertStore(source.layouts, source.n_experts, source.n_stored_layers, kernels)
    policy = make_policy(options.host_policy)
    tier = DiskTier(source.manifest.moe_layers, places.ways, policy, kernels, places.n_between)
    if not tier.is_direct:
        notes.append(
            f"the file system of {source.folder} refuses direct reads (O_DIRECT): experts are "
            "read through the page cache, which is told to keep none of them"
        )
    return tier


def chosen_cache(
    options: CacheOptions,
    source: ModelSource,
    store: ExpertStore | DiskTier,
    free_bytes: int,
    costs: CostModel,
    notes: list[str],
) -> CacheOptions:
    """`--cache-auto`: N, M, policy and quota for `free_bytes` of slots, by this machine's speeds.

    No cache where none is worth its memory. `options` have the most that the quota may be.
    """
    block_bytes = source.layouts[0].block_bytes
    if options.memory_gb is not None:
        free_bytes = min(free_bytes, int(options.memory_gb * 1e9))
    ways, host_policy = None, "LFRU"
    if isinstance(store, DiskTier):
        ways, host_policy = store.memory.n_experts, policy_name(store.cache.policy)
    choice = choose_cache(
        max(0, free_bytes - N_STAGING_SLOTS * block_bytes),
        len(source.layouts),
        source.n_experts[0],
        experts_per_token(source.config) or 2,
        costs,
        None if options.trace is None else read_trace(options.trace),
        ways,
        host_policy,
        options.quota,
    )
    found = choice.cache
    chosen = replace(
        options,
        auto=False,
        memory_gb=None,
        trace=None,
        n_indexes=found.n_indexes,
        n_ways=found.n_ways,
        policy=found.policy,
        quota=found.quota,
        prefetch=options.prefetch if found.n_slots else "off",
        miss_policy=options.miss_policy if found.n_slots else "cpu",
        emulate_pcie_gbps=options.emulate_pcie_gbps if found.n_slots else None,
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
    store: ExpertStore | DiskTier,
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


def read_ahead(tier: DiskTier, sites: Sequence[MoeSite]) -> None:
    """Let the tier read ahead, where the routers can be asked ahead."""
    routers = [find_router(one.block, tier.layouts[one.layer].hidden_size) for one in sites]
    found = [router for router in routers if router is not None]
    if len(found) == len(sites):
        tier.read_ahead_with([partial(chosen_experts, router) for router in found])


def _router(store: ExpertStore | DiskTier, site: MoeSite) -> Router:
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
