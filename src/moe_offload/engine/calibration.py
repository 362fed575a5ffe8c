"""This machine's cost model for one loaded model, measured in a few seconds and kept on disk.

From how many tokens on torch's oneDNN multiplies bf16 faster than our kernels, measured here.

Only a CPU with AMX or AVX512-BF16 is asked; where oneDNN is not clearly faster it is never used.

The work that a calibration times: reads, calls over experts on either side, and copies."""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from math import isfinite
from statistics import median
from typing import Any

import torch
from torch import Tensor

from moe_offload.engine.timing import (
    ROUNDS,
    SIDE_CALLS,
    CalibrationCache,
    Counts,
    QuietWatch,
    Steadiness,
    calibrate_copy,
    calibrate_sharing,
    calibrate_side,
    fit_line,
    measure_read_gbps,
    slowdown,
)
from moe_offload.errors import UserError
from moe_offload.experts.costs import CostModel, SideCost
from moe_offload.experts.fetcher import ExpertFetcher, make_fetcher
from moe_offload.experts.recorder import Recorder
from moe_offload.experts.slots import GpuExperts
from moe_offload.experts.store import ExpertStore
from moe_offload.kernels.cpu_experts import CpuExperts
from moe_offload.kernels.cpu_linear import CpuLinear
from moe_offload.machine.hardware import Hardware

_READ_BYTES = 1 << 29  # twice the largest last-level cache met so far
_READS = 5


def plain_read_gbps(store: ExpertStore, cpu: CpuExperts) -> float:
    """Plain-read bandwidth on the kernels' own threads; through torch where no kernel runs."""
    kernels = cpu.kernels
    blocks = store.blocks(0)
    if kernels is None or blocks.nbytes < _READ_BYTES:
        return measure_read_gbps()
    return median(kernels.read_gbps(blocks.view(-1)[:_READ_BYTES]) for _ in range(_READS))


def _routing(counts: Counts) -> Tensor:
    """int64 [T, 1]: `counts[e]` tokens on expert e."""
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))[:, None]


