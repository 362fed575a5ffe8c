"""Wires a model, its experts and its caches together: what `main.py` and Python programs run.

`load_model` is the short way for a program: it returns a real transformers model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

import xformers_attention
from accelerator import N_STAGING_SLOTS, Accelerator
from checkpoint import read_manifest, verify
from config import CacheOptions, ModelOptions
from cpu_experts import CpuExperts
from errors import UserError
from expert_cache import ExpertCache, make_policy
from expert_fetcher import make_fetcher
from expert_store import ExpertStore
from gpu_experts import GpuExperts
from hardware import read_hardware
from machine_costs import MachineCosts, machine_costs
from model_loader import (
    ModelSource,
    MoeSite,
    PreparedModel,
    build_skeleton,
    find_moe_sites,
    install_experts,
    use_cpu_kernels,
)
from moe_dispatcher import MoeDispatcher, MoeExperts
from next_layer import Router, find_router
from nvtx_ranges import NvtxRanges
from preflight import kv_cache_bytes, make_budget
from recorder import NullRecorder, Recorder

_DEFAULT_CONTEXT_TOKENS = 4096  # for the memory check when no prompt is known yet


@dataclass
class Engine:
    """A loaded model and everything that serves it. Close it, or use it as a context manager.

    `notes` are lines for the user: what was degraded, chosen or emulated.
    """

    model: PreTrainedModel
    source: ModelSource
    store: ExpertStore
    dispatcher: MoeDispatcher
    device: torch.device
    cpu: CpuExperts
    costs: MachineCosts | None = None
    emulate_pcie_gbps: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def accelerator(self) -> Accelerator | None:
        return self.dispatcher.accelerator

    def calibrate(self, again: bool = False) -> None:
        """Know the machine's costs: measured once, then from disk; `again` measures anew."""
        if self.costs is None or again:
            gpu = None if self.accelerator is None else self.accelerator.gpu
            self.costs = _measure(self, gpu, self.emulate_pcie_gbps, again)

    def follow_prompts(self, prompts: Sequence[int]) -> None:
        """Record the coming pass under the first of `prompts`."""
        self.dispatcher.prompt = prompts[0]

    def run_notes(self) -> list[str]:
        """`notes`, and what the accelerator learnt during the run."""
        lines = list(self.notes)
        if self.accelerator is not None:
            lines += self.accelerator.notes()
        return lines

    def describe(self) -> dict[str, Any]:
        """What runs where, as plain JSON values."""
        accelerator = self.accelerator
        return {
            "name": self.source.name,
            "model_type": self.source.config.model_type,
            "n_moe_layers": self.store.n_layers,
            "n_experts": list(self.store.n_experts),
            "dtype": str(self.source.dtype).removeprefix("torch."),
            "weight_format": self.source.weight_format,
            "dense_format": self.source.dense_format,
            "expert_bytes": self.store.total_bytes,
            "device": str(self.device),
            "cpu_kernels": self.cpu.description,
            "accelerator": None if accelerator is None else accelerator.gpu.description,
            "cache_nblocks": 0 if accelerator is None else accelerator.cache.n_indexes,
            "cache_nways": 0 if accelerator is None else accelerator.cache.n_ways,
        }

    def close(self) -> None:
        if self.accelerator is not None:
            self.accelerator.close()
        self.store.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load_engine(
    source: ModelSource,
    options: ModelOptions,
    cache: CacheOptions,
    recorder: Recorder | NullRecorder | None = None,
    *,
    context_tokens: int = _DEFAULT_CONTEXT_TOKENS,
    nvtx: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Engine:
    """Check memory, build the model, read its weights and install the experts.

    `context_tokens` is the most tokens, over a whole batch, that the KV cache will hold; `say`
    hears progress lines. Raises UserError for a device or model that cannot be served, and
    before loading anything when memory cannot hold the run.
    """
    device = choose_device(options.device)
    if options.attention == xformers_attention.NAME:
        xformers_attention.register(device)
    if device.type == "cuda" and source.dense_format in ("int8", "int4"):
        raise UserError(
            f"the dense weights of {source.name} are prepared as {source.dense_format}, which "
            "only the CPU serves: use --device cpu, or prepare with --dense-dtype bf16"
        )
    notes: list[str] = []
    cache = _fitted(cache, source, notes)
    model = build_skeleton(source.config, source.dtype, options.attention)
    sites = find_moe_sites(model, source.experts_paths)
    budget = make_budget(
        device,
        expert_bytes=sum(
            layout.block_bytes * n
            for layout, n in zip(source.layouts, source.n_experts, strict=True)
        ),
        dense_bytes=source.dense_bytes,
        kv_bytes=kv_cache_bytes(source.config, context_tokens, source.dtype.itemsize),
        slot_bytes=(cache.n_slots + N_STAGING_SLOTS) * source.layouts[0].block_bytes
        if cache.n_slots
        else 0,
    )
    say(budget.table())
    budget.check(source.weight_format)

    store = ExpertStore(source.layouts, source.n_experts)
    cpu = [_cpu_experts(source, site, options) for site in sites]
    dispatcher = MoeDispatcher(
        store, cpu, recorder or NullRecorder(), ranges=NvtxRanges(enabled=nvtx)
    )
    for site in sites:
        install_experts(model, site.experts_path, MoeExperts(dispatcher, site.layer))
    total_bytes = source.dense_bytes + store.total_bytes
    with _progress(f"loading {source.name}", total_bytes) as advance:
        source.load_dense(model, device, advance)
        source.load_experts(store, advance)
    dispatcher.attach(model, [site.block for site in sites])
    if device.type == "cpu":
        use_cpu_kernels(model, options.cpu_kernel, options.cpu_isa)
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
        emulate_pcie_gbps=cache.emulate_pcie_gbps,
        notes=notes,
    )
    if cache.wants_accelerator:
        _add_accelerator(engine, sites, cache)
    return engine


