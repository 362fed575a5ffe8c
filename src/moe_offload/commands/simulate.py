"""The simulator's command line: which cache, on which hardware, how fast?"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moe_offload.commands.arguments import (
    ArgumentParser,
    a_path,
    add_flags,
    chosen,
    make_writable,
    run_command,
)
from moe_offload.config import FAST_FORMATS, LARGEST, CacheOptions, ModelOptions, require_range
from moe_offload.errors import UserError, plain
from moe_offload.experts.cache import ways_within
from moe_offload.experts.costs import CostModel
from moe_offload.simulation.machine_file import Disk, Machine, load_machine
from moe_offload.simulation.paper import CACHES, paper_table
from moe_offload.simulation.replay import Replay, most_hits
from moe_offload.simulation.shapes import ModelShape, load_shape
from moe_offload.simulation.tiers import bound_tokens_per_s, replay_tiers
from moe_offload.simulation.trace_files import read_trace
from moe_offload.simulation.traces import Trace
from moe_offload.simulation.tuning import grid, run_setting, sweep, tune
from moe_offload.simulation.workload import typical_workload

SYNTHETIC_TOKENS = 256
MOST_CORES = 4096
GPU_RESERVE_BYTES = 1_500_000_000  # KV cache, workspace and the CUDA context
_DISK_LATENCY_US = 100.0  # of a large read from an NVMe disk
_CACHE_FLAGS = ("n_indexes", "n_ways", "policy", "quota")

_EPILOG = """examples:
  python3 src/simulator.py expert_choices.csv --cache-nblocks 14 --cache-nways 4
  python3 src/simulator.py expert_choices.csv --sweep --output-dir sweeps
  python3 src/simulator.py --model mixtral-8x7b --hardware hardware/rtx4080.yaml --cores 8 --tune
  python3 src/simulator.py --paper --hardware hardware/rtx4090.yaml"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = ArgumentParser(
        prog="simulator.py",
        description="Replay a routing trace through the expert cache: which N, which M, which "
        "policy, on which hardware, and how fast?",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    routing = parser.add_argument_group("routing")
    routing.add_argument(
        "trace",
        nargs="?",
        type=a_path,
        metavar="TRACE",
        help="a run's expert_choices.csv or routing.jsonl, or a *.route.csv; without one: "
        f"{SYNTHETIC_TOKENS} made-up tokens, typical for --model",
    )
    cache = parser.add_argument_group("cache")
    add_flags(cache, CacheOptions, *_CACHE_FLAGS)
    machine = parser.add_argument_group("machine")
    machine.add_argument("--hardware", type=a_path, metavar="FILE", help="see hardware/*.yaml")
    machine.add_argument("--cores", type=int, help="CPU cores, instead of the file's")
    machine.add_argument("--pcie", type=int, metavar="GEN", help="PCIe generation, likewise")
    machine.add_argument("--model", metavar="SHAPE", help="the expert's shape: mixtral-8x7b, ...")
    machine.add_argument(
        "--expert-dtype",
        choices=FAST_FORMATS,
        help="the experts' format (default bf16; of --tune: all of them)",
    )
    add_flags(machine, ModelOptions, "host_memory_gb", "host_policy")
    machine.add_argument("--disk-gbps", type=float, metavar="X", help="likewise, for the former")
    machine.add_argument(
        "--disk-latency-us", type=float, metavar="X", help="of a read alone (default 100)"
    )
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument(
        "--sweep", action="store_true", help="N x M x policy: sweep.csv, .png, .pdf and .svg"
    )
    tasks.add_argument("--tune", action="store_true", help="the fastest cache and its Pareto front")
    tasks.add_argument("--memory-gb", type=float, help="for --tune; default: the GPU's free memory")
    tasks.add_argument(
        "--calibrate",
        type=a_path,
        metavar="FILE",
        help="measure this machine with experts of --model and write its hardware file",
    )
    tasks.add_argument("--paper", action="store_true", help="the paper's table beside predictions")
    tasks.add_argument("--output-dir", type=a_path, default=Path(), metavar="DIR")
    return run_command(parser, _simulate, argv)


