"""Wires a model, its experts and its caches together: what `main.py` and Python programs run.

`load_model` is the short way for a program: it returns a real transformers model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from moe_offload.checkpoint.fit import require_fit
from moe_offload.checkpoint.prepared import read_manifest, verify
from moe_offload.config import PACKED_FORMATS, CacheOptions, ModelOptions
from moe_offload.engine.engine import Engine
from moe_offload.engine.memory import kv_cache_bytes, make_budget
from moe_offload.engine.setup import (
    fitted_cache,
    host_places,
    open_experts,
    read_ahead,
    read_favourites,
)
from moe_offload.errors import UserError
from moe_offload.experts.accelerator import N_STAGING_SLOTS
from moe_offload.experts.disk_tier import DiskTier
from moe_offload.experts.dispatcher import MoeDispatcher, MoeExperts
from moe_offload.experts.recorder import NullRecorder, NvtxRanges, Recorder
from moe_offload.experts.store import ExpertStore
from moe_offload.kernels.bindings import load_kernels
from moe_offload.kernels.cpu_experts import CpuExperts
from moe_offload.machine.terminal import byte_bar
from moe_offload.model.attention import XFORMERS, register_xformers
from moe_offload.model.decode_layers import use_decoder_layers
from moe_offload.model.decode_modules import find_router, use_cpu_kernels
from moe_offload.model.dummy import ModelSource
from moe_offload.model.loader import (
    PreparedModel,
    build_skeleton,
    find_moe_sites,
    given_text_alone,
    refuse_saving,
)
from moe_offload.model.step_graphs import StepGraphs, why_eager
from moe_offload.simulation.trace_files import read_trace

_DEFAULT_CONTEXT_TOKENS = 4096  # for the memory check when no prompt is known yet


def load_engine(
    source: ModelSource,
    options: ModelOptions,
    cache: CacheOptions,
    recorder: Recorder | NullRecorder | None = None,
    *,
    context_tokens: int = _DEFAULT_CONTEXT_TOKENS,
    nvtx: bool = False,
    say: Callable[[str], None] | None = None,
) -> Engine:
    """Check memory, build the model, read its weights and install the experts.

    `context_tokens` is the most tokens, over a whole batch, that the KV cache will hold; `say`
    hears progress lines. Raises UserError for a device or model that cannot be served, and
    before loading anything when memory cannot hold the run.
    """
    device = choose_device(options.device)
    if options.attention == XFORMERS:
        register_xformers(device)
    if device.type == "cuda" and source.dense_format in PACKED_FORMATS:
        raise UserError(
            f"the dense weights of {source.name} are prepared as {source.dense_format}, which "
            "only the CPU serves: use --device cpu, or prepare with --dense-dtype bf16"
        )
    if device.type == "cuda" and cache.emulate_pcie_gbps is not None:
        raise UserError("--emulate-pcie-gbps is for --device cpu: a GPU's link is not emulated")
    # Refused before loading what would be refused after.
    n_slots = fitted_cache(cache, source, []).n_slots
    if cache.trace is not None:
        read_trace(cache.trace)
    notes = given_text_alone(source.config)
    model = build_skeleton(source.config, source.dtype, options.attention)
    if isinstance(source, PreparedModel):
        require_fit(source.manifest, model)
    sites = find_moe_sites(model, source.experts_paths)
    kv_bytes = kv_cache_bytes(source.config, context_tokens, source.dtype.itemsize)
    wants_graphs = device.type == "cuda" and options.cuda_graphs == "auto"
    if wants_graphs and why_eager(model) is None:
        kv_bytes *= 2  # a prompt is evaluated beside the memory that recorded steps use
    budget = make_budget(
        device,
        expert_bytes=source.expert_bytes,
        dense_bytes=source.dense_bytes,
        kv_bytes=kv_bytes,
        slot_bytes=(n_slots + N_STAGING_SLOTS) * source.layouts[0].block_bytes if n_slots else 0,
    )
    places = host_places(options, source, budget, notes)
    ways = () if places is None else places.ways
    if places is not None:
        n_bytes = sum(
            n * layout.block_bytes for n, layout in zip(ways, source.layouts, strict=True)
        )
        n_bytes += places.n_between * source.layouts[0].block_bytes
        budget = budget.with_experts(n_bytes)
    if say is not None:
        say(budget.table())
    budget.check(source.weight_format, context_tokens, dummy=options.dummy_shape is not None)

    favourites: list[list[int]] = []
    if options.warm_start is not None:
        favourites = read_favourites(options.warm_start, source.n_experts)
        if places is None:
            notes.append("all experts are in host memory: --warm-start has nothing to choose")
    store = open_experts(places, options, source, notes)
    cpu = [
        CpuExperts(
            source.layouts[site.layer],
            site.activation,
            act_module=site.act_module,
            kernel=options.cpu_kernel,
            isa=options.cpu_isa,
            affinity=options.cpu_affinity,
        )
        for site in sites
    ]
    dispatcher = MoeDispatcher(
        store, cpu, recorder or NullRecorder(), ranges=NvtxRanges(enabled=nvtx)
    )
    for site in sites:
        model.set_submodule(site.experts_path, MoeExperts(dispatcher, site.layer))
        block: Any = site.block
        # transformers' mark: Qwen3-Omni's own initialisation would ask for the experts' parameters
        block._is_hf_initialized = True
    expert_bytes = [
        min(len(experts), n) * layout.block_bytes
        for experts, layout, n in zip(favourites, source.layouts, ways, strict=False)
    ]
    if isinstance(store, ExpertStore):
        expert_bytes = [store.total_bytes]
    with byte_bar(f"loading {source.name}", source.dense_bytes + sum(expert_bytes)) as advance:
        source.load_dense(model, device, advance)
        if isinstance(store, ExpertStore):
            source.load_experts(store, advance)
        else:
            for layer, experts in enumerate(favourites):
                store.warm(layer, experts)
                advance(expert_bytes[layer])
    graphs = None
    if wants_graphs:
        graphs = StepGraphs(model, dispatcher, device, notes.append)
        graphs.attach(model)
    dispatcher.attach(model, [site.block for site in sites])
    refuse_saving(model)
    if isinstance(store, DiskTier):
        read_ahead(store, sites)
    if device.type == "cpu":
        width = source.layouts[0].hidden_size
        routers = [find_router(site.block, width) for site in sites]
        found = [router for router in routers if router is not None]
        use_cpu_kernels(model, options.cpu_kernel, options.cpu_isa, found)
        use_decoder_layers(model, load_kernels(options.cpu_kernel, options.cpu_isa))
    else:
        refused = store.pin()
        notes.extend([refused] if refused else [])
    engine = Engine(
        model=model,
        source=source,
        store=store,
        dispatcher=dispatcher,
        device=device,
        cpu=cpu[0],
        sites=sites,
        kv_bytes=kv_bytes,
        graphs=graphs,
        notes=notes,
        say=say,
    )
    if graphs is not None:
        graphs.say = engine.tell
    engine.use_cache(cache)
    return engine


def load_model(
    path: str | Path,
    *,
    device: Literal["auto", "cuda", "cpu"] = "auto",
    cache_nblocks: int = 0,
    cache_nways: int = 0,
    cache_replace_policy: str = "FIFO",
    host_memory_gb: float | None = None,
    host_replace_policy: str = "LFRU",
    **cache_options: Any,
) -> PreTrainedModel:
    """A prepared folder as a real transformers model, its experts served by this tool.

    `generate()`, streamers, logits processors and evaluation harnesses work on it. Its `engine`
    attribute is the `Engine` behind it. Further keywords are those of `config.CacheOptions`.
    Raises `errors.UserError` for folders and settings that cannot be served.
    """
    known = {entry.name for entry in fields(CacheOptions)} - {"n_indexes", "n_ways", "policy"}
    if unknown := sorted(cache_options.keys() - known):
        raise UserError(
            "expected device, cache_nblocks, cache_nways, cache_replace_policy, host_memory_gb, "
            "host_replace_policy, "
            f"{', '.join(sorted(known))} as settings of load_model, found {', '.join(unknown)}"
        )
    options = ModelOptions(
        Path(path), device, host_memory_gb=host_memory_gb, host_policy=host_replace_policy
    )
    cache = CacheOptions(
        n_indexes=cache_nblocks, n_ways=cache_nways, policy=cache_replace_policy, **cache_options
    )
    engine = load_engine(PreparedModel(read_manifest(Path(path))), options, cache)
    engine.model.engine = engine
    return engine.model


def open_prepared(options: ModelOptions) -> PreparedModel:
    """The model that `options` name; with `verify`, every byte of its folder is read first."""
    assert options.model_path is not None
    manifest = read_manifest(options.model_path)
    if options.verify:
        total_bytes = sum(shard.bytes for shard in manifest.shards)
        with byte_bar("verifying", total_bytes) as advance:
            verify(manifest, advance)
    return PreparedModel(manifest)


def choose_device(wanted: str) -> torch.device:
    """The device that `wanted` (auto, cuda, cuda:N, cpu) means here; UserError where it is not."""
    has_gpu = torch.cuda.is_available()
    if wanted == "cpu" or (wanted == "auto" and not has_gpu):
        return torch.device("cpu")
    if not has_gpu:
        raise UserError(
            f"--device {wanted} was asked for and torch sees no GPU: use --device cpu, or install "
            "a torch built for your CUDA driver"
        )
    _, named, index = wanted.partition(":")
    if named and int(index) >= torch.cuda.device_count():
        raise UserError(
            f"expected --device cuda:0 to cuda:{torch.cuda.device_count() - 1}, the GPUs that "
            f"torch sees, found {wanted}"
        )
    return torch.device("cuda", int(index) if named else torch.cuda.current_device())
