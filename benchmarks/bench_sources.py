"""How fast quantised checkpoints are read, and kept as they are: MB of the source a second.

A matrix of random codes in memory, so that no disk is waited for. "read" is its numbers in fp32 or
bf16, "kept" what storing it in the format that holds it exactly takes besides.

PYTHONPATH=src python3 benchmarks/bench_sources.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from moe_offload.checkpoint.matrix import MatrixLayout
from moe_offload.checkpoint.quantized_source import dequantised, read_settings
from moe_offload.checkpoint.source_files import LazyTensor
from moe_offload.config import WEIGHT_FORMATS, Scales, WeightFormat

ROWS, COLUMNS, GROUP = 4096, 4096, 128
Kept = tuple[WeightFormat, Scales | None]


def words(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int64).to(torch.int32)


def codes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def scales(*shape: int) -> Tensor:
    return torch.rand(shape).add_(0.1)


def sources() -> dict[str, tuple[dict[str, Tensor], dict[str, Any], Kept | None]]:
    """Name -> tensors, quantization_config, and the format that keeps them."""
    n_groups = COLUMNS // GROUP
    zeros = {"w.qzeros": words(n_groups, ROWS // 8), "w.scales": scales(n_groups, ROWS).half()}
    by_zeros: Kept = ("int4", Scales("float16", GROUP, 1, "zero"))
    ints = {"num_bits": 4, "group_size": 32}
    return {
        "FP8, blocks of 128": (
            {
                "w.weight": torch.randn(ROWS, COLUMNS).to(torch.float8_e4m3fn),
                "w.weight_scale_inv": scales(ROWS // 128, COLUMNS // 128),
            },
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            ("fp8", Scales("float32", 128, 128)),
        ),
        "GPTQ int4": (
            {"w.qweight": words(COLUMNS // 8, ROWS), **zeros},
            {"quant_method": "gptq", "bits": 4, "group_size": GROUP},
            by_zeros,
        ),
        "AWQ": (
            {"w.qweight": words(COLUMNS, ROWS // 8), **zeros},
            {"quant_method": "awq", "bits": 4, "group_size": GROUP},
            by_zeros,
        ),
        "compressed-tensors int4": (
            {
                "w.weight_packed": words(ROWS, COLUMNS // 8),
                "w.weight_scale": scales(ROWS, COLUMNS // 32).bfloat16(),
            },
            {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": ints}}},
            ("int4", Scales("bfloat16", 32)),
        ),
        "MXFP4": (
            {
                "w_blocks": codes(1, COLUMNS, ROWS // 32, 16),
                "w_scales": torch.randint(120, 130, (1, COLUMNS, ROWS // 32), dtype=torch.uint8),
            },
            {"quant_method": "mxfp4"},
            None,
        ),
    }


def seconds(work: Callable[..., object], *arguments: object) -> float:
    """The shortest of three, after one to warm up."""
    times = []
    for _ in range(4):
        started_s = time.perf_counter()
        work(*arguments)
        times.append(time.perf_counter() - started_s)
    return min(times[1:])


def lazy(tensor: Tensor) -> LazyTensor:
    shape = tuple(tensor.shape)
    return LazyTensor(shape, tensor.dtype, Path("memory"), lambda a, b: tensor[a:b])


def main() -> None:
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads, {ROWS} x {COLUMNS} weights; MB/s of the source")
    for name, (tensors, config, kept) in sources().items():
        found = dequantised(
            {key: lazy(tensor) for key, tensor in tensors.items()}, read_settings(config, name)
        )
        (weight,) = found.values()
        assert weight.quantised is not None and weight.quantised.units is not None
        megabytes = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
        line = f"{name}: read {megabytes / seconds(weight.read):.0f}"
        if kept is not None:
            values, units = weight.read(), weight.quantised.units.read()
            layout = MatrixLayout(kept[0], ROWS, COLUMNS, kept[1])
            line += f", kept {megabytes / seconds(layout.take_over, values, units):.0f}"
        print(line)
    for kind in ("Q8_0", "Q4_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"):
        stored = gguf.GGMLQuantizationType[kind]
        block, block_bytes = gguf.GGML_QUANT_SIZES[stored]
        packed = np.random.randint(0, 120, (ROWS, COLUMNS // block * block_bytes), dtype=np.uint8)
        with np.errstate(all="ignore"):
            rate = packed.nbytes / 1e6 / seconds(gguf.dequantize, packed, stored)
        print(f"GGUF {kind}: read {rate:.0f}")
    source = torch.randn(ROWS, COLUMNS).bfloat16()
    for weight_format in ("mxfp4", "fp8"):
        layout = MatrixLayout(weight_format, ROWS, COLUMNS, WEIGHT_FORMATS[weight_format].scales)
        rate = source.nbytes / 1e6 / seconds(layout.pack, source)
        print(f"bf16 to {weight_format}: {rate:.0f}")


if __name__ == "__main__":
    main()