@dataclass(frozen=True)
class _Host:
    """The machine that a model is predicted on."""

    machine: Machine
    shape: ModelShape
    weight_format: str

    @property
    def costs(self) -> CostModel:
        return self.machine.cost_model(self.shape, self.weight_format)

    @property
    def cache_bytes(self) -> float:
        """What the GPU has for slots beside the dense weights; below 0 where those do not fit."""
        return self.machine.gpu.memory_gb * 1e9 - self.shape.dense_bytes() - GPU_RESERVE_BYTES

    def require_memory(self, cache: CacheOptions) -> None:
        """UserError for more slots than the GPU can hold."""
        block_bytes = self.shape.block_bytes(self.weight_format)
        n_slots = cache.n_slots
        if n_slots * block_bytes > self.cache_bytes:
            raise UserError(
                f"expected at most {max(0, int(self.cache_bytes // block_bytes))} slots beside "
                f"{self.shape.name}'s dense weights in the {self.machine.gpu.memory_gb:g} GB of "
                f"{self.machine.name}, found {n_slots} of {n_slots * block_bytes / 1e9:.1f} GB; "
                "choose a smaller cache or a larger GPU, or leave --hardware out for the hits alone"
            )

    def limit(self) -> str:
        """What no cache can change: the host's own time for the dense part of a step."""
        layer_us = self.machine.layer_us
        step_ms = (self.shape.n_layers * layer_us + self.machine.step_us) / 1e3
        if not step_ms:
            return "layer_us of the hardware file is 0: the host's own time is left out"
        return (
            f"layer_us of the hardware file, {layer_us:g}, makes {step_ms:.1f} ms a token: with "
            f"any cache at most {1e3 / step_ms:.1f} tokens/s"
        )


def _simulate(options: argparse.Namespace) -> None:
    """Carry out what the command line asks for, printing as it goes; raises UserError."""
    machine = None
    if options.hardware is not None:
        if options.cores is not None:
            require_range("--cores", options.cores, 1, MOST_CORES)
        machine = load_machine(options.hardware).variant(options.cores, options.pcie)
    if options.paper:
        if machine is None:
            raise UserError("--paper needs --hardware: give hardware/rtx4090.yaml")
        for name, (n_indexes, n_ways) in CACHES.items():
            host = _Host(machine, load_shape(name), "bf16")
            host.require_memory(CacheOptions(n_indexes, n_ways))
        print(paper_table(machine))
        return
    shape = load_shape(options.model) if options.model else None
    if options.calibrate is not None:
        _calibrate(options.calibrate, shape)
        return
    trace = _routing(options, shape)
    _print_trace(trace)
    on = None
    if machine is not None:
        if shape is None:
            raise UserError("--hardware needs --model: whose experts does the machine compute?")
        on = _Host(machine, shape, options.expert_dtype or "bf16")
    elif options.expert_dtype is not None and shape is None:
        raise UserError("--expert-dtype needs --model: experts of which size?")
    if options.tune:
        if on is None:
            raise UserError("--tune needs --hardware and --model: give a file of hardware/")
        # mxfp4 is for models that come in it: rounded to it, others answer worst (docs/FORMATS.md).
        sensible = tuple(name for name in FAST_FORMATS if name != "mxfp4")
        formats = sensible if options.expert_dtype is None else (options.expert_dtype,)
        _tune(trace, on, options, formats)
    elif "host_memory_gb" in options:
        _tiers(trace, on, options)
    elif options.sweep:
        _sweep(trace, on, options.output_dir)
    else:
        _one_setting(trace, on, shape, options)


def _routing(options: argparse.Namespace, shape: ModelShape | None) -> Trace:
    if options.trace is None:
        if shape is None:
            raise UserError("expected a TRACE, or --model for typical synthetic routing")
        workload = typical_workload(shape.n_layers, shape.n_experts, shape.top_k)
        return replace(workload, name=f"of {shape.name}").generate(SYNTHETIC_TOKENS)
    trace = read_trace(options.trace, shape.n_experts if shape is not None else None)
    if shape is not None:
        _check_shape(trace, shape)
    return trace


def _check_shape(trace: Trace, shape: ModelShape) -> None:
    """UserError for a trace of another model; a trace that keeps fewer choices is told of."""
    n_layers, top_k = trace.n_layers, trace.info.top_k
    if n_layers != shape.n_layers or trace.n_experts > shape.n_experts or top_k > shape.top_k:
        raise UserError(
            f"expected a trace of {shape.name}, which has {shape.n_layers} MoE layers, top-"
            f"{shape.top_k} of {shape.n_experts} experts, found one of {trace.info.model} with "
            f"{n_layers}, top-{top_k} of {trace.n_experts}; correct --model or the trace"
        )
    if top_k < shape.top_k:
        print(
            f"note: the trace holds {top_k} of each token's {shape.top_k} experts in "
            f"{shape.name}: it computes and reads fewer than the model"
        )


