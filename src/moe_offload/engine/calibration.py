"""This machine's cost model for one loaded model, measured in a few seconds and kept on disk.

About ten numbers: what an expert costs on the CPU and on the accelerator, what a copy costs alone
and beside the CPU's experts, what the rest of a decode layer costs, how fast plain reading is, and
from how many tokens on torch's oneDNN multiplies bf16 faster than our kernels. Only a CPU with AMX
or AVX512-BF16 is asked for the last; where oneDNN is not clearly faster it is never used.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from math import inf, isfinite
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from moe_offload.engine.timing import (
    SIDE_CALLS,
    Counts,
    QuietWatch,
    Steadiness,
    calibrate_copy,
    calibrate_side,
    fit_line,
    median_us,
    medians_in_turn_us,
)
from moe_offload.errors import UserError
from moe_offload.experts.costs import CostModel, SideCost
from moe_offload.experts.fetcher import ExpertFetcher, make_fetcher
from moe_offload.experts.recorder import Recorder
from moe_offload.experts.slots import GpuExperts
from moe_offload.experts.store import ExpertStore
from moe_offload.files import from_json, read_json_object, user_cache, write_atomically
from moe_offload.kernels.cpu_experts import CpuExperts
from moe_offload.kernels.cpu_linear import CpuLinear
from moe_offload.machine.hardware import Hardware

UNSTEADY = "this machine's speed varied while it was measured"
# From the most: where oneDNN loses, nothing less is measured.
CROSSOVER_TOKENS = (256, 64, 16)
_CROSSOVER_MARGIN = 0.05
_BF16_FLAGS = frozenset(["avx512_bf16", "amx_bf16"])
_CROSSOVER_BYTES = 1 << 26  # of experts that the kernels and oneDNN are compared on
_STEP_BUDGET_S = 0.3
_READ_BYTES = 1 << 29  # twice the largest last-level cache met so far
_READS = 5
MAX_AGE_S = 30 * 24 * 3600.0


@dataclass(frozen=True)
class Crossover:
    """From how many tokens on oneDNN computes `what` faster; `from_tokens` is None for never.

    `tokens`, descending, are what was measured; `kernels_us` and `onednn_us` are medians.
    """

    what: str
    from_tokens: int | None
    tokens: tuple[int, ...]
    kernels_us: tuple[float, ...]
    onednn_us: tuple[float, ...]

    def __str__(self) -> str:
        times = f"{self.onednn_us[0] / 1e3:.3g} ms, the kernels {self.kernels_us[0] / 1e3:.3g} ms"
        comparison = f"({self.tokens[0]} tokens: oneDNN {times})"
        if self.from_tokens is None:
            return f"{self.what}: the kernels {comparison}"
        return f"{self.what}: torch's oneDNN from {self.from_tokens} tokens on {comparison}"


@dataclass(frozen=True)
class MachineCosts:
    """The cost model, and the plain-read bandwidth that the CPU kernels are held against.

    And how quiet the machine was while both were measured, and where oneDNN is faster than the
    kernels, for experts and for a layer's dense part: None where that is out of the question, by
    another format, a forced kernel or a CPU without bf16 products.
    """

    model: CostModel
    read_gbps: float
    steadiness: Steadiness
    onednn_experts: Crossover | None = None
    onednn_dense: Crossover | None = None

    def __post_init__(self) -> None:
        if not 0 < self.read_gbps < inf:
            raise ValueError(f"a memory that no machine has: {self.read_gbps} GB/s")

    @property
    def crossovers(self) -> list[Crossover]:
        """Of oneDNN and the kernels: those that were measured."""
        return [one for one in (self.onednn_experts, self.onednn_dense) if one is not None]

    def to_json(self) -> dict[str, Any]:
        """As run.json has it: the cost model is its `costs`."""
        data = asdict(self)
        return {"costs": data.pop("model"), **data}

    def notes(self) -> list[str]:
        """Lines for the user: where the figures are not to be trusted, what oneDNN computes."""
        lines = [str(one) for one in self.crossovers if one.from_tokens is not None]
        if self.steadiness.is_quiet:
            return lines
        rough = "take predictions and shares of limits as rough; the next run measures again"
        return [f"{UNSTEADY} ({self.steadiness}): {rough}", *lines]

    def describe(self, in_memory: bool = True) -> list[str]:
        """The figures as lines for people; `in_memory`: no cache of the CPU's holds the experts."""
        costs = self.model
        expert_us = costs.cpu.one_us(1)
        expert_gbps = costs.block_bytes / expert_us / 1e3 if expert_us > 0 else 0.0
        share = f"{100 * expert_gbps / self.read_gbps:.0f}% of plain read"
        if not in_memory or expert_gbps > 1.1 * self.read_gbps:
            share = "no measure of memory: so few weights stay in the CPU's caches"
        lines = [
            f"memory, plain read: {self.read_gbps:.1f} GB/s",
            f"one expert ({costs.block_bytes / 1e6:.1f} MB) on the CPU, one token: "
            f"{_time(expert_us)} ({expert_gbps:.1f} GB/s, {share}), "
            f"{_more_tokens(costs.cpu)}",
            *map(str, self.crossovers),
            f"a decode layer without its experts: {_time(costs.dense_us_per_layer)}, "
            f"a step beside its layers: {_time(costs.step_us)}",
        ]
        if isfinite(costs.gpu.expert_us):
            lines += [
                f"one expert on the accelerator, one token: "
                f"{_time(costs.gpu.one_us(1))}, {_more_tokens(costs.gpu)}",
                f"copies to the accelerator: {costs.copy_gbps:.1f} GB/s alone, "
                f"{costs.copy_gbps_shared:.1f} GB/s while the CPU computes experts; one expert "
                f"{_time(costs.copy_us(shared=False))} and {_time(costs.copy_us(shared=True))}",
                f"CPU experts while copies run: {costs.cpu_shared_factor:.2f} x their time",
            ]
        else:
            lines.append("accelerator and copies: not measured, this run has no accelerator")
        return [*lines, f"while measuring: {self.steadiness}"]


