"""This machine's cost model for one loaded model, measured in a few seconds and kept on disk."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from math import isfinite
from typing import Any

import torch

from moe_offload.engine.calibration import (
    ROUNDS,
    SIDE_CALLS,
    CalibrationCache,
    Counts,
    calibrate_copy,
    calibrate_sharing,
    calibrate_side,
    slowdown,
)
from moe_offload.engine.machine_probes import Copier, cpu_runner, gpu_starter, plain_read_gbps
from moe_offload.engine.onednn_choice import (
    OnednnChoice,
    compare_dense,
    has_bf16_products,
    measure_crossover,
)
from moe_offload.engine.steadiness import QuietWatch, Steadiness
from moe_offload.errors import UserError
from moe_offload.experts.cost_model import CostModel, SideCost
from moe_offload.experts.expert_fetcher import make_fetcher
from moe_offload.experts.expert_store import ExpertStore
from moe_offload.experts.gpu_experts import GpuExperts
from moe_offload.experts.recorder import Recorder
from moe_offload.kernels.cpu_experts import CpuExperts
from moe_offload.kernels.cpu_linear import CpuLinear
from moe_offload.machine.hardware import Hardware

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
        "layout": layout.to_json(),
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
