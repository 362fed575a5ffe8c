"""The compiled CPU kernels as Python calls: one instruction set of the library, and threads.

ctypes releases the GIL for the length of a call. The library's OpenMP symbols resolve to the
runtime that torch loaded, so kernels and torch share one pool of threads and never spin against
each other; that is why torch is imported before the library is opened.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from moe_offload.errors import UserError
from moe_offload.kernels.library import (
    MOST_THREADS,
    AttentionArguments,
    TokenArguments,
    default_threads,
    describe,
    isa_code,
    open_library,
    refused_cpus,
    require_isa,
    require_threads,
    supported_isas,
)

KernelChoice = Literal["auto", "native", "torch"]

# What a code of api.h stands for.
_ERRORS: Final[dict[int, tuple[type[Exception], str]]] = {
    1: (MemoryError, "out of memory for scratch"),
    2: (RuntimeError, "instruction set not supported here"),
    3: (ValueError, "a size, format, number of threads or missing array that cannot be"),
    4: (OverflowError, "a weight that is no number or too large"),
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
        return describe(f"native {self.isa}", self.threads)

    def call(self, name: str, *arguments: object) -> None:
        """`cpux_<name>` of api.h with these arguments; a tensor goes as its address.

        Whether dtypes and shapes fit is the caller's to check. Tensors must be contiguous and on
        the CPU: ValueError else, as for what the library refuses.
        """
        values = [_address(value) if isinstance(value, Tensor) else value for value in arguments]
        code = getattr(self.library, f"cpux_{name}")(self.isa_code, self.threads, *values)
        if code != 0:
            error, text = _ERRORS[code]
            raise error(f"CPU kernels, {name}: {text}")

    def count_pairs(self, tokens: TokenArguments) -> int:
        return int(self.library.cpux_count_pairs(tokens))

    def attend(self, attention: AttentionArguments, out: Tensor) -> None:
        self.call("attend", attention, out)

    def crc32(self, data: Tensor) -> int:
        """zlib's CRC-32 of `data`, contiguous uint8 on the CPU; by zlib where that is fastest."""
        crc = ctypes.c_uint32()
        if self.library.cpux_crc32(_address(data), data.nbytes, ctypes.byref(crc)) != 0:
            return zlib_crc32(data)
        return crc.value

    def read_gbps(self, data: Tensor) -> float:
        """Bandwidth of one plain read of `data` (contiguous, much larger than the caches), GB/s."""
        seconds = ctypes.c_double()
        self.call("read", data, data.nbytes, ctypes.byref(seconds))
        return data.nbytes / seconds.value / 1e9

    def fma_gflops(self, seconds: float = 0.2) -> float:
        """Peak of independent fp32 multiply-adds, GFLOP/s (two per multiply-add)."""
        flops_per_s = ctypes.c_double()
        self.call("multiply_add", seconds, ctypes.byref(flops_per_s))
        return flops_per_s.value / 1e9

    def pin(self, cpus: Sequence[int]) -> None:
        """Bind worker i to cpus[i], the calling thread to all of them; UserError when refused."""
        numbers = (ctypes.c_int32 * len(cpus))(*cpus)
        if len(cpus) > MOST_THREADS or self.library.cpux_pin_threads(numbers, len(cpus)) != 0:
            raise refused_cpus(cpus)


def zlib_crc32(data: Tensor) -> int:
    """The CRC-32 of `data`, contiguous uint8 on the CPU."""
    return zlib.crc32(data.numpy().data)


def _address(tensor: Tensor) -> int:
    if not tensor.is_cpu or not tensor.is_contiguous():
        raise ValueError(
            f"expected a contiguous tensor on the CPU, found strides {tensor.stride()} "
            f"on {tensor.device}"
        )
    return tensor.data_ptr()


@functools.cache
def load_kernels(
    kernel: KernelChoice = "auto", isa: str = "auto", affinity: tuple[int, ...] | None = None
) -> CpuKernels | None:
    """The kernels for this machine, or None for torch.

    `auto` falls back to torch, with one line on stderr, where nothing can be compiled; `native`
    raises UserError there, as does an `isa` this CPU lacks. `affinity` lists the CPUs for the
    threads, one each; by default there are `OMP_NUM_THREADS` or one per physical core.
    """
    n_threads = len(affinity) if affinity else default_threads()
    require_threads(n_threads)
    if kernel == "torch":
        return None
    try:
        library = open_library()
    except UserError as error:
        if kernel == "native" or isa != "auto":
            raise
        print(f"CPU experts run on torch, several times slower: {error}", file=sys.stderr)
        return None
    require_isa(library, isa)
    name = supported_isas(library)[-1] if isa == "auto" else isa
    kernels = CpuKernels(library, name, isa_code(library, name), n_threads)
    if affinity:
        kernels.pin(affinity)
    return kernels


def is_plain(x: Tensor) -> bool:
    """Whether the kernels read `x` as it lies: contiguous bf16 on the CPU, no gradient asked."""
    return (
        x.dtype == torch.bfloat16
        and x.is_cpu
        and x.is_contiguous()
        and not (torch.is_grad_enabled() and x.requires_grad)
    )
