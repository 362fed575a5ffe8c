"""This machine's cost model for one loaded model, measured in a few seconds and kept on disk.

About ten numbers: what an expert costs on the CPU and on the accelerator, what a copy costs alone
and beside the CPU's experts, what the rest of a decode layer costs, how fast plain reading is, and
from how many tokens on torch's oneDNN multiplies bf16 faster than our kernels. Only a CPU with AMX
or AVX512-BF16 is asked for the last; where oneDNN is not clearly faster it is never used.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from moe_offload.engine.timing import (
    SIDE_CALLS,
    CalibrationCache,
    CopyCost,
    Counts,
    QuietWatch,
    Steadiness,
    calibrate_copy,
    calibrate_side,
    fit_line,
    median_us,
)
from moe_offload.errors import UserError
from moe_offload.experts.costs import CostModel, SideCost
from moe_offload.experts.fetcher import ExpertFetcher, make_fetcher
from moe_offload.experts.recorder import Recorder
from moe_offload.experts.slots import GpuExperts
from moe_offload.experts.store import ExpertStore
from moe_offload.files import from_json
from moe_offload.kernels.cpu_experts import CpuExperts
from moe_offload.kernels.cpu_linear import CpuLinear
from moe_offload.machine.hardware import Hardware

UNSTEADY = "this machine's speed varied while it was measured"
# From the most: where oneDNN loses, nothing less is measured.
CROSSOVER_TOKENS = (256, 64, 16)
_BF16_FLAGS = frozenset(["avx512_bf16", "amx_bf16"])
_CROSSOVER_BYTES = 1 << 26  # of experts that the kernels and oneDNN are compared on
_STEP_BUDGET_S = 0.3
_READ_BYTES = 1 << 29  # twice the largest last-level cache met so far
_READS = 5


@dataclass(frozen=True)
class Crossover:
    """From how many tokens on oneDNN is the faster; `from_tokens` is None where it never is.

    `tokens`, descending, are what was measured; `kernels_us` and `onednn_us` are medians.
    """

    from_tokens: int | None
    tokens: tuple[int, ...]
    kernels_us: tuple[float, ...]
    onednn_us: tuple[float, ...]

    def __str__(self) -> str:
        times = f"{self.onednn_us[0] / 1e3:.3g} ms, the kernels {self.kernels_us[0] / 1e3:.3g} ms"
        comparison = f"{self.tokens[0]} tokens: oneDNN {times}"
        if self.from_tokens is None:
            return f"the kernels ({comparison})"
        return f"torch's oneDNN from {self.from_tokens} tokens on ({comparison})"


@dataclass(frozen=True)
class OnednnChoice:
    """Where oneDNN takes over: for an expert, and for the dense part by its rows.

    None where that is out of the question: another format, a forced kernel, a CPU without bf16
    products. The experts' times are of `n_experts` experts with so many tokens each.
    """

    experts: Crossover | None = None
    dense: Crossover | None = None
    n_experts: int = 1

    @property
    def expert_tokens(self) -> int | None:
        return None if self.experts is None else self.experts.from_tokens

    @property
    def dense_tokens(self) -> int | None:
        return None if self.dense is None else self.dense.from_tokens

    @property
    def expert_cost(self) -> SideCost | None:
        """What an expert with `expert_tokens` or more costs, or None where none goes there."""
        if self.experts is None or self.experts.from_tokens is None:
            return None
        fixed_us, token_us = fit_line(self.experts.tokens, self.experts.onednn_us)
        return SideCost(0.0, fixed_us / self.n_experts, token_us / self.n_experts)

    def describe(self, only_used: bool = False) -> list[str]:
        """What computes many tokens, as lines for people; `only_used`: where oneDNN does."""
        n = f"{self.n_experts} " if self.n_experts > 1 else ""
        found = (
            (f"{n}experts with many tokens", self.experts),
            ("a layer's dense part, many tokens", self.dense),
        )
        return [
            f"{what}: {crossover}"
            for what, crossover in found
            if crossover is not None and not (only_used and crossover.from_tokens is None)
        ]


@dataclass(frozen=True)
class MachineCosts:
    """The cost model, the plain-read bandwidth the CPU kernels are held against, how quiet the
    machine was while both were measured, and where oneDNN is faster than the kernels."""

    model: CostModel
    read_gbps: float
    steadiness: Steadiness
    onednn: OnednnChoice = field(default_factory=OnednnChoice)

    def __post_init__(self) -> None:
        if not 0 < self.read_gbps < float("inf"):
            raise ValueError(f"a memory that no machine has: {self.read_gbps} GB/s")

    def to_json(self) -> dict[str, Any]:
        """As run.json has it: the cost model is its `costs`."""
        data = asdict(self)
        return {"costs": data.pop("model"), **data}

    def notes(self) -> list[str]:
        """Lines for the user: where the figures are not to be trusted, what oneDNN computes."""
        lines = self.onednn.describe(only_used=True)
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
            *self.onednn.describe(),
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


def machine_costs(
    store: ExpertStore,
    cpu: CpuExperts,
    gpu: GpuExperts | None,
    decode_step: Callable[[], None],
    blocks: Sequence[nn.Module],
    hardware: Hardware,
    *,
    dtype: torch.dtype,
    dense: str,
    linears: Sequence[CpuLinear] = (),
    emulate_pcie_gbps: float | None = None,
    again: bool = False,
) -> MachineCosts:
    """The costs of this machine for the model in `store`, from disk where they are known.

    `decode_step` runs one decode step with every expert left out, for the cost of the rest;
    `blocks` are its MoE layers' modules, which it passes in turn. The calibration is keyed by the
    hardware, the block's layout, what computes it, the `dense` part's description and the emulated
    link; one taken on a busy machine is kept by this process alone. Without `gpu` its costs and the
    copies' are infinite: nothing is ever sent there. `linears` are one layer's that oneDNN may
    compute. `again` measures what is known already.
    """
    kept = CalibrationCache()
    shape = {
        "layout": asdict(store.layouts[0]),
        "n_layers": store.n_layers,
        "n_experts": store.n_experts[0],
        "cpu": cpu.description,
        "onednn": [cpu.suits_onednn, len(linears), torch.__version__],
        "gpu": None if gpu is None else gpu.description,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype),
        "dense": dense,
        "emulate_pcie_gbps": emulate_pcie_gbps,
        # Another version's is another.
        "measured": [each.name for each in (*fields(CostModel), *fields(SideCost))],
    }
    known = None if again else kept.load(hardware.key(), shape)
    if known is not None:
        # Damaged, of another version, or what no machine does: measured anew.
        with suppress(ValueError, OverflowError):
            costs = from_json(MachineCosts, known)
            if costs.model.block_bytes == store.layouts[0].block_bytes:
                return costs
    if sys.stderr.isatty():
        print("measuring this machine: a few seconds, then kept for a month", file=sys.stderr)
    cpu = cpu.with_onednn(None)
    costs = _measure(store, cpu, gpu, decode_step, blocks, dtype, emulate_pcie_gbps)
    if has_bf16_products(hardware.isa):
        choice = _compare_onednn(store, cpu, linears, dtype)
        model = replace(
            costs.model, cpu_many=choice.expert_cost, cpu_many_tokens=choice.expert_tokens or 0
        )
        costs = replace(costs, model=model, onednn=choice)
    # 30 days of another program's noise are worse than none; but a process measures once.
    if costs.steadiness.is_quiet or not again:
        kept.store(hardware.key(), shape, asdict(costs), lasting=costs.steadiness.is_quiet)
    return costs


def _measure(
    store: ExpertStore,
    cpu: CpuExperts,
    gpu: GpuExperts | None,
    decode_step: Callable[[], None],
    blocks: Sequence[nn.Module],
    dtype: torch.dtype,
    emulate_pcie_gbps: float | None,
) -> MachineCosts:
    run_cpu = cpu_runner(store, cpu, dtype)
    watch = QuietWatch(partial(run_cpu, (1, 1)))
    watch.burst()
    calls = [counts for counts in SIDE_CALLS if len(counts) <= store.n_experts[0]]
    cpu_cost = calibrate_side(run_cpu, calls)
    watch.burst()
    layer_us, step_us = dense_costs(decode_step, blocks, partial(run_cpu, (1, 1)))
    gpu_cost, copies = SideCost(0.0, float("inf"), 0.0), CopyCost(0.0, 1e-9, 1e-9, 1.0)
    if gpu is not None:
        with gpu_runner(store, gpu, dtype) as run_gpu:
            gpu_cost = calibrate_side(run_gpu, [c for c in calls if len(c) <= gpu.n_slots])
        with copier(store, gpu, emulate_pcie_gbps) as copy:
            copies = calibrate_copy(copy, store.layouts[0].block_bytes, partial(run_cpu, (1, 1)))
    read_gbps = plain_read_gbps(store, cpu)
    watch.burst()
    model = CostModel(
        cpu=cpu_cost,
        gpu=gpu_cost,
        **asdict(copies),
        block_bytes=store.layouts[0].block_bytes,
        dense_us_per_layer=layer_us,
        step_us=step_us,
    )
    return MachineCosts(model, read_gbps, watch.result())


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

    @cache
    def given(counts: Counts) -> tuple[Tensor, Tensor]:
        shape = sum(counts), store.layouts[0].hidden_size
        weights = torch.ones(shape[0], 1, device=device)
        return torch.ones(shape, dtype=dtype, device=device), weights

    @cache
    def call(counts: Counts, first: int, n: int) -> Call:
        ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        hidden, weights = given(counts)
        return hidden, (ids[:, None] + first) % n, weights

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
    while True:
        for layer in range(store.n_stored):
            yield from store.blocks(layer)


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
    fetcher = make_fetcher(gpu.device, gpu.slots)

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

    try:
        yield run
    finally:
        fetcher.close()


@contextmanager
def copier(
    store: ExpertStore, gpu: GpuExperts, emulate_pcie_gbps: float | None
) -> Iterator[Callable[[int], None]]:
    """Copies the first bytes of one block after another to the accelerator's last slot."""
    fetchers: dict[int, ExpertFetcher] = {}
    blocks = _blocks_in_turn(store)

    def copy(n_bytes: int) -> None:
        if n_bytes not in fetchers:
            slots = gpu.slots[:, :n_bytes]
            fetchers[n_bytes] = make_fetcher(gpu.device, slots, emulate_pcie_gbps)
        fetchers[n_bytes].fetch(gpu.n_slots - 1, next(blocks)[:n_bytes])
        for completion in fetchers[n_bytes].drain():
            if completion.error is not None:
                raise UserError(f"calibration could not copy an expert: {completion.error}")

    try:
        yield copy
    finally:
        for fetcher in fetchers.values():
            fetcher.close()


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
    kernels: Callable[[int], object],
    onednn: Callable[[int], object],
    tokens: Sequence[int] = CROSSOVER_TOKENS,
    margin: float = 0.05,
    budget_s: float = 0.1,
) -> Crossover:
    """The least of `tokens`, descending, from which `onednn` is faster by `margin`.

    Both are called with a number of tokens, in turn, at least three times and for about `budget_s`:
    a machine whose speed drifts is slow for either, and their medians are compared.
    """
    from_tokens: int | None = None
    medians_us: list[tuple[float, float]] = []
    for n in tokens:
        kernels_us: list[float] = []
        onednn_us: list[float] = []
        started_s = time.perf_counter()
        while len(onednn_us) < 3 or time.perf_counter() - started_s < budget_s:
            before_s = time.perf_counter()
            kernels(n)
            between_s = time.perf_counter()
            onednn(n)
            kernels_us.append(1e6 * (between_s - before_s))
            onednn_us.append(1e6 * (time.perf_counter() - between_s))
        ours, theirs = statistics.median(kernels_us), statistics.median(onednn_us)
        medians_us.append((ours, theirs))
        if theirs > (1 - margin) * ours:
            break
        from_tokens = n
    return Crossover(from_tokens, tuple(tokens[: len(medians_us)]), *zip(*medians_us, strict=True))


