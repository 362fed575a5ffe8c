"""The compiled CPU kernels' library: its C interface, as `cpp/api.h` says it, its instruction sets.

Needs no torch. What computes with it goes through `bindings.py`, for the threads' sake.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from ctypes import c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_void_p
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


# The types of api.h. A pointer is an address, but to a structure: then it is checked whose.
_NUMBERS: Final[dict[str, Any]] = {
    "int": c_int,
    "int32_t": c_int32,
    "int64_t": c_int64,
    "float": c_float,
    "double": c_double,
}
_HEADER: Final = re.sub("//.*", "", (build_module.SOURCES / "api.h").read_text("utf-8"))
_DECLARED: Final = re.compile(r"(?:const )?(\w+)([ *]+)(.+)", re.DOTALL)


def _declared(text: str, structures: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The names and types of `int64_t a, b[3]` and the like, by value where it is a structure."""
    found = _DECLARED.fullmatch(text.strip())
    assert found is not None, text
    for name in map(str.strip, found[3].split(",")):
        name, _, size = name.rstrip("]").partition("[")
        if "*" in found[2] + name:
            kind: Any = c_char_p if found[1] == "char" else c_void_p
        else:
            kind = _NUMBERS[found[1]] if found[1] in _NUMBERS else structures[found[1]]
        yield name.strip("* "), kind * int(size) if size else kind


def _members(name: str, **structures: Any) -> list[tuple[str, Any]]:
    """The fields of a structure of api.h, which may hold others of `structures`."""
    found = re.search(rf"struct {name} {{(.*?)}};", _HEADER, re.DOTALL)
    assert found is not None, name
    lines = found[1].strip().removesuffix(";").split(";")
    return [member for line in lines for member in _declared(line, structures)]


class LayerArguments(ctypes.Structure):
    _fields_ = _members("cpux_layer")


class TokenArguments(ctypes.Structure):
    _fields_ = _members("cpux_tokens")


class MatrixArguments(ctypes.Structure):
    _fields_ = _members("cpux_matrix")


class WeightsArguments(ctypes.Structure):
    _fields_ = _members("cpux_weights")


class AttentionArguments(ctypes.Structure):
    _fields_ = _members("cpux_attention")


class NormArguments(ctypes.Structure):
    _fields_ = _members("cpux_norm")


class StepArguments(ctypes.Structure):
    _fields_ = _members("cpux_attention_step")


class RouterArguments(ctypes.Structure):
    _fields_ = _members("cpux_router", cpux_matrix=MatrixArguments)


_STRUCTURES: Final = {
    "cpux_layer": LayerArguments,
    "cpux_tokens": TokenArguments,
    "cpux_matrix": MatrixArguments,
    "cpux_weights": WeightsArguments,
    "cpux_attention": AttentionArguments,
    "cpux_norm": NormArguments,
    "cpux_attention_step": StepArguments,
    "cpux_router": RouterArguments,
}


def _signatures() -> Iterator[tuple[str, Any, list[Any]]]:
    """Name, result and arguments of each function of api.h."""
    functions = re.finditer(r"^CPUX_EXPORT (.+?)(\w+)\((.*?)\);", _HEADER, re.DOTALL | re.MULTILINE)
    pointers = {f"{name}*": ctypes.POINTER(kind) for name, kind in _STRUCTURES.items()}
    for result, name, arguments in (found.groups() for found in functions):
        kinds = []
        for one in arguments.split(",") if arguments != "void" else []:
            pointer = pointers.get(" ".join(one.split()[:-1]).removeprefix("const "))
            kinds.append(pointer or next(_declared(one, {}))[1])
        yield name, next(_declared(result + name, {}))[1], kinds


def open_library() -> ctypes.CDLL:
    """Load the library, compiled first where it is missing; UserError where that is impossible."""
    # A process that runs under the sanitizers' runtime gets the build that reports to it.
    sanitize = hasattr(ctypes.CDLL(None), "__asan_init")
    path = build_module.built_library(sanitize)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise UserError(f"expected the compiled kernels {path} to load, but {error}") from None
    for name, result, arguments in _signatures():
        function = getattr(library, name)
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