def cpu_runner(store: ExpertStore, cpu: CpuExperts, dtype: torch.dtype) -> Callable[[Counts], None]:
    turns = itertools.count()

    def run(counts: Counts) -> None:
        turn = next(turns)  # other experts every time: nothing may be left in a cache
        layer = turn % store.n_stored  # the layers beyond use the same memory
        n_experts = store.n_experts[layer]
        index = (_routing(counts) + turn // store.n_stored * len(counts)) % n_experts
        hidden = torch.ones(len(index), store.layouts[layer].hidden_size, dtype=dtype)
        cpu.run(
            hidden,
            store.pointers(layer),
            torch.ones(n_experts, dtype=torch.uint8),
            index,
            torch.ones(index.shape),
            torch.empty(hidden.shape),
        )

    return run


def gpu_starter(
    gpu: GpuExperts, order: ExpertFetcher, store: ExpertStore, dtype: torch.dtype
) -> Callable[[Counts], Callable[[], None]]:
    def start(counts: Counts) -> Callable[[], None]:
        index = _routing(counts)
        hidden = torch.ones(
            len(index), store.layouts[0].hidden_size, dtype=dtype, device=gpu.device
        )
        weights = torch.ones(index.shape, device=gpu.device)
        pending = gpu.launch(hidden, index[:, 0].tolist(), weights, order)

        def wait() -> None:
            pending.result()
            if gpu.device.type == "cuda":
                torch.cuda.synchronize(gpu.device)

        return wait

    return start


class Copier:
    """Copies the first bytes of one block after another to the accelerator's last slot."""

    def __init__(
        self, store: ExpertStore, gpu: GpuExperts, emulate_pcie_gbps: float | None
    ) -> None:
        self._store = store
        self._gpu = gpu
        self._emulate_pcie_gbps = emulate_pcie_gbps
        self._fetchers: dict[int, ExpertFetcher] = {}
        self._turns = itertools.count()

    def copy(self, n_bytes: int) -> None:
        if n_bytes not in self._fetchers:
            slots = self._gpu.slots[:, :n_bytes]
            self._fetchers[n_bytes] = make_fetcher(self._gpu.device, slots, self._emulate_pcie_gbps)
        layer, turn = next(self._turns) % self._store.n_layers, next(self._turns)
        source = self._store.block(layer, turn % self._store.n_experts[layer])
        self._fetchers[n_bytes].fetch(self._gpu.n_slots - 1, source[:n_bytes])
        for completion in self._fetchers[n_bytes].drain():
            if completion.error is not None:
                raise UserError(f"calibration could not copy an expert: {completion.error}")

    def __enter__(self) -> Copier:
        return self

    def __exit__(self, *_: object) -> None:
        for fetcher in self._fetchers.values():
            fetcher.close()


# From the most: where oneDNN loses, nothing less is measured.
CROSSOVER_TOKENS = (256, 64, 16)
_BF16_FLAGS = frozenset(["avx512_bf16", "amx_bf16"])


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


def measure_crossover(
    kernels: Callable[[int], object],
    onednn: Callable[[int], object],
    tokens: Sequence[int] = CROSSOVER_TOKENS,
    margin: float = 0.05,
    budget_s: float = 0.1,
) -> Crossover:
    """The least of `tokens`, descending, from which `onednn` is faster by `margin`.

    Both are called with a number of tokens, in turn, at least three times and for about `budget_s`:
    the median of the pairs' ratios decides, so that a machine whose speed drifts is compared with
    itself.
    """
    from_tokens: int | None = None
    medians_us: list[tuple[float, float]] = []
    for n in tokens:
        pairs: list[tuple[float, float]] = []
        started_s = time.perf_counter()
        while len(pairs) < 3 or time.perf_counter() - started_s < budget_s:
            before_s = time.perf_counter()
            kernels(n)
            between_s = time.perf_counter()
            onednn(n)
            pairs.append((between_s - before_s, time.perf_counter() - between_s))
        ours, theirs = (1e6 * statistics.median(times_s) for times_s in zip(*pairs, strict=True))
        medians_us.append((ours, theirs))
        if statistics.median(theirs / ours for ours, theirs in pairs) > 1 - margin:
            break
        from_tokens = n
    kernels_us, onednn_us = zip(*medians_us, strict=True)
    return Crossover(from_tokens, tuple(tokens[: len(medians_us)]), kernels_us, onednn_us)


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

    def describe(self) -> list[str]:
        """What computes many tokens, as lines for people."""
        n = f"{self.n_experts} " if self.n_experts > 1 else ""
        return [
            *([] if self.experts is None else [f"{n}experts with many tokens: {self.experts}"]),
            *([] if self.dense is None else [f"a layer's dense part, many tokens: {self.dense}"]),
        ]

    def notes(self) -> list[str]:
        """The lines of `describe` for what does go through oneDNN."""
        used = self.expert_tokens is not None, self.dense_tokens is not None
        return OnednnChoice(
            self.experts if used[0] else None, self.dense if used[1] else None, self.n_experts
        ).describe()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> OnednnChoice:
        """The inverse of `to_json`; KeyError or TypeError where a field is missing."""
        return OnednnChoice(
            _crossover(data["experts"]), _crossover(data["dense"]), data["n_experts"]
        )


def has_bf16_products(cpu_flags: Collection[str]) -> bool:
    """Whether a CPU with these flags (`Hardware.isa`) has AMX or AVX512-BF16."""
    return not _BF16_FLAGS.isdisjoint(cpu_flags)


def compare_dense(linears: Sequence[CpuLinear]) -> Crossover | None:
    """The crossover of one layer's `linears` together; None without any."""
    if not linears:
        return None

    def run(n_tokens: int, onednn_tokens: int | None) -> None:
        with _limit(linears, onednn_tokens):
            for linear in linears:
                linear(torch.ones(n_tokens, linear.in_features, dtype=torch.bfloat16))

    return measure_crossover(lambda n: run(n, None), lambda n: run(n, 1))


@contextmanager
def _limit(linears: Sequence[CpuLinear], onednn_tokens: int | None) -> Iterator[None]:
    kept = [linear.onednn_tokens for linear in linears]
    for linear in linears:
        linear.onednn_tokens = onednn_tokens
    try:
        yield
    finally:
        for linear, tokens in zip(linears, kept, strict=True):
            linear.onednn_tokens = tokens


def _crossover(data: Mapping[str, Any] | None) -> Crossover | None:
    if data is None:
        return None
    lists = [tuple(data[name]) for name in ("tokens", "kernels_us", "onednn_us")]
    return Crossover(data["from_tokens"], *lists)


UNSTEADY = "this machine's speed varied while it was measured"
_STEP_BUDGET_S = 0.3
_CROSSOVER_BYTES = 1 << 26  # of experts that the kernels and oneDNN are compared on


@dataclass(frozen=True)
class MachineCosts:
    """The cost model, the plain-read bandwidth the CPU kernels are held against, how quiet the
    machine was while both were measured, and where oneDNN is faster than the kernels."""

    model: CostModel
    read_gbps: float
    steadiness: Steadiness
    onednn: OnednnChoice = field(default_factory=OnednnChoice)

    def to_json(self) -> dict[str, Any]:
        return {
            "read_gbps": self.read_gbps,
            "steadiness": asdict(self.steadiness),
            "costs": asdict(self.model),
            "onednn": self.onednn.to_json(),
        }

    @property
    def note(self) -> str | None:
        """A line for the user where the figures are not to be trusted."""
        if self.steadiness.is_quiet:
            return None
        return (
            f"{UNSTEADY} ({self.steadiness}): take "
            "predictions and shares of limits as rough; the next run measures again"
        )

    def describe(self) -> list[str]:
        """The figures as lines for people."""
        costs = self.model
        expert_us = costs.cpu.one_us(1)
        expert_gbps = costs.block_bytes / expert_us / 1e3 if expert_us > 0 else 0.0
        share = f"{100 * expert_gbps / self.read_gbps:.0f}% of plain read"
        if expert_gbps > 1.1 * self.read_gbps:
            share = "faster than memory: so few weights stay in the CPU's caches"
        lines = [
            f"memory, plain read: {self.read_gbps:.1f} GB/s",
            f"one expert ({costs.block_bytes / 1e6:.1f} MB) on the CPU, one token: "
            f"{_time(expert_us)} ({expert_gbps:.1f} GB/s, {share}), "
            f"{_more_tokens(costs.cpu)}",
            *self.onednn.describe(),
            f"a decode layer without its experts: {_time(costs.dense_us_per_layer)}",
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
            if costs.compute_shared_factor > 1:
                lines.append(
                    "CPU and emulated accelerator while both compute: "
                    f"{costs.compute_shared_factor:.2f} x their time"
                )
            if costs.both_shared_factor is not None:
                lines.append(
                    f"while copies run: the emulated accelerator {costs.gpu_shared_factor:.2f}, "
                    f"with the CPU {costs.both_shared_factor:.2f}, the rest of a layer "
                    f"{costs.dense_shared_factor:.2f} x their time"
                )
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
    hardware: Hardware,
    *,
    dtype: torch.dtype,
    dense: str,
    linears: Sequence[CpuLinear] = (),
    emulate_pcie_gbps: float | None = None,
    cache: CalibrationCache | None = None,
    remeasure: bool = False,
    rounds: int = ROUNDS,
) -> MachineCosts:
    """The costs of this machine for the model in `store`, from disk where they are known.

    `decode_step` runs one decode step with every expert left out, for the cost of the rest. The
    calibration is keyed by the hardware, the block's layout, what computes it, the `dense` part's
    description and the emulated link; one taken on a busy machine is kept by this process alone.
    Without `gpu` its costs and the copies' are infinite: nothing is ever sent there. `linears` are
    one layer's that oneDNN may compute.
    """
    cache = cache or CalibrationCache()
    layout = store.layouts[0]
    shape = {
        "layout": asdict(layout),
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
    known = None if remeasure else cache.load(hardware.key(), shape)
    if known is not None:
        try:
            return _from_json(known)
        except (KeyError, TypeError, UserError):
            pass  # written by another version: measured anew
    if sys.stderr.isatty():
        print("measuring this machine: a few seconds, then kept for a month", file=sys.stderr)
    kernels_alone = cpu.with_onednn(None)
    costs = _measure(store, kernels_alone, gpu, decode_step, dtype, emulate_pcie_gbps, rounds)
    if has_bf16_products(hardware.isa):
        costs = _compare_onednn(costs, store, kernels_alone, linears, dtype)
    # 30 days of another program's noise are worse than none; but a process measures once.
    if costs.steadiness.is_quiet or not remeasure:
        cache.store(hardware.key(), shape, costs.to_json(), lasting=costs.steadiness.is_quiet)
    return costs


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
    return total_us / int(decode.sum())


def _from_json(data: Mapping[str, Any]) -> MachineCosts:
    return MachineCosts(
        CostModel.from_json(json.dumps(data["costs"])),
        float(data["read_gbps"]),
        Steadiness(**data["steadiness"]),
        OnednnChoice.from_json(data["onednn"]),
    )


def _measure(
    store: ExpertStore,
    cpu: CpuExperts,
    gpu: GpuExperts | None,
    decode_step: Callable[[], None],
    dtype: torch.dtype,
    emulate_pcie_gbps: float | None,
    rounds: int,
) -> MachineCosts:
    run_cpu = cpu_runner(store, cpu, dtype)
    watch = QuietWatch(lambda: run_cpu((1, 1)))
    watch.burst()
    block_bytes = store.layouts[0].block_bytes
    calls = [counts for counts in SIDE_CALLS if len(counts) <= store.n_experts[0]]
    cpu_cost = calibrate_side(run_cpu, calls)
    watch.burst()
    dense_us = _dense_step_us(decode_step, partial(run_cpu, (1, 1))) / store.n_layers
    infinite = float("inf")
    gpu_cost = SideCost(0.0, infinite, 0.0)
    copy = (0.0, 1e-9, 1e-9, 1.0)
    sharing = gpu_factor = dense_factor = 1.0
    all_factor: float | None = None  # of CPU and GPU, one expert each, begun together
    if gpu is not None:
        for slot in range(gpu.n_slots):
            gpu.slots[slot].copy_(store.block(slot % store.n_layers, slot % store.n_experts[0]))
        gpu_calls = [counts for counts in calls if len(counts) <= gpu.n_slots]
        order = make_fetcher(gpu.device, gpu.slots)
        start_gpu = gpu_starter(gpu, order, store, dtype)

        def run_gpu(counts: Counts) -> None:
            start_gpu(counts)()

        gpu_cost = calibrate_side(run_gpu, gpu_calls)

        def run_both() -> None:
            wait = start_gpu((1,))
            run_cpu((1,))
            wait()

        def run_step() -> None:
            decode_step()
            for _ in range(store.n_layers):
                run_both()

        if gpu.device.type == "cpu":
            sharing = calibrate_sharing(partial(run_cpu, (1,)), partial(run_gpu, (1,)), run_both)
        order.close()
        with Copier(store, gpu, emulate_pcie_gbps) as copier:
            measured = calibrate_copy(
                copier.copy,
                block_bytes,
                partial(run_cpu, (1, 1)),
                step=run_step if gpu.device.type == "cpu" else None,
                rounds=rounds,
            )
            if gpu.device.type == "cpu":
                copy_block = partial(copier.copy, block_bytes)
                gpu_factor = slowdown(partial(run_gpu, (1,)), copy_block, rounds=rounds)
                dense_factor = slowdown(decode_step, copy_block, rounds=rounds)
                all_factor = slowdown(run_both, copy_block, rounds=rounds)
        copy = (
            measured.copy_call_us,
            measured.copy_gbps,
            measured.copy_gbps_shared,
            measured.cpu_shared_factor,
        )
    read_gbps = plain_read_gbps(store, cpu)
    watch.burst()
    model = CostModel(
        cpu_cost, gpu_cost, *copy, block_bytes, dense_us, sharing, gpu_factor, dense_factor
    )
    if all_factor is not None:
        model = replace(model, both_shared_factor=_both_factor(model, all_factor))
    return MachineCosts(model, read_gbps, watch.result())


def _both_factor(costs: CostModel, measured: float) -> float:
    """What slows CPU and GPU while both compute, of a factor `measured` over one expert on each.

    The longer of the two was for a time alone with the copy.
    """
    cpu_us, gpu_us = costs.compute_us(costs.cpu.us(1, 1), costs.gpu.us(1, 1))
    both_us = min(cpu_us, gpu_us)
    alone_us = (cpu_us - both_us) * costs.cpu_shared_factor
    alone_us += (gpu_us - both_us) * costs.gpu_shared_factor
    return max(1.0, (measured * max(cpu_us, gpu_us) - alone_us) / both_us)


def _dense_step_us(decode_step: Callable[[], None], experts: Callable[[], None]) -> float:
    """The mean time of a step without its experts, behind some that have emptied the caches.

    What runs between the experts of a real step finds neither its weights nor its code there.
    """
    decode_step()
    total_s, steps = 0.0, 0
    while total_s < _STEP_BUDGET_S or steps < 3:
        experts()
        started_s = time.perf_counter()
        decode_step()
        total_s += time.perf_counter() - started_s
        steps += 1
    return total_s / steps * 1e6


def _compare_onednn(
    costs: MachineCosts,
    store: ExpertStore,
    cpu: CpuExperts,
    linears: Sequence[CpuLinear],
    dtype: torch.dtype,
) -> MachineCosts:
    """`costs` with what oneDNN is worth, for the parts that it may compute."""
    layout = store.layouts[0]
    n_experts = min(max(1, _CROSSOVER_BYTES // layout.block_bytes), store.n_experts[0])
    crossover = None
    if cpu.suits_onednn and dtype == torch.bfloat16:
        by_kernels = cpu_runner(store, cpu, dtype)
        by_onednn = cpu_runner(store, cpu.with_onednn(1), dtype)
        crossover = measure_crossover(
            lambda n: by_kernels((n,) * n_experts), lambda n: by_onednn((n,) * n_experts)
        )
    choice = OnednnChoice(crossover, compare_dense(linears), n_experts)
    model = replace(
        costs.model, cpu_many=choice.expert_cost, cpu_many_tokens=choice.expert_tokens or 0
    )
    return replace(costs, model=model, onednn=choice)