def load_model(
    path: str | Path,
    *,
    device: Literal["auto", "cuda", "cpu"] = "auto",
    cache_nblocks: int = 0,
    cache_nways: int = 0,
    cache_replace_policy: str = "FIFO",
    **cache_options: Any,
) -> PreTrainedModel:
    """A prepared folder as a real transformers model, its experts served by this tool.

    `generate()`, streamers, logits processors and evaluation harnesses work on it. Its `engine`
    attribute is the `Engine` behind it. Further keywords are those of `config.CacheOptions`.
    Raises `errors.UserError` for folders and settings that cannot be served.
    """
    engine = load_engine(
        PreparedModel(read_manifest(Path(path))),
        ModelOptions(model_path=Path(path), device=device),
        CacheOptions(
            n_indexes=cache_nblocks,
            n_ways=cache_nways,
            policy=cache_replace_policy,
            **cache_options,
        ),
    )
    engine.model.engine = engine
    return engine.model


def open_prepared(options: ModelOptions) -> PreparedModel:
    """The model that `options` name; with `verify`, every byte of its folder is read first."""
    assert options.model_path is not None
    manifest = read_manifest(options.model_path)
    if options.verify:
        total_bytes = sum(shard.file_bytes for shard in manifest.shards)
        with _progress("verifying", total_bytes) as advance:
            verify(manifest, advance)
    return PreparedModel(manifest)


def choose_device(wanted: str) -> torch.device:
    """The device that `wanted` (auto, cuda, cpu) means here; UserError for cuda without one."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda was asked for and torch sees no GPU: use --device cpu, or install "
            "a torch built for your CUDA driver"
        )
    on_gpu = wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available())
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def _fitted(cache: CacheOptions, source: ModelSource, notes: list[str]) -> CacheOptions:
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


def _cpu_experts(source: ModelSource, site: MoeSite, options: ModelOptions) -> CpuExperts:
    return CpuExperts(
        source.layouts[site.layer],
        site.activation,
        act_module=site.act_module,
        kernel=options.cpu_kernel,
        isa=options.cpu_isa,
        affinity=options.cpu_affinity,
    )


def _add_accelerator(engine: Engine, sites: list[MoeSite], options: CacheOptions) -> None:
    """Allocate slots, calibrate, and hand the dispatcher its accelerator."""
    if options.auto:
        options = _chosen_cache(engine, options)
    gpu = GpuExperts(
        engine.store.layouts[0],
        sites[0].activation,
        options.n_slots + N_STAGING_SLOTS,
        engine.device,
        act_module=sites[0].act_module,
    )
    engine.notes.extend(gpu.notices)
    options = _shrunk(options, gpu.n_slots - N_STAGING_SLOTS, engine.notes)
    if engine.device.type == "cpu":
        engine.notes.append(
            "the accelerator is emulated: a CPU thread stands in for the GPU"
            + (
                f", copies run at {options.emulate_pcie_gbps:g} GB/s"
                if options.emulate_pcie_gbps
                else ""
            )
        )
    engine.costs = _measure(engine, gpu, options.emulate_pcie_gbps)
    routers = []
    if options.prefetch == "next-layer":
        routers = [_router(engine, site) for site in sites]
    engine.dispatcher.accelerator = Accelerator(
        store=engine.store,
        cache=ExpertCache(
            options.n_indexes, options.n_ways, make_policy(options.policy, options.seed)
        ),
        gpu=gpu,
        fetcher=make_fetcher(engine.device, gpu.slots, options.emulate_pcie_gbps),
        quota=options.quota,
        miss_policy=options.miss_policy,
        costs=engine.costs.model,
        routers=routers,
    )


def _router(engine: Engine, site: MoeSite) -> Router:
    router = find_router(
        site.block,
        engine.store.n_experts[site.layer],
        engine.store.layouts[site.layer].hidden_size,
    )
    if router is None:
        raise UserError(
            f"--prefetch next-layer cannot call the router of {site.experts_path} on its own: "
            "use --prefetch off for this architecture"
        )
    return router


def _shrunk(options: CacheOptions, n_slots: int, notes: list[str]) -> CacheOptions:
    """The cache cut to `n_slots`: fewer ways first, then fewer indexes."""
    if n_slots >= options.n_slots:
        return options
    if n_slots < 1:
        raise UserError(
            "not even one expert fits beside the model on the accelerator: use --cache-nblocks 0"
        )
    n_indexes = min(options.n_indexes, n_slots)
    fitted = replace(options, n_indexes=n_indexes, n_ways=n_slots // n_indexes)
    notes.append(f"the cache is {fitted.n_indexes} x {fitted.n_ways} for lack of memory")
    return fitted


def _measure(
    engine: Engine, gpu: GpuExperts | None, emulate_pcie_gbps: float | None, again: bool = False
) -> MachineCosts:
    def decode_step() -> None:
        with engine.dispatcher.experts_left_out(), torch.inference_mode():
            engine.model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=engine.device))

    return machine_costs(
        engine.store,
        engine.cpu,
        gpu,
        decode_step,
        read_hardware(),
        dtype=engine.source.dtype,
        emulate_pcie_gbps=emulate_pcie_gbps,
        remeasure=again,
    )


@contextmanager
def _progress(what: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, silent when that is not a terminal."""
    with tqdm(
        total=total_bytes,
        desc=what,
        unit="B",
        unit_scale=True,
        disable=not sys.stderr.isatty(),
        leave=False,
    ) as bar:

        def advance(n_bytes: int) -> None:
            bar.update(n_bytes)

        yield advance
