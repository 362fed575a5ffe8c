"""This machine's cost model for one loaded model, measured in a few seconds and kept on disk.

About ten numbers: what an expert costs on the CPU and on the accelerator, what a copy costs alone
and beside the CPU's experts, what the rest of a decode layer costs, how fast plain reading is, and
from how many tokens on torch's oneDNN multiplies bf16 faster than our kernels. Only a CPU with AMX
or AVX512-BF16 is asked for the last; where oneDNN is not clearly faster it is never used. Likewise
cuBLAS and a GPU's tiles for prompts.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from math import inf, isfinite
from pathlib import Path
from typing import Any

import psutil
import torch

from moe_offload.engine.probes import (
    Crossover,
    copier,
    cpu_runner,
    cublas_crossover,
    dense_costs,
    gpu_runner,
    has_bf16_products,
    measure_crossover,
    plain_read_gbps,
    sum_wait_us,
)
from moe_offload.engine.timing import (
    SIDE_CALLS,
    QuietWatch,
    Steadiness,
    calibrate_copy,
    calibrate_side,
    fit_line,
)
from moe_offload.errors import UserError
from moe_offload.experts.costs import CostModel, DiskCost, SideCost
from moe_offload.experts.disk_tier import DiskTier
from moe_offload.experts.dispatcher import MoeDispatcher
from moe_offload.experts.recorder import Recorder
from moe_offload.experts.slots import GpuExperts
from moe_offload.experts.store import ExpertStore
from moe_offload.files import from_json, read_json_object, user_cache, write_atomically
from moe_offload.kernels.cpu_experts import CpuExperts
from moe_offload.kernels.cpu_linear import CpuLinear
from moe_offload.machine.hardware import Hardware

UNSTEADY = "this machine was busy, or its speed varied, while it was measured"
_CROSSOVER_BYTES = 1 << 26  # of experts that the kernels and oneDNN are compared on
MAX_AGE_S = 30 * 24 * 3600.0


@dataclass(frozen=True)
class MachineCosts:
    """The cost model, and the plain-read bandwidth that the CPU kernels are held against.

    And how quiet the machine was while both were measured, and where oneDNN is faster than the
    kernels, for experts and for a layer's dense part: None where that is out of the question, by
    another format, a forced kernel or a CPU without bf16 products. And cuBLAS, for experts on a
    GPU: None without the kernels for prompts there.
    """

    model: CostModel
    read_gbps: float
    steadiness: Steadiness
    onednn_experts: Crossover | None = None
    onednn_dense: Crossover | None = None
    cublas_experts: Crossover | None = None

    def __post_init__(self) -> None:
        if not 0 < self.read_gbps < inf:
            raise ValueError(f"a memory that no machine has: {self.read_gbps} GB/s")

    @property
    def crossovers(self) -> list[Crossover]:
        """Of libraries and the kernels: those that were measured."""
        found = self.onednn_experts, self.onednn_dense, self.cublas_experts
        return [one for one in found if one is not None]

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
                f"CPU experts while copies run: {costs.cpu_shared_factor:.2f} x their time; their "
                f"sum is on the accelerator {_time(costs.sum_wait_us)} later",
            ]
        else:
            lines.append("accelerator and copies: not measured, this run has no accelerator")
        if costs.disk is not None:
            lines.append(
                f"disk: {costs.disk.gbps:.2f} GB/s of experts, checked; one alone "
                f"{_time(costs.disk.us(costs.block_bytes))}, and experts behind a wait "
                f"{_time(costs.disk.resume_us)} longer"
            )
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
    `dispatcher` is what it passes layer by layer; `dense` describes the weights that are no
    expert's; `cuda_graphs` says whether graphs serve the step. Without `gpu` its costs and the
    copies' are infinite: nothing is ever sent there. `linears` are one layer's that oneDNN may
    compute; `disk` has the experts that outgrow `store`.
    """

    store: ExpertStore
    cpu: CpuExperts
    gpu: GpuExperts | None
    decode_step: Callable[[], None]
    dispatcher: MoeDispatcher
    dtype: torch.dtype
    dense: str
    cuda_graphs: bool = False
    linears: Sequence[CpuLinear] = ()
    emulate_pcie_gbps: float | None = None
    disk: DiskTier | None = None

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
            "gpu": None if self.gpu is None else [self.gpu.description, self.gpu.has_tiles],
            "threads": torch.get_num_threads(),
            "dtype": str(self.dtype),
            "dense": self.dense,
            "cuda_graphs": self.cuda_graphs,
            "emulate_pcie_gbps": self.emulate_pcie_gbps,
            "disk": None if self.disk is None else self.disk.device,
            # Another version's is another.
            "measured": [
                each.name for one in (CostModel, SideCost, DiskCost) for each in fields(one)
            ],
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
        layer_us, step_us = dense_costs(self.decode_step, self.dispatcher, two_experts)
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
        cublas = None
        if self.gpu is not None:
            with gpu_runner(self.store, self.gpu, self.dtype) as run_gpu:
                if self.gpu.has_tiles:
                    cublas = cublas_crossover(self.gpu, self.dtype)
                    self.gpu.cublas_tokens = cublas.from_tokens
                calls = [counts for counts in calls if len(counts) <= self.gpu.n_slots]
                model = replace(model, gpu=calibrate_side(run_gpu, calls))
            with copier(self.store, self.gpu, self.emulate_pcie_gbps) as copy_bytes:
                model = calibrate_copy(model, copy_bytes, two_experts)
            model = replace(model, sum_wait_us=sum_wait_us(self.store, self.gpu, self.dtype))
        if self.disk is not None:
            model = replace(model, disk=self.disk.measured(two_experts))
        read_gbps = plain_read_gbps(self.store, self.cpu)
        watch.burst()
        return MachineCosts(model, read_gbps, watch.result(), cublas_experts=cublas)

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
                fixed_us, token_us = fit_line(found.tokens, found.library_us)
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
    columns = (gpu - waited, cpu, layers["fetches"] > 0, waited, layers["host_misses"])
    total_us = 0.0  # the few different layers, each as often as it came
    for layer, n in Counter(zip(*(c.tolist() for c in columns), strict=True)).items():
        total_us += n * costs.decode_layer_us(*layer)
    return total_us / int(decode.sum()) + costs.step_us
