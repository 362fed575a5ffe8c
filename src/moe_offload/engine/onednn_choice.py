"""From how many tokens on torch's oneDNN multiplies bf16 faster than our kernels, measured here.

Only a CPU with AMX or AVX512-BF16 is asked; where oneDNN is not clearly faster it is never used.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from moe_offload.engine.calibration import fit_line
from moe_offload.experts.cost_model import SideCost
from moe_offload.kernels.cpu_linear import CpuLinear

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
