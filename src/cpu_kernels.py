"""The compiled CPU kernels as Python calls: library, instruction set, threads, ctypes.

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

import psutil
import torch
from torch import Tensor

import kernel_build
from errors import UserError

KernelChoice = Literal["auto", "native", "torch"]

FORMAT_CODES: Final = {"fp32": 0, "bf16": 1, "int8": 2, "int4": 3}
ACTIVATION_CODES: Final = {
    "silu": 0,
    "gelu": 1,
    "gelu_tanh": 2,
    "relu": 3,
    "relu2": 4,
    "clamped_swiglu": 5,
    "module": -1,
}
_ERRORS: Final = {1: "out of memory for scratch", 2: "instruction set not supported here"}


class LayerArguments(ctypes.Structure):
    """`cpux_layer` of api.h."""

    _fields_ = (
        ("weight_format", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("has_gate", ctypes.c_int32),
        ("alpha", ctypes.c_float),
        ("limit", ctypes.c_float),
        ("hidden_size", ctypes.c_int64),
        ("intermediate_size", ctypes.c_int64),
        ("gate_up", ctypes.c_int64),
        ("gate_up_scale", ctypes.c_int64),
        ("gate_up_bias", ctypes.c_int64),
        ("down", ctypes.c_int64),
        ("down_scale", ctypes.c_int64),
        ("down_bias", ctypes.c_int64),
    )


class TokenArguments(ctypes.Structure):
    """`cpux_tokens` of api.h."""

    _fields_ = (
        ("hidden", ctypes.c_void_p),
        ("hidden_is_bf16", ctypes.c_int32),
        ("n_tokens", ctypes.c_int64),
        ("top_k", ctypes.c_int64),
        ("n_experts", ctypes.c_int64),
        ("index", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("blocks", ctypes.c_void_p),
        ("on_cpu", ctypes.c_void_p),
    )


class MatrixArguments(ctypes.Structure):
    """`cpux_matrix` of api.h."""

    _fields_ = (
        ("weight_format", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


class AttentionArguments(ctypes.Structure):
    """`cpux_attention` of api.h."""

    _fields_ = (
        ("is_bf16", ctypes.c_int32),
        ("n_batch", ctypes.c_int64),
        ("n_heads", ctypes.c_int64),
        ("n_kv_heads", ctypes.c_int64),
        ("n_keys", ctypes.c_int64),
        ("key_size", ctypes.c_int64),
        ("value_size", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("query", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("key_strides", ctypes.c_int64 * 2),
        ("value_strides", ctypes.c_int64 * 2),
        ("mask", ctypes.c_void_p),
    )


_POINTER: Final = ctypes.c_void_p
_INT: Final = ctypes.c_int
_LONG: Final = ctypes.c_int64
_LAYER: Final = ctypes.POINTER(LayerArguments)
_TOKENS: Final = ctypes.POINTER(TokenArguments)
_SIGNATURES: Final = {
    "cpux_run": (_INT, (_LAYER, _TOKENS, _INT, _INT, _POINTER)),
    "cpux_count_pairs": (_LONG, (_TOKENS,)),
    "cpux_first": (_INT, (_LAYER, _TOKENS, _INT, _INT, _POINTER)),
    "cpux_second": (_INT, (_LAYER, _TOKENS, _INT, _INT, _POINTER, _POINTER)),
    "cpux_activate": (_INT, (_LAYER, _POINTER, _POINTER, _LONG, _INT, _INT, _POINTER)),
    "cpux_add": (
        _INT,
        (_LAYER, _POINTER, _POINTER, _POINTER, _POINTER, _LONG, _INT, _INT, _POINTER),
    ),
    "cpux_linear": (
        _INT,
        (ctypes.POINTER(MatrixArguments), _POINTER, _INT, _LONG, _INT, _INT, _POINTER),
    ),
    "cpux_attend": (_INT, (ctypes.POINTER(AttentionArguments), _INT, _INT, _POINTER)),
    "cpux_n_isas": (_INT, ()),
    "cpux_isa_name": (ctypes.c_char_p, (_INT,)),
    "cpux_isa_supported": (_INT, (_INT,)),
    "cpux_pin_threads": (_INT, (ctypes.POINTER(ctypes.c_int32), _INT)),
    "cpux_read_seconds": (ctypes.c_double, (_POINTER, _LONG, _INT, _INT)),
    "cpux_fma_flops_per_s": (ctypes.c_double, (_INT, _INT, ctypes.c_double)),
}


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
        return f"native {self.isa}, {self.threads} thread{'s' if self.threads > 1 else ''}"

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
        library = _open_library()
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
        library, name, _isa_code(library, name), len(affinity) if affinity else default_threads()
    )
    if affinity:
        kernels.pin(affinity)
    return kernels


def supported_isas(library: ctypes.CDLL) -> list[str]:
    """Instruction sets that the library was built with and this CPU has, slowest first."""
    count = library.cpux_n_isas()
    codes = [code for code in range(count) if library.cpux_isa_supported(code)]
    return [library.cpux_isa_name(code).decode() for code in codes]


def default_threads() -> int:
    """`OMP_NUM_THREADS`, else one thread per physical core this process may run on."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    usable = len(os.sched_getaffinity(0))
    return max(1, min(usable, psutil.cpu_count(logical=False) or usable))


def _isa_code(library: ctypes.CDLL, name: str) -> int:
    names = [library.cpux_isa_name(code).decode() for code in range(library.cpux_n_isas())]
    return names.index(name)


def _open_library() -> ctypes.CDLL:
    # A process that runs under the sanitizers' runtime gets the build that reports to it.
    sanitize = hasattr(ctypes.CDLL(None), "__asan_init")
    path = kernel_build.built_library(sanitize)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise UserError(f"expected the compiled kernels {path} to load, but {error}") from None
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _span(cpus: Sequence[int]) -> str:
    """CPU numbers as --cpu-affinity takes them: 0-7,16."""
    runs: list[list[int]] = []
    for cpu in cpus:
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)
