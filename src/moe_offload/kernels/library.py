"""The compiled CPU kernels' library: its C interface (`cpu_experts/api.h`), its instruction sets.

Needs no torch. What computes with it goes through `cpu_kernels`, for the threads' sake.
"""

from __future__ import annotations

import ctypes
import os
from typing import Final

import psutil

from moe_offload.config import WEIGHT_FORMATS
from moe_offload.errors import UserError
from moe_offload.kernels import build as build_module

FORMAT_CODES: Final = {name: code for code, name in enumerate(WEIGHT_FORMATS)}
ACTIVATION_CODES: Final = {
    "silu": 0,
    "gelu": 1,
    "gelu_tanh": 2,
    "relu": 3,
    "relu2": 4,
    "clamped_swiglu": 5,
    "module": -1,
}


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


def open_library() -> ctypes.CDLL:
    """Load the library, compiled first where it is missing; UserError where that is impossible."""
    # A process that runs under the sanitizers' runtime gets the build that reports to it.
    sanitize = hasattr(ctypes.CDLL(None), "__asan_init")
    path = build_module.built_library(sanitize)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise UserError(f"expected the compiled kernels {path} to load, but {error}") from None
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


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


def isa_code(library: ctypes.CDLL, name: str) -> int:
    """The number by which the library knows an instruction set."""
    names = [library.cpux_isa_name(code).decode() for code in range(library.cpux_n_isas())]
    return names.index(name)


def describe(isa: str, n_threads: int) -> str:
    """What computes, for people."""
    return f"native {isa}, {n_threads} thread{'s' if n_threads > 1 else ''}"


def describe_kernels() -> list[str]:
    """Lines for `--version`: what computes experts on this CPU, and what else it could use."""
    try:
        names = supported_isas(open_library())
    except UserError as error:
        return [f"CPU kernels: torch ({error})"]
    return [
        f"CPU kernels: {describe(names[-1], default_threads())} (this CPU runs: {', '.join(names)})"
    ]
