"""Our side of `side_by_side.py`: the engine on a prepared folder, the time between its kernels."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Final

from benchmarks.llama_bench import DECODED, Seconds, Work
from moe_offload.config import CacheOptions, GenerationOptions, ModelOptions
from moe_offload.engine.engine import Engine
from moe_offload.engine.loading import load_engine, open_prepared
from moe_offload.errors import UserError
from moe_offload.kernels.bindings import CpuKernels, load_kernels
from moe_offload.model.generation import Generated, generate_batch

READ_BYTES: Final = 1 << 28


@dataclass
class Measured:
    """What each work took at each depth, s, and what was measured beside it.

    `limits`: GB/s of plain read for a work that decodes, else GFLOP/s of multiply-adds. `gaps_us`:
    what passes outside the kernels in a layer of a decode step.
    """

    kernels: str
    seconds: list[Seconds]
    limits: dict[Work, float] = field(default_factory=dict)
    gaps_us: dict[Work, float] = field(default_factory=dict)


def measure_ours(
    folder: Path, depths: Sequence[int], works: Sequence[Work], isa: str, repetitions: int
) -> Measured:
    """The prepared model on the CPU, passing through its first layers alone for each depth."""
    options = ModelOptions(folder, device="cpu", cpu_isa=isa)
    longest = max(work.prompt for work in works)
    with load_engine(
        open_prepared(options), options, CacheOptions(), context_tokens=longest + DECODED
    ) as engine:
        engine.calibrate_for(longest)  # as a run does, for oneDNN
        kernels = load_kernels("auto", isa)
        if kernels is None:
            raise UserError("the limits are measured by our kernels: install g++ and make")
        found = Measured(engine.cpu.description, [{} for _ in depths])
        for work in works:
            limits = []
            for depth, seconds in zip(depths, found.seconds, strict=True):
                engine.model.config.num_hidden_layers = depth
                _seconds(engine, work)  # warms up
                seconds[work] = median(_seconds(engine, work) for _ in range(repetitions))
                limits.append(_limit(engine, kernels, work))
            found.limits[work] = median(limits)
            if work.kind == "decode":
                found.gaps_us[work] = _gap_us(engine, work)
        return found


def _answer(engine: Engine, work: Work) -> Iterator[tuple[Generated, int]]:
    vocabulary = engine.model.config.vocab_size
    prompt = [(37 * place + 11) % vocabulary for place in range(work.prompt)]
    options = GenerationOptions(max_tokens=1 + DECODED * (work.kind == "decode"))
    return generate_batch(engine.model, [prompt], options)


def _seconds(engine: Engine, work: Work) -> float:
    record, _ = [*_answer(engine, work)][-1]
    times_s = record.token_times_s
    return sum(times_s[1:]) if work.kind == "decode" else times_s[0]


Call = tuple[str, float, float]  # a kernel's name, when it was called and when it came back, s


def between_kernels_us(step: Sequence[Call]) -> list[float]:
    """For each layer of a decode step but the first, what passes outside the kernels.

    A layer is what lies between the ends of two layers' experts, which "run" computes.
    """
    gaps: list[float] = []
    layer_us = None
    for (_, _, before_s), (name, called_s, _) in pairwise(step):
        if layer_us is not None:
            layer_us += (called_s - before_s) * 1e6
        if name == "run":
            gaps += [] if layer_us is None else [layer_us]
            layer_us = 0.0
    return gaps


def _gap_us(engine: Engine, work: Work) -> float:
    """The median of `between_kernels_us` over the layers of all decoded tokens."""
    calls: list[Call] = []
    call = CpuKernels.call

    def noted(kernels: CpuKernels, name: str, *arguments: object) -> None:
        called_s = time.perf_counter()
        call(kernels, name, *arguments)
        calls.append((name, called_s, time.perf_counter()))

    CpuKernels.call = noted  # type: ignore[method-assign, assignment]
    try:
        gaps = []
        for _ in _answer(engine, work):
            gaps += between_kernels_us(calls)
            calls.clear()
        return median(gaps)
    finally:
        CpuKernels.call = call  # type: ignore[method-assign]


def _limit(engine: Engine, kernels: CpuKernels, work: Work) -> float:
    if work.kind == "decode":
        return kernels.read_gbps(engine.store.memory.blocks(0).view(-1)[:READ_BYTES])
    return kernels.fma_gflops(0.05)
