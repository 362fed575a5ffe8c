"""The small operations of a decode step as calls of the compiled kernels: norm, router, heads.

Each takes torch half a dozen operations. What they cost is not arithmetic: a step streams its
weights through the same caches, so each operation's own code and data come from memory again.

The compiled CPU kernels as Python calls: one instruction set of the library, and threads.

ctypes releases the GIL for the length of a call. The library's OpenMP symbols resolve to the
runtime that torch loaded, so kernels and torch share one pool of threads and never spin against
each other; that is why torch is imported before the library is opened.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from moe_offload.errors import UserError
from moe_offload.kernels.library import (
    AttentionArguments,
    LayerArguments,
    MatrixArguments,
    TokenArguments,
    default_threads,
    describe,
    isa_code,
    open_library,
    supported_isas,
)

KernelChoice = Literal["auto", "native", "torch"]

_ERRORS: Final = {1: "out of memory for scratch", 2: "instruction set not supported here"}


@dataclass(frozen=True)
class CpuKernels:
    """One instruction set of the library and the threads that each call uses.

    Calls are thread-safe; those from different Python threads run on different pools.
    """

    library: ctypes.CDLL
    isa: str
    isa_code: int
    threads: int

    @property
    def description(self) -> str:
        return describe(self.isa, self.threads)

    def run(self, layer: LayerArguments, tokens: TokenArguments, out: Tensor) -> None:
        self.check(
            self.library.cpux_run(layer, tokens, self.isa_code, self.threads, out.data_ptr())
        )

    def count_pairs(self, tokens: TokenArguments) -> int:
        return int(self.library.cpux_count_pairs(tokens))

    def first(self, layer: LayerArguments, tokens: TokenArguments, first: Tensor) -> None:
        self.check(
            self.library.cpux_first(layer, tokens, self.isa_code, self.threads, first.data_ptr())
        )

    def second(
        self, layer: LayerArguments, tokens: TokenArguments, middle: Tensor, out: Tensor
    ) -> None:
        self.check(
            self.library.cpux_second(
                layer, tokens, self.isa_code, self.threads, middle.data_ptr(), out.data_ptr()
            )
        )

    def activate(self, layer: LayerArguments, block: int, first: Tensor, middle: Tensor) -> None:
        """`middle` bf16 [n, I] from `first` bf16 [n, R] and the biases of the block at `block`."""
        self.check(
            self.library.cpux_activate(
                layer,
                block,
                first.data_ptr(),
                first.shape[0],
                self.isa_code,
                self.threads,
                middle.data_ptr(),
            )
        )

    def add(
        self,
        layer: LayerArguments,
        block: int,
        y: Tensor,
        token: Tensor,
        weight: Tensor,
        out: Tensor,
    ) -> None:
        """Add `weight` fp32 [n] * (`y` bf16 [n, H] + bias) to rows `token` int64 [n] of `out`."""
        self.check(
            self.library.cpux_add(
                layer,
                block,
                y.data_ptr(),
                token.data_ptr(),
                weight.data_ptr(),
                y.shape[0],
                self.isa_code,
                self.threads,
                out.data_ptr(),
            )
        )

    def linear(self, matrix: MatrixArguments, x: Tensor, n_tokens: int, y: Tensor) -> None:
        self.check(
            self.library.cpux_linear(
                matrix,
                x.data_ptr(),
                x.dtype == torch.bfloat16,
                n_tokens,
                self.isa_code,
                self.threads,
                y.data_ptr(),
            )
        )

    def attend(self, attention: AttentionArguments, out: Tensor) -> None:
        self.check(self.library.cpux_attend(attention, self.isa_code, self.threads, out.data_ptr()))

    def read_gbps(self, data: Tensor) -> float:
        """Bandwidth of one plain read of `data` (contiguous, much larger than the caches), GB/s."""
        seconds = self.library.cpux_read_seconds(
            data.data_ptr(), data.nbytes, self.isa_code, self.threads
        )
        return data.nbytes / float(seconds) / 1e9

    def fma_gflops(self, seconds: float = 0.2) -> float:
        """Peak of independent fp32 multiply-adds, GFLOP/s (two per multiply-add)."""
        rate = self.library.cpux_fma_flops_per_s(self.isa_code, self.threads, seconds)
        return float(rate) / 1e9

    def pin(self, cpus: Sequence[int]) -> None:
        """Bind worker i to cpus[i], the calling thread to all of them; UserError when refused."""
        numbers = (ctypes.c_int32 * len(cpus))(*cpus)
        if self.library.cpux_pin_threads(numbers, len(cpus)) != 0:
            raise UserError(
                f"expected --cpu-affinity to list CPUs this process may use "
                f"({_span(sorted(os.sched_getaffinity(0)))}), found {_span(cpus)}"
            )

    @staticmethod
    def check(code: int) -> None:
        """Raise what a code of api.h stands for."""
        if code == 1:
            raise MemoryError(f"CPU kernels: {_ERRORS[code]}")
        if code != 0:
            raise RuntimeError(f"CPU kernels: {_ERRORS[code]}")


@functools.cache
def load_kernels(
    kernel: KernelChoice = "auto", isa: str = "auto", affinity: tuple[int, ...] | None = None
) -> CpuKernels | None:
    """The kernels for this machine, or None for torch.

    `auto` falls back to torch, with one line on stderr, where nothing can be compiled; `native`
    raises UserError there, as does an `isa` this CPU lacks. `affinity` lists the CPUs for the
    threads, one each; by default there are `OMP_NUM_THREADS` or one per physical core.
    """
    if kernel == "torch":
        return None
    try:
        library = open_library()
    except UserError as error:
        if kernel == "native" or isa != "auto":
            raise
        print(f"CPU experts run on torch, several times slower: {error}", file=sys.stderr)
        return None
    names = supported_isas(library)
    if isa != "auto" and isa not in names:
        raise UserError(
            f"expected --cpu-isa to be auto or one of {', '.join(names)} on this CPU, found {isa!r}"
        )
    name = names[-1] if isa == "auto" else isa
    kernels = CpuKernels(
        library, name, isa_code(library, name), len(affinity) if affinity else default_threads()
    )
    if affinity:
        kernels.pin(affinity)
    return kernels


def _span(cpus: Sequence[int]) -> str:
    """CPU numbers as --cpu-affinity takes them: 0-7,16."""
    runs: list[list[int]] = []
    for cpu in cpus:
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


class NormArguments(ctypes.Structure):
    """`cpux_norm` of api.h."""

    _fields_ = (
        ("form", ctypes.c_int32),
        ("weight_is_bf16", ctypes.c_int32),
        ("epsilon", ctypes.c_float),
        ("width", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
    )


class RouterArguments(ctypes.Structure):
    """`cpux_router` of api.h."""

    _fields_ = (
        ("matrix", MatrixArguments),
        ("is_bf16", ctypes.c_int32),
        ("scores_are_bf16", ctypes.c_int32),
        ("normalise", ctypes.c_int32),
        ("top_k", ctypes.c_int64),
    )


def is_plain(x: Tensor) -> bool:
    """Whether the kernels read `x` as it lies: contiguous bf16 on the CPU, no gradient asked."""
    return (
        x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and x.is_contiguous()
        and not (torch.is_grad_enabled() and x.requires_grad)
    )


_POINTER: Final = ctypes.c_void_p
_INT: Final = ctypes.c_int
_LONG: Final = ctypes.c_int64
_SIGNATURES: Final = {
    "cpux_rms_norm": (ctypes.POINTER(NormArguments), _POINTER, _INT, _LONG, _POINTER),
    "cpux_route": (
        *(ctypes.POINTER(RouterArguments), _POINTER, _LONG, _INT, _INT),
        *(_POINTER, _POINTER, _POINTER),
    ),
}


class DecodeKernels:
    """The calls, bound to the library, instruction set and threads of `kernels`.

    All tensors are contiguous and on the CPU; see api.h for shapes.
    """

    def __init__(self, kernels: CpuKernels) -> None:
        self.kernels = kernels
        for name, arguments in _SIGNATURES.items():
            function = getattr(kernels.library, name)
            function.restype, function.argtypes = _INT, arguments
        self._norm = kernels.library.cpux_rms_norm
        self._route = kernels.library.cpux_route

    def norm(self, norm: NormArguments, x: Tensor, is_bf16: bool, n_rows: int, y: Tensor) -> None:
        self.kernels.check(self._norm(norm, x.data_ptr(), is_bf16, n_rows, y.data_ptr()))

    def route(
        self,
        router: RouterArguments,
        x: Tensor,
        n_tokens: int,
        logits: Tensor,
        scores: Tensor,
        index: Tensor,
    ) -> None:
        kernels = self.kernels
        kernels.check(
            self._route(
                router,
                x.data_ptr(),
                n_tokens,
                kernels.isa_code,
                kernels.threads,
                logits.data_ptr(),
                scores.data_ptr(),
                index.data_ptr(),
            )
        )