def _more_tokens(side: SideCost) -> str:
    few = "".join(f"{tokens} tokens {_time(us)}, " for tokens, us in side.few[1:])
    return f"{few}each further token {_time(side.token_us)}, a call {_time(side.call_us)}"


def _time(us: float) -> str:
    return f"{us / 1e3:.2f} ms" if us >= 1000 else f"{us:.3g} us"


@dataclass(frozen=True)
class Calibration:
    """What is measured of one loaded model, and which machine's and model's costs it gives.

    `decode_step` runs one decode step with every expert left out, for the cost of the rest;
    `blocks` are its MoE layers' modules, which it passes in turn; `dense` describes the weights
    that are no expert's. Without `gpu` its costs and the copies' are infinite: nothing is ever sent
    there. `linears` are one layer's that oneDNN may compute.
    """

    store: ExpertStore
    cpu: CpuExperts
    gpu: GpuExperts | None
    decode_step: Callable[[], None]
    blocks: Sequence[nn.Module]
    dtype: torch.dtype
    dense: str
    linears: Sequence[CpuLinear] = ()
    emulate_pcie_gbps: float | None = None

    def costs(self, hardware: Hardware, again: bool = False) -> MachineCosts:
        """This machine's costs, from disk where they are known; `again` measures anew.

        What was measured on a busy machine is kept for this process alone.
        """
        key, shape = hardware.key(), self._shape()
        facts = json.dumps([key, shape], sort_keys=True, default=str)
        name = f"calibration-{hashlib.sha256(facts.encode()).hexdigest()[:16]}.json"
        path = user_cache() / name
        known = None if again else _read_kept(path)
        if known is not None and known.model.block_bytes == shape["layout"]["block_bytes"]:
            return known
        if sys.stderr.isatty():
            print("measuring this machine: a few seconds, then kept for a month", file=sys.stderr)
        costs = self._measure()
        if has_bf16_products(hardware.isa):
            costs = self._with_onednn(costs)
        # 30 days of another program's noise are worse than none; but a process measures once.
        lasts = costs.steadiness.is_quiet
        if lasts or not again:
            kept = _Kept(time.time(), key, shape, costs, None if lasts else _this_process())
            with suppress(OSError):  # a folder that cannot be written: measured again next time
                write_atomically(path, json.dumps(asdict(kept), indent=2, default=str) + "\n")
        return costs

    def _shape(self) -> dict[str, Any]:
        """All beside the hardware that the costs depend on."""
        return {
            "layout": asdict(self.store.layouts[0]),
            "n_layers": self.store.n_layers,
            "n_experts": self.store.n_experts[0],
            "cpu": self.cpu.description,
            "onednn": [self.cpu.suits_onednn, len(self.linears), torch.__version__],
            "gpu": None if self.gpu is None else self.gpu.description,
            "threads": torch.get_num_threads(),
            "dtype": str(self.dtype),
            "dense": self.dense,
            "emulate_pcie_gbps": self.emulate_pcie_gbps,
            # Another version's is another.
            "measured": [each.name for each in (*fields(CostModel), *fields(SideCost))],
        }

    def _measure(self) -> MachineCosts:
        block_bytes = self.store.layouts[0].block_bytes
        run_cpu = cpu_runner(self.store, self.cpu.with_onednn(None), self.dtype)
        two_experts = partial(run_cpu, (1, 1))
        watch = QuietWatch(two_experts)
        watch.burst()
        calls = [counts for counts in SIDE_CALLS if len(counts) <= self.store.n_experts[0]]
        cpu_cost = calibrate_side(run_cpu, calls)
        watch.burst()
        layer_us, step_us = dense_costs(self.decode_step, self.blocks, two_experts)
        model = CostModel(
            cpu=cpu_cost,
            gpu=SideCost(0.0, inf, 0.0),
            copy_call_us=0.0,
            copy_gbps=1e-9,
            copy_gbps_shared=1e-9,
            cpu_shared_factor=1.0,
            block_bytes=block_bytes,
            dense_us_per_layer=layer_us,
            step_us=step_us,
        )
        if self.gpu is not None:
            with gpu_runner(self.store, self.gpu, self.dtype) as run_gpu:
                calls = [counts for counts in calls if len(counts) <= self.gpu.n_slots]
                model = replace(model, gpu=calibrate_side(run_gpu, calls))
            with copier(self.store, self.gpu, self.emulate_pcie_gbps) as copy_bytes:
                model = calibrate_copy(model, copy_bytes, two_experts)
        read_gbps = plain_read_gbps(self.store, self.cpu)
        watch.burst()
        return MachineCosts(model, read_gbps, watch.result())

    def _with_onednn(self, costs: MachineCosts) -> MachineCosts:
        if self.cpu.suits_onednn and self.dtype == torch.bfloat16:
            n_fitting = max(1, _CROSSOVER_BYTES // costs.model.block_bytes)
            n = min(n_fitting, self.store.n_experts[0])

            def experts(onednn_tokens: int | None) -> Callable[[int], None]:
                run = cpu_runner(self.store, self.cpu.with_onednn(onednn_tokens), self.dtype)
                return lambda n_tokens: run((n_tokens,) * n)

            what = f"{f'{n} ' if n > 1 else ''}experts with many tokens"
            found = measure_crossover(what, experts(None), experts(1))
            costs = replace(costs, onednn_experts=found)
            if found.from_tokens is not None:
                fixed_us, token_us = fit_line(found.tokens, found.onednn_us)
                many = SideCost(0.0, fixed_us / n, token_us / n)
                model = replace(costs.model, cpu_many=many, cpu_many_tokens=found.from_tokens)
                costs = replace(costs, model=model)
        if self.linears:
            linears = [copy.copy(linear) for linear in self.linears]

            def dense(onednn_tokens: int | None, n_tokens: int) -> None:
                for linear in linears:
                    linear.onednn_tokens = onednn_tokens
                    linear(torch.ones(n_tokens, linear.in_features, dtype=torch.bfloat16))

            what = "a layer's dense part, many tokens"
            found = measure_crossover(what, partial(dense, None), partial(dense, 1))
            costs = replace(costs, onednn_dense=found)
        return costs


@dataclass(frozen=True)
class _Kept:
    """A calibration's file; `process` is the only one that believes what is not to last."""

    measured_unix_s: float
    hardware: Any
    shape: Any
    calibration: MachineCosts
    process: tuple[float, ...] | None


def _read_kept(path: Path) -> MachineCosts | None:
    """The costs in a file; None where it expired, is another process's, damaged or not there."""
    try:
        kept = from_json(_Kept, read_json_object(path))
    except (UserError, ValueError, OverflowError):
        return None
    is_fresh = 0 <= time.time() - kept.measured_unix_s <= MAX_AGE_S
    return kept.calibration if is_fresh and kept.process in (None, _this_process()) else None


def _this_process() -> tuple[float, ...]:
    return float(os.getpid()), psutil.Process().create_time()


def plain_read_gbps(store: ExpertStore, cpu: CpuExperts) -> float:
    """Plain-read bandwidth on the kernels' own threads; through torch where no kernel runs."""
    kernels, blocks = cpu.kernels, store.blocks(0)
    if kernels is not None and blocks.nbytes >= _READ_BYTES:
        memory = blocks.view(-1)[:_READ_BYTES]
        return statistics.median(kernels.read_gbps(memory) for _ in range(_READS))
    buffer = torch.ones(_READ_BYTES // 4)
    return buffer.nbytes / median_us(buffer.sum, budget_s=0.2) / 1e3


Call = tuple[Tensor, Tensor, Tensor]  # hidden [T, H], ids int64 [T, 1], weights fp32 [T, 1]


def _calls(
    store: ExpertStore, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Callable[[Counts, int, int], Call]:
    """A call over so many tokens on each of the experts `first`, `first + 1`, ... of `n`.

    What a layer has at hand is made once, and is no part of a call's cost. The ids stay on the CPU.
    """
    width = store.layouts[0].hidden_size
    hidden = cache(lambda n_tokens: torch.ones(n_tokens, width, dtype=dtype, device=device))
    weights = cache(lambda n_tokens: torch.ones(n_tokens, 1, device=device))

    @cache
    def call(counts: Counts, first: int, n: int) -> Call:
        ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        return hidden(len(ids)), (ids[:, None] + first) % n, weights(len(ids))

    return call


def cpu_runner(store: ExpertStore, cpu: CpuExperts, dtype: torch.dtype) -> Callable[[Counts], None]:
    """Calls over the CPU's experts, others every time: nothing may be left in a cache."""
    turns, call = itertools.count(), _calls(store, dtype)
    masks = [torch.ones(n, dtype=torch.uint8) for n in store.n_experts]
    out_of = cache(lambda counts: torch.empty(sum(counts), store.layouts[0].hidden_size))

    def run(counts: Counts) -> None:
        turn = next(turns)
        layer = turn % store.n_stored  # the layers beyond use the same memory
        first, n = turn // store.n_stored * len(counts), store.n_experts[layer]
        hidden, index, weights = call(counts, first % n, n)
        cpu.run(hidden, store.pointers(layer), masks[layer], index, weights, out_of(counts))

    return run


def _blocks_in_turn(store: ExpertStore) -> Iterator[Tensor]:
    """Every block in memory, over and over: a layer's experts one after another."""
    layers = range(store.n_stored)
    return itertools.cycle(block for layer in layers for block in store.blocks(layer))


@contextmanager
def gpu_runner(
    store: ExpertStore, gpu: GpuExperts, dtype: torch.dtype
) -> Iterator[Callable[[Counts], None]]:
    """The same over the accelerator's slots, which are filled first; all of them in turn.

    A few slots alone would stay in a GPU's own cache, where a run's experts are not.
    """
    for slot, block in zip(gpu.slots, _blocks_in_turn(store), strict=False):
        slot.copy_(block)
    call, first = _calls(store, dtype, gpu.device), 0

    @cache
    def launch(counts: Counts, first: int) -> tuple[Tensor, list[int], Tensor]:
        hidden, slots, weights = call(counts, first, gpu.n_slots)
        return hidden, slots.flatten().tolist(), weights

    def run(counts: Counts) -> None:
        nonlocal first
        gpu.launch(*launch(counts, first), fetcher).result()
        first = (first + len(counts)) % gpu.n_slots
        if gpu.device.type == "cuda":
            torch.cuda.synchronize(gpu.device)

    with closing(make_fetcher(gpu.device, gpu.slots)) as fetcher:
        yield run


@contextmanager
def copier(
    store: ExpertStore, gpu: GpuExperts, emulate_pcie_gbps: float | None
) -> Iterator[Callable[[int], None]]:
    """Copies the first bytes of one block after another to the accelerator's last slot."""
    blocks = _blocks_in_turn(store)
    with ExitStack() as fetchers:

        @cache
        def fetcher_of(n_bytes: int) -> ExpertFetcher:
            slots = gpu.slots[:, :n_bytes]
            fetcher = make_fetcher(gpu.device, slots, emulate_pcie_gbps)
            return fetchers.enter_context(closing(fetcher))

        def copy_bytes(n_bytes: int) -> None:
            fetcher = fetcher_of(n_bytes)
            fetcher.fetch(gpu.n_slots - 1, next(blocks)[:n_bytes])
            for completion in fetcher.drain():
                if completion.error is not None:
                    raise UserError(f"calibration could not copy an expert: {completion.error}")

        yield copy_bytes


def dense_costs(
    decode_step: Callable[[], None],
    blocks: Sequence[nn.Module],
    experts: Callable[[], None],
) -> tuple[float, float]:
    """(us a layer, us a step beside its layers) of decode steps without their experts.

    A layer is what lies between the starts of two MoE `blocks`; with one block alone, the whole
    step. Medians of steps behind some `experts` that have emptied the caches: what runs between
    the experts of a real step finds neither its weights nor its code there.
    """
    starts_s: list[float] = []
    handles = [
        block.register_forward_pre_hook(lambda *_: starts_s.append(time.perf_counter()))
        for block in blocks
    ]
    layers_us: list[float] = []
    steps_us: list[float] = []
    n = len(blocks)
    try:
        decode_step()
        began_s = time.perf_counter()
        while len(steps_us) < 5 or time.perf_counter() < began_s + _STEP_BUDGET_S:
            experts()
            starts_s.clear()
            started_s = time.perf_counter()
            decode_step()
            steps_us.append(1e6 * (time.perf_counter() - started_s))
            first_s, last_s = starts_s[0], starts_s[-1]
            layers_us.append(1e6 * (last_s - first_s) / (n - 1) if n > 1 else steps_us[-1])
    finally:
        for handle in handles:
            handle.remove()
    layer_us = statistics.median(layers_us)
    return layer_us, max(0.0, statistics.median(steps_us) - n * layer_us)


def measure_crossover(
    what: str,
    kernels: Callable[[int], object],
    onednn: Callable[[int], object],
    budget_s: float = 0.1,
) -> Crossover:
    """The least of `CROSSOVER_TOKENS` from which `onednn` is faster by `_CROSSOVER_MARGIN`.

    Both are called with a number of tokens, in turn, at least three times and for about `budget_s`.
    """
    from_tokens: int | None = None
    kernels_us: list[float] = []
    onednn_us: list[float] = []
    for n in CROSSOVER_TOKENS:
        works = [partial(kernels, n), partial(onednn, n)]
        ours_us, theirs_us = medians_in_turn_us(works, 3, budget_s / 2)
        kernels_us.append(ours_us)
        onednn_us.append(theirs_us)
        if theirs_us > (1 - _CROSSOVER_MARGIN) * ours_us:
            break
        from_tokens = n
    tokens = CROSSOVER_TOKENS[: len(onednn_us)]
    return Crossover(what, from_tokens, tokens, tuple(kernels_us), tuple(onednn_us))


def has_bf16_products(cpu_flags: Collection[str]) -> bool:
    """Whether a CPU with these flags (`Hardware.isa`) has AMX or AVX512-BF16."""
    return not _BF16_FLAGS.isdisjoint(cpu_flags)


def predicted_step_us(recorder: Recorder, costs: CostModel) -> float | None:
    """What `costs` predict for the mean decode step that was recorded, or None without one.

    Each layer's prediction takes the numbers of experts that really ran on either side.
    """
    decode = recorder.pass_table()["decode"]
    layers = recorder.layer_table()
    layers = layers[decode[layers["pass_index"]]]
    if not len(layers):
        return None
    gpu, waited, cpu = (
        layers[name] // costs.block_bytes for name in ("gpu_bytes", "waited_bytes", "cpu_bytes")
    )
    columns = (gpu - waited, cpu, layers["fetches"] > 0, waited)
    total_us = 0.0  # the few different layers, each as often as it came
    for layer, n in Counter(zip(*(c.tolist() for c in columns), strict=True)).items():
        n_gpu, n_cpu, copying, n_waited = layer
        total_us += n * costs.decode_layer_us(n_gpu, n_cpu, copying, n_waited=n_waited)
    return total_us / int(decode.sum()) + costs.step_us