def _print_trace(trace: Trace) -> None:
    info = trace.info
    kind = "SYNTHETIC routing" if info.synthetic else "routing"
    print(
        f"{kind}: {plain(info.model)}, {info.n_layers} layers, top-{info.top_k} of "
        f"{trace.n_experts}, {trace.passes.n_decoded} decoded tokens"
    )
    for note in info.notes:
        print(f"note: {plain(note)}")
    if any(one.phase == "prefill" and not one.ids for one in trace.passes):
        print(
            "note: the trace leaves prompts out: how they warmed the cache is not known and not "
            "replayed; a run's routing.jsonl, which --output-dir keeps, has them"
        )


def _one_setting(
    trace: Trace, on: _Host | None, shape: ModelShape | None, options: argparse.Namespace
) -> None:
    given = {name: value for name, value in vars(options).items() if name in _CACHE_FLAGS}
    cache = chosen(CacheOptions, given)
    if not cache.n_slots:
        raise UserError(
            "expected --cache-nblocks and --cache-nways, found none; give them, or --sweep, --tune "
            "or --paper"
        )
    asked = f"{cache.n_indexes} x {cache.n_ways}"
    # The part of the cache that the trace's model can use, as the engine cuts it.
    n_indexes, n_ways = min(cache.n_indexes, trace.n_layers), min(cache.n_ways, trace.n_experts)
    cache = replace(cache, n_indexes=n_indexes, n_ways=n_ways)
    if asked != f"{n_indexes} x {n_ways}":
        print(
            f"note: cache {asked} cut to {n_indexes} x {n_ways}: the trace has {trace.n_layers} "
            f"MoE layers of {trace.n_experts} experts"
        )
    if n_ways < trace.info.top_k:
        print(
            f"warning: {n_ways} ways hold fewer than the top-{trace.info.top_k} "
            "experts of one token: most of what is fetched is evicted unused"
        )
    if on is not None:
        on.require_memory(cache)
    result = run_setting(trace, cache, None if on is None else on.costs)
    block_bytes = None if shape is None else shape.block_bytes(options.expert_dtype or "bf16")
    _print_hits(trace, cache, result, block_bytes)
    if on is not None:
        _print_times(result, on)


def _host_gb(options: argparse.Namespace) -> float:
    host_gb: float = options.host_memory_gb
    require_range("--host-memory-gb", host_gb, 0, LARGEST, above=0)
    return host_gb


def _disk(machine: Machine, options: argparse.Namespace) -> Disk:
    """The hardware file's, or what flags say; UserError where neither does."""
    gbps, latency_us, disk = options.disk_gbps, options.disk_latency_us, machine.disk
    if gbps is not None or disk is None:
        if gbps is None:
            raise UserError(
                "--host-memory-gb needs the disk's speed: give --disk-gbps, or a hardware file "
                "with disk: {gbps: ..., latency_us: ...}"
            )
        require_range("--disk-gbps", gbps, 1e-3, 1e3)
        disk = Disk(gbps, _DISK_LATENCY_US)
    if latency_us is not None:
        require_range("--disk-latency-us", latency_us, 0, 1e9)
        disk = replace(disk, latency_us=latency_us)
    return disk


def _tiers(trace: Trace, on: _Host | None, options: argparse.Namespace) -> None:
    """What host memory of --host-memory-gb over a disk gives."""
    if on is None:
        raise UserError("--host-memory-gb needs --hardware and --model: give a file of hardware/")
    given = vars(options)
    host_gb, disk = _host_gb(options), _disk(on.machine, options)
    costs = replace(on.costs, disk=disk)
    policy = given.get("host_policy", "LFRU")
    sizes = [costs.block_bytes] * trace.n_layers
    ways = ways_within(int(host_gb * 1e9), sizes, [trace.n_experts] * trace.n_layers)
    if not min(ways):
        raise UserError(
            f"expected --host-memory-gb for at least one expert of each layer, "
            f"{sum(sizes) / 1e9:.3g} GB, found {host_gb:g}"
        )
    cache = chosen(CacheOptions, {name: given[name] for name in _CACHE_FLAGS if name in given})
    on.require_memory(cache)
    result = replay_tiers(trace, ways, policy, costs, cache)
    all_gb = trace.n_layers * trace.n_experts * costs.block_bytes / 1e9
    print(
        f"host memory: {host_gb:g} GB for {all_gb:.1f} GB of experts: {min(ways)} of "
        f"{trace.n_experts} of each layer, {policy}; disk: {disk.gbps:g} GB/s, "
        f"{disk.latency_us:g} us"
    )
    n_tokens = result.n_decode_tokens
    missed_gb = result.misses * costs.block_bytes / 1e9 / n_tokens
    print(
        f"decode: {result.hit_percent:.1f}% of the experts asked of host memory are there, "
        f"{missed_gb:.2f} GB are read from disk a token"
        + (f"; {result.gpu_hits / n_tokens:.1f} a token hit on the GPU" if cache.n_slots else "")
    )
    if not cache.n_slots:
        best = most_hits(trace.passes, trace.n_layers, max(ways))
        print(f"Belady's optimum, with bypass: {100 * best / trace.n_chosen:.1f}%")
    step_ms, waited_ms = (us / 1e3 / n_tokens for us in (result.decode_us, result.waited_us))
    print(f"predicted on {on.machine.name}, {on.machine.cpu.cores} cores:")
    print(
        f"  {result.tokens_per_s:.2f} tokens/s, {step_ms:.1f} ms a token, "
        f"{waited_ms:.1f} ms of it waiting for the disk"
    )
    if not cache.n_slots:
        bound = bound_tokens_per_s(trace, max(ways), costs)
        print(f"  bound (perfect prediction, full overlap): {bound:.2f} tokens/s")
    print(f"  {on.limit()}")


