"""The small operations of a decode step as calls of the compiled kernels: norm, router, heads.

Each takes torch half a dozen operations. What they cost is not arithmetic: a step streams its
weights through the same caches, so each operation's own code and data come from memory again.
"""

from __future__ import annotations

import ctypes
from typing import Final

import torch
from torch import Tensor

from moe_offload.kernels.cpu_kernels import CpuKernels
from moe_offload.kernels.kernel_library import MatrixArguments


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


class HeadsArguments(ctypes.Structure):
    """`cpux_heads` of api.h."""

    _fields_ = (
        ("is_bf16", ctypes.c_int32),
        ("n_batch", ctypes.c_int64),
        ("n_heads", ctypes.c_int64),
        ("n_kv_heads", ctypes.c_int64),
        ("key_size", ctypes.c_int64),
        ("value_size", ctypes.c_int64),
        ("rotary_size", ctypes.c_int64),
        ("q", ctypes.POINTER(MatrixArguments)),
        ("k", ctypes.POINTER(MatrixArguments)),
        ("v", ctypes.POINTER(MatrixArguments)),
        ("q_norm", ctypes.POINTER(NormArguments)),
        ("k_norm", ctypes.POINTER(NormArguments)),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("rotary_stride", ctypes.c_int64),
        ("key", ctypes.c_void_p),
        ("value", ctypes.c_void_p),
        ("key_strides", ctypes.c_int64 * 2),
        ("value_strides", ctypes.c_int64 * 2),
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
    "cpux_project": (ctypes.POINTER(HeadsArguments), _POINTER, _INT, _INT, _POINTER),
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
        self._project = kernels.library.cpux_project

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

    def project(self, heads: HeadsArguments, x: Tensor, projected: Tensor) -> None:
        kernels = self.kernels
        kernels.check(
            self._project(
                heads, x.data_ptr(), kernels.isa_code, kernels.threads, projected.data_ptr()
            )
        )
