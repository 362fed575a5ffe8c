"""The compiled CPU kernels' library: its C interface (`cpp/api.h`), its instruction sets.

Needs no torch. What computes with it goes through `bindings.py`, for the threads' sake.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence
from ctypes import c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_uint32, c_void_p
from typing import Any, Final

import psutil

from moe_offload.config import WEIGHT_FORMATS
from moe_offload.errors import FEW_THREADS, UserError
from moe_offload.kernels import build as build_module

FORMAT_CODES: Final = {name: code for code, name in enumerate(WEIGHT_FORMATS)}
SCALE_CODES: Final = {"float16": 0, "bfloat16": 1, "float32": 2, "uint8": 3}
OFFSET_CODES: Final = {"": 0, "zero": 1, "minimum": 2}
ACTIVATION_CODES: Final = {
    "silu": 0,
    "gelu": 1,
    "gelu_tanh": 2,
    "relu": 3,
    "relu2": 4,
    "clamped_swiglu": 5,
    "module": -1,
}
# More than any machine has cores for; GCC's OpenMP runtime dies of tens of thousands.
MOST_THREADS: Final = 1024


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class LayerArguments(ctypes.Structure):
    """`cpux_layer` of api.h."""

    _fields_ = (
        *_fields(c_int32, "weight_format activation has_gate"),
        *_fields(c_float, "alpha limit"),
        *_fields(c_int64, "hidden_size intermediate_size"),
        *_fields(c_int64, "gate_up gate_up_scale gate_up_offset gate_up_bias"),
        *_fields(c_int64, "down down_scale down_offset down_bias"),
        *_fields(c_int32, "scale_type offset_type"),
        *_fields(c_int64, "scale_group scale_rows"),
    )


class TokenArguments(ctypes.Structure):
    """`cpux_tokens` of api.h."""

    _fields_ = (
        *_fields(c_void_p, "hidden"),
        *_fields(c_int32, "hidden_is_bf16"),
        *_fields(c_int64, "n_tokens top_k n_experts"),
        *_fields(c_void_p, "index weight blocks on_cpu"),
    )


class MatrixArguments(ctypes.Structure):
    """`cpux_matrix` of api.h."""

    _fields_ = (
        *_fields(c_int32, "weight_format"),
        *_fields(c_int64, "rows cols"),
        *_fields(c_void_p, "weight scale bias"),
    )


class WeightsArguments(ctypes.Structure):
    """`cpux_weights` of api.h."""

    _fields_ = (
        *_fields(c_void_p, "weight"),
        *_fields(c_int32, "is_bf16"),
        *_fields(c_int64, "rows cols row_stride col_stride"),
    )


class AttentionArguments(ctypes.Structure):
    """`cpux_attention` of api.h."""

    _fields_ = (
        *_fields(c_int32, "is_bf16"),
        *_fields(c_int64, "n_batch n_heads n_kv_heads n_queries n_keys key_size value_size"),
        *_fields(c_float, "scale softcap"),
        *_fields(c_void_p, "sinks query keys values"),
        *_fields(c_int64 * 3, "query_strides"),
        *_fields(c_int64 * 2, "key_strides value_strides"),
        *_fields(c_void_p, "mask"),
        *_fields(c_int64 * 2, "mask_strides"),
    )


class NormArguments(ctypes.Structure):
    """`cpux_norm` of api.h."""

    _fields_ = (
        *_fields(c_int32, "form weight_is_bf16"),
        *_fields(c_float, "epsilon"),
        *_fields(c_int64, "width"),
        *_fields(c_void_p, "weight"),
    )


class StepArguments(ctypes.Structure):
    """`cpux_attention_step` of api.h."""

    _fields_ = (
        *_fields(c_void_p, "before query_norm key_norm after query key value output"),
        *_fields(c_int64, "n_heads n_kv_heads head_size"),
        *_fields(c_float, "scale"),
        *_fields(c_void_p, "keys values"),
        *_fields(c_int64 * 2, "key_strides value_strides"),
        *_fields(c_int64, "n_keys"),
    )


class RouterArguments(ctypes.Structure):
    """`cpux_router` of api.h."""

    _fields_ = (
        *_fields(MatrixArguments, "matrix"),
        *_fields(c_int32, "is_bf16 scores_are_bf16 normalise"),
        *_fields(c_int64, "top_k"),
    )


_LAYER: Final = ctypes.POINTER(LayerArguments)
_TOKENS: Final = ctypes.POINTER(TokenArguments)
# Functions that take an instruction set and a number of threads, then these, and give a code.
_COMPUTING: Final = {
    "run": (_LAYER, _TOKENS, c_void_p),
    "first": (_LAYER, _TOKENS, c_void_p),
    "second": (_LAYER, _TOKENS, c_void_p, c_void_p),
    "activate": (_LAYER, c_void_p, c_void_p, c_int64, c_void_p),
    "add": (_LAYER, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p),
    "linear": (ctypes.POINTER(MatrixArguments), c_void_p, c_int, c_int64, c_void_p),
    "quantise": (ctypes.POINTER(WeightsArguments), c_int, c_void_p, c_void_p),
    "pack": (c_void_p, *(c_int64,) * 4, c_int, c_void_p),
    "attend": (ctypes.POINTER(AttentionArguments), c_void_p),
    "attend_step": (
        *(ctypes.POINTER(StepArguments), c_void_p, c_void_p, c_void_p, c_int64),
        *(c_void_p, c_void_p),
    ),
    "rms_norm": (ctypes.POINTER(NormArguments), c_void_p, c_int, c_int64, c_void_p),
    "rotate": (*(c_void_p,) * 3, *(c_int64,) * 3, c_void_p),
    "route": (
        *(ctypes.POINTER(RouterArguments), c_void_p, c_int64),
        *(c_void_p, c_void_p, c_void_p),
    ),
    "read": (c_void_p, c_int64, ctypes.POINTER(c_double)),
    "multiply_add": (c_double, ctypes.POINTER(c_double)),
}
# Name -> what a function gives and takes.
_SIGNATURES: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    **{name: (c_int, (c_int, c_int, *rest)) for name, rest in _COMPUTING.items()},
    "count_pairs": (c_int64, (_TOKENS,)),
    "crc32": (c_int, (c_void_p, c_int64, ctypes.POINTER(c_uint32))),
    "n_isas": (c_int, ()),
    "isa_name": (c_char_p, (c_int,)),
    "isa_supported": (c_int, (c_int,)),
    "pin_threads": (c_int, (ctypes.POINTER(c_int32), c_int)),
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
        function = getattr(library, f"cpux_{name}")
        function.restype, function.argtypes = result, arguments
    return library


def _isa_names(library: ctypes.CDLL) -> list[str]:
    return [library.cpux_isa_name(code).decode() for code in range(library.cpux_n_isas())]


def supported_isas(library: ctypes.CDLL) -> list[str]:
    """Instruction sets that the library was built with and this CPU has, slowest first."""
    names = enumerate(_isa_names(library))
    return [name for code, name in names if library.cpux_isa_supported(code)]


def isa_code(library: ctypes.CDLL, name: str) -> int:
    """The number by which the library knows an instruction set."""
    return _isa_names(library).index(name)


def require_isa(library: ctypes.CDLL, name: str) -> None:
    """UserError for an instruction set, or auto, that this CPU or this build does not have."""
    names = supported_isas(library)
    if name != "auto" and name not in names:
        raise UserError(
            f"expected --cpu-isa to be auto or one of {', '.join(names)} on this CPU, found "
            f"{name!r}"
        )


def refused_cpus(cpus: Sequence[int]) -> UserError:
    """The error for CPUs that threads cannot be bound to."""
    return UserError(
        f"expected --cpu-affinity to list CPUs this process may use "
        f"({_span(sorted(os.sched_getaffinity(0)))}), found {_span(cpus)}"
    )


def _span(cpus: Sequence[int]) -> str:
    """CPU numbers as --cpu-affinity takes them: 0-7,16."""
    runs: list[list[int]] = []
    for cpu in cpus:
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


def default_threads() -> int:
    """`OMP_NUM_THREADS`, else one thread per physical core this process may run on.

    UserError for a number that no machine has cores for.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if asked.isdecimal() and int(asked) > 0:
        if int(asked) > MOST_THREADS:
            raise UserError(
                f"expected OMP_NUM_THREADS to be at most {MOST_THREADS}, found {asked:.20}: "
                "one thread per physical core is fastest"
            )
        return int(asked)
    usable = len(os.sched_getaffinity(0))
    return max(1, min(usable, psutil.cpu_count(logical=False) or usable))


def require_threads(n_threads: int) -> None:
    """UserError unless so many threads can run at once: OpenMP would end the program instead."""
    end = threading.Event()
    threads = [threading.Thread(target=end.wait, daemon=True) for _ in range(n_threads)]
    started = []
    try:
        for thread in threads:
            thread.start()
            started.append(thread)
    except RuntimeError as error:
        raise UserError(FEW_THREADS) from error
    finally:
        end.set()
        for thread in started:
            thread.join()


def describe(what: str, n_threads: int) -> str:
    """What computes, for people."""
    return f"{what}, {n_threads} thread{'s' if n_threads > 1 else ''}"


def describe_kernels() -> list[str]:
    """Lines for `--version`: what computes experts on this CPU, and what else it could use."""
    try:
        names, n_threads = supported_isas(open_library()), default_threads()
    except UserError as error:
        return [f"CPU kernels: torch ({error})"]
    best = describe(f"native {names[-1]}", n_threads)
    return [f"CPU kernels: {best} (this CPU runs: {', '.join(names)})"]