def _print_hits(
    trace: Trace, cache: CacheOptions, result: Replay, expert_bytes: int | None
) -> None:
    size = f", {cache.n_slots * expert_bytes / 1e9:.2f} GB" if expert_bytes else ""
    print(
        f"cache: {cache.n_indexes} indexes x {cache.n_ways} ways, {cache.policy}, quota "
        f"{cache.quota}: {cache.n_slots} slots{size}"
    )
    for phase, hits in (("decode", result.decode), ("prefill", result.prefill)):
        if hits.pairs:
            print(
                f"{phase} hits: at least one {hits.at_least_one_percent:.1f}%, at least two "
                f"{hits.at_least_two_percent:.1f}%, per expert {hits.per_expert_percent:.1f}%"
            )
    once = ""
    if result.looked_up != result.decode.hits + result.decode.misses:  # a batch
        once = f"each expert counted once in a pass, hits: {result.found_percent:.1f}%; "
    print(f"{once}Belady's optimum, with bypass: {result.bound_percent:.1f}%")
    print(f"fetches: {result.fetches}, evictions: {result.evictions}")
    if expert_bytes:
        missed = (trace.n_chosen - result.found) * expert_bytes
        print(
            f"bytes: {result.fetches * expert_bytes / 1e9:.2f} GB fetched, "
            f"{missed / 1e9:.2f} GB read by the CPU, "
            f"{result.found * expert_bytes / 1e9:.2f} GB read in slots"
        )


def _print_times(result: Replay, on: _Host) -> None:
    busy, machine = result.busy, on.machine
    total_us = result.decode_us + result.prefill_us
    joules = machine.joules(total_us, busy)
    energy = f", {joules / result.n_decode_tokens:.1f} J a token" if joules else ""
    print(f"predicted on {machine.name}, {machine.cpu.cores} cores, PCIe {machine.bus.pcie}.0:")
    print(
        f"  {result.tokens_per_s:.2f} tokens/s, {1e3 / result.tokens_per_s:.1f} ms a token{energy}"
    )
    cpu, bus, gpu = (100 * us / total_us for us in (busy.cpu_us, busy.copy_us, busy.gpu_us))
    print(f"  busy: CPU {cpu:.0f}%, bus {bus:.0f}%, GPU {gpu:.0f}%")
    print(
        f"  bound (perfect prediction, full overlap): {result.bound_tokens_per_s:.2f} tokens/s; "
        f"reached {100 * result.tokens_per_s / result.bound_tokens_per_s:.0f}%"
    )
    print(f"  {on.limit()}")