def has_bf16_products(cpu_flags: Collection[str]) -> bool:
    """Whether a CPU with these flags (`Hardware.isa`) has AMX or AVX512-BF16."""
    return not _BF16_FLAGS.isdisjoint(cpu_flags)


def compare_dense(linears: Sequence[CpuLinear]) -> Crossover | None:
    """The crossover of one layer's `linears` together; None without any."""

    def run(onednn_tokens: int | None, n_tokens: int) -> None:
        for linear in linears:
            linear.onednn_tokens = onednn_tokens
            linear(torch.ones(n_tokens, linear.in_features, dtype=torch.bfloat16))

    kept = [linear.onednn_tokens for linear in linears]
    try:
        return measure_crossover(partial(run, None), partial(run, 1)) if linears else None
    finally:
        for linear, tokens in zip(linears, kept, strict=True):
            linear.onednn_tokens = tokens


def _compare_onednn(
    store: ExpertStore, cpu: CpuExperts, linears: Sequence[CpuLinear], dtype: torch.dtype
) -> OnednnChoice:
    n_experts = min(max(1, _CROSSOVER_BYTES // store.layouts[0].block_bytes), store.n_experts[0])
    crossover = None
    if cpu.suits_onednn and dtype == torch.bfloat16:
        by_kernels = cpu_runner(store, cpu, dtype)
        by_onednn = cpu_runner(store, cpu.with_onednn(1), dtype)
        crossover = measure_crossover(
            lambda n: by_kernels((n,) * n_experts), lambda n: by_onednn((n,) * n_experts)
        )
    return OnednnChoice(crossover, compare_dense(linears), n_experts)


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
