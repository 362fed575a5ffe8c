"""Compiles the Triton kernels for several GPUs, without one, and prints what came out as JSON."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moe_offload.config import WEIGHT_FORMATS, Scales
from moe_offload.kernels import triton_experts, triton_kernels, triton_tiles

# Turing, the oldest with enough memory to matter; Ampere (A100, RTX 3090), Ada, Hopper. What a
# program may take of shared memory there, in bytes (CUDA C++ Programming Guide, table of technical
# specifications per compute capability).
SHARED_LIMIT_BYTES = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448}
CAPABILITIES = tuple(SHARED_LIMIT_BYTES)
# Weight format -> types of its matrix and scales; int4 once more with a quantised source's.
FORMATS = {
    "fp32": ("*fp32", "*fp16", None),
    "bf16": ("*bf16", "*fp16", None),
    "int8": ("*i32", "*fp16", None),
    "int4": ("*i32", "*fp16", None),
    "mxfp4": ("*i32", "*u8", None),
    "fp8": ("*u8", "*fp32", None),
    "int4-zero": ("*i32", "*bf16", Scales("bfloat16", 128, offset="zero")),
}
SHARED = {
    **dict.fromkeys(("n_columns", "block_words", "matrix_offset", "scale_offset"), "i32"),
    **dict.fromkeys(("offset_offset", "bias_offset"), "i32"),
    "offsets": "*u8",
    "biases": "*fp32",
    "slot_of_pair": "*i32",
    **dict.fromkeys(("slots_0", "slots_1", "slots_2", "slots_3"), "i64"),
}
FIRST = {
    **SHARED,
    "x": "*bf16",
    "middle": "*fp32",
    "intermediate": "i32",
    "top_k": "i32",
    "alpha": "fp32",
    "limit": "fp32",
}
SECOND = {**SHARED, "middle": "*fp32", "weights": "*fp32", "out": "*fp32", "hidden_size": "i32"}
UNPACK = {"offsets": "*u8", "out": "*bf16", "n_columns": "i32"}
TILES = {
    **{name: kind for name, kind in SHARED.items() if not name.startswith("slot")},
    **dict.fromkeys(("slot", "first", "n_tokens"), "i32"),
    "pairs": "*i64",
    "tiles": "*i32",
    "middle": "*bf16",
}
FIRST_TILES = {
    **TILES,
    **dict.fromkeys(("intermediate", "top_k"), "i32"),
    "x": "*bf16",
    "alpha": "fp32",
    "limit": "fp32",
}
SECOND_TILES = {
    **TILES,
    "weights": "*fp32",
    "out": "*fp32",
    "row_of_pair": "*i32",
    "hidden_size": "i32",
}
ADD_PAIRS = {
    **dict.fromkeys(("hidden_size", "top_k"), "i32"),
    "each": "*fp32",
    "row_of_pair": "*i32",
    "out": "*fp32",
}
UNALIGNED = (*triton_kernels.VARYING, *triton_tiles.VARYING, "alpha", "limit")


def kernels(
    every_variant: bool,
) -> Iterator[tuple[str, object, dict[str, str], dict[str, object]]]:
    """(name, kernel, argument types, constants), as TritonExperts launches them on model shapes."""
    for name, (matrix_type, scale_type, own) in FORMATS.items():
        weight_format = name.partition("-")[0]
        scales = own or WEIGHT_FORMATS[weight_format].scales or Scales("float16")
        constants = triton_experts.format_constants(weight_format, scales)
        tile = {**constants, "HAS_BIAS": True, "IN_WORDS": True, "ROWS": triton_experts.ROWS}
        types = {"matrix": matrix_type, "scales": scale_type}
        for kind in ("silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_swiglu", "module"):
            if kind == "silu" or (name == "int8" and every_variant):
                yield (
                    f"first-{name}-{kind}",
                    triton_experts.first_kernel,
                    {**FIRST, **types},
                    {**tile, "HAS_GATE": True, "KIND": kind},
                )
        second = {**SECOND, **types}
        yield f"second-{name}", triton_experts.second_kernel, second, tile
        # a batch; a model without biases
        in_memory = {**tile, "IN_WORDS": False, "HAS_BIAS": False}
        if name == "bf16" or every_variant:
            yield f"second-{name}-in-memory", triton_experts.second_kernel, second, in_memory
        if every_variant:
            yield (
                f"first-{name}-gateless-in-memory",
                triton_experts.first_kernel,
                {**FIRST, **types},
                {**in_memory, "HAS_GATE": False, "KIND": "relu2"},
            )
        if name != "fp32":
            tile = {
                **triton_tiles.tile_constants(constants, triton_tiles.DEFAULT_TILE),
                "HAS_BIAS": True,
                "ONE": False,
            }
            own = {"matrix": matrix_type, "scales": scale_type}
            yield (
                f"first-tiles-{name}",
                triton_tiles.first_tiles_kernel,
                {**FIRST_TILES, **own},
                {**tile, "HAS_GATE": True, "KIND": "silu"},
            )
            if name in ("bf16", "int4-zero"):  # the product is the first's
                second = {**SECOND_TILES, **own}
                yield f"second-tiles-{name}", triton_tiles.second_tiles_kernel, second, tile
            if name == "bf16":
                sizes: dict[str, object] = {"COLUMNS": triton_tiles.SUM_COLUMNS}
                yield "add-pairs", triton_tiles.add_pairs_kernel, ADD_PAIRS, sizes
        if WEIGHT_FORMATS[weight_format].group:
            unpack = {
                **{key: constants[key] for key in ("CODES", "GROUP", "OFFSET")},
                "WORDS": triton_experts.WORDS,
            }
            types = {**UNPACK, "words": "*i32", "scales": scale_type, "n_rows": "i32"}
            yield f"unpack-{name}", triton_experts.unpack_kernel, types, unpack
        elif name == "fp8":
            unpack = {
                **{key: constants[key] for key in ("GROUP", "SCALE_ROWS")},
                "ROWS": triton_experts.ROWS,
                "COLUMNS": triton_experts.DENSE_COLUMNS,
            }
            types = {k: v for k, v in UNPACK.items() if k != "offsets"}
            types |= {"matrix": "*u8", "scales": scale_type, "n_rows": "i32"}
            yield "unpack-fp8", triton_experts.unpack_fp8_kernel, types, unpack


def widest_load(ptx: str) -> int:
    """Bytes of the widest global load."""
    loads = re.findall(r"ld\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)", ptx)
    return max(int(vector or 1) * int(bits) // 8 for vector, bits in loads)


def stack_bytes(cubin: bytes) -> int:
    """Bytes of registers spilled, and other local memory, of a thread."""
    tool = Path(triton.backends.__path__[0]) / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    found = re.search(r"STACK:(\d+)", done.stdout)
    assert found, done.stdout
    return int(found[1])


def report(capabilities: Iterable[int]) -> Iterator[dict[str, object]]:
    for capability in capabilities:
        for name, kernel, types, constants in kernels(capability == CAPABILITIES[-1]):
            if "tiles" in name and capability < triton_tiles.LEAST_CAPABILITY:
                continue
            names = kernel.arg_names
            aligned = [n for n in types if n not in UNALIGNED]
            source = ASTSource(
                fn=kernel,
                signature={n: types.get(n, "constexpr") for n in names},
                constexprs={(names.index(n),): value for n, value in constants.items()},
                attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
            )
            n_warps = triton_tiles.DEFAULT_TILE.n_warps if "tiles" in name else 4
            target = GPUTarget("cuda", capability, 32)
            binary = triton.compile(source, target=target, options={"num_warps": n_warps})
            yield {
                "kernel": name,
                "capability": capability,
                "cubin_bytes": len(binary.asm["cubin"]),
                "widest_load_bytes": widest_load(binary.asm["ptx"]),
                "stack_bytes": stack_bytes(binary.asm["cubin"]),
                "shared_bytes": binary.metadata.shared,
                "is_atomic": re.search(r"\b(atom|red)\.", binary.asm["ptx"]) is not None,
                "uses_tensor_cores": "mma" in binary.asm["ptx"],
            }


if __name__ == "__main__":
    print(json.dumps(list(report(map(int, sys.argv[1:])))))