def _sweep(trace: Trace, on: _Host | None, output_dir: Path) -> None:
    from moe_offload.report.drawing import house_style, save_drawing  # matplotlib: 1 s
    from moe_offload.report.figures import draw_sweep

    make_writable(output_dir, "--output-dir")
    costs, free_bytes = (on.costs, on.cache_bytes) if on else (None, 0.0)
    rows = sweep(trace, grid(trace), costs, os.cpu_count() or 1, free_bytes)
    if on and not any(row.fits for row in rows):
        raise UserError(
            f"expected a GPU that holds {rows[0].slots} experts beside the dense weights, found "
            f"{free_bytes / 1e9:.1f} GB left; sweep without --hardware, or for a larger GPU"
        )
    where = f" on {on.machine.name}, {on.machine.cpu.cores} cores" if on else ""
    kind = " (synthetic routing)" if trace.info.synthetic else ""
    with house_style():
        drawing = draw_sweep(rows, f"{trace.info.model}{kind}{where}")
    paths = save_drawing(drawing, output_dir)
    print(
        f"{'N':>4} {'M':>4} {'policy':<7}{'slots':>6}{'>=1':>7}{'>=2':>7}{'expert':>8}"
        f"{'bound':>7}{'tok/s':>8}"
    )
    for row in rows:
        speed = f"{row.tokens_per_s:8.2f}" if row.tokens_per_s else f"{'-':>8}"
        print(
            f"{row.n_indexes:>4} {row.n_ways:>4} {row.policy:<7}{row.slots:>6}{row.hit_one:7.1f}"
            f"{row.hit_two:7.1f}{row.hit_expert:8.1f}{row.bound_bypass:7.1f}{speed}"
            + ("  does not fit" if row.fits is False else "")
        )
    if on:
        print(on.limit())
    print(f"{len(rows)} settings: wrote {', '.join(map(str, paths))}")


def _tune(trace: Trace, on: _Host, options: argparse.Namespace, formats: Sequence[str]) -> None:
    memory_gb = options.memory_gb
    memory_bytes, machine = on.cache_bytes, on.machine
    if memory_bytes < 0:
        raise UserError(
            f"expected GPU memory for {on.shape.name}'s dense weights, found "
            f"{machine.gpu.memory_gb:g} GB; give the hardware file of a larger GPU"
        )
    if memory_gb is not None:
        require_range("--memory-gb", memory_gb, 0, memory_bytes / 1e9)
        memory_bytes = memory_gb * 1e9
    costs = {name: machine.cost_model(on.shape, name) for name in formats}
    host_bytes = None
    if "host_memory_gb" in options:
        host_bytes = int(_host_gb(options) * 1e9)
        largest = max(one.block_bytes for one in costs.values())
        if host_bytes < trace.n_layers * trace.n_experts * largest:
            disk = _disk(machine, options)
            costs = {name: replace(one, disk=disk) for name, one in costs.items()}
    print(
        f"on {machine.name}, {machine.cpu.cores} cores; up to {memory_bytes / 1e9:.1f} GB of slots"
    )
    host_policy = vars(options).get("host_policy", "LFRU")
    points = tune(trace, int(memory_bytes), costs, host_bytes, host_policy)
    if not points:
        raise UserError(
            f"expected --host-memory-gb for at least one expert of each layer, found "
            f"{options.host_memory_gb:g}"
        )
    print(f"{'format':<7}{'host':>5}{'N':>4}{'M':>5} {'policy':<7}{'GB':>7}{'tok/s':>8}")
    for point in points:
        mark, cache = "  *" if point.on_front else "", point.cache
        print(
            f"{point.weight_format:<7}{point.host_ways:>5}{cache.n_indexes:>4}{cache.n_ways:>5} "
            f"{cache.policy:<7}{point.cache_bytes / 1e9:7.2f}{point.tokens_per_s:8.2f}{mark}"
        )
    print(on.limit())
    print("host: experts of each layer in host memory, the others are on disk; GB: of GPU slots")
    print("*: on the Pareto front of speed and memory. Only bf16 gives the model's exact numbers.")
    best = max(points, key=lambda point: point.tokens_per_s)
    cache = best.cache
    flags = f"--cache-nblocks {cache.n_indexes} --cache-nways {cache.n_ways}"
    flags += f" --cache-replace-policy {cache.policy} --cache-quota {cache.quota}"
    print(f"fastest: {flags}, experts in {best.weight_format}")


def _calibrate(path: Path, shape: ModelShape | None) -> None:
    if shape is None:
        raise UserError("--calibrate needs --model: measured with experts of which shape?")
    from moe_offload.commands.measure import measure_machine  # torch: no other task needs it

    make_writable(path.parent, "--calibrate")
    if path.is_dir():
        raise UserError(f"expected --calibrate to name a file to write, found the folder {path}")
    machine = measure_machine(path, shape)
    bus_gbps = machine.bus.gbps[machine.bus.pcie]
    print(
        f"{machine.name}: {machine.cpu.cores} cores read {machine.cpu.gbps:.1f} GB/s of experts, "
        f"the bus {bus_gbps:.1f} GB/s, the GPU {machine.gpu.gbps:.1f} GB/s"
    )
    print(f"wrote {path}")
