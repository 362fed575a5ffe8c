"""How fast quantised checkpoints are read, and kept as they are: MB of the source a second.

A matrix of random codes in memory, so that no disk is waited for, and one thread. "read" is its
numbers in fp32 or bf16, "kept" from the source's tensors to the arrays of the format that holds it
exactly. "plain" is the format's formula in torch operations over 128 rows or columns at a time, or
gguf's own code, and nothing is turned or checked. Preparing can be no faster than that or than the
disk, whose speed is told first; behind each figure is its share of the slower of the two. All but
the disk is in seconds of the CPU: other programs that run meanwhile are not in them.

THP_MEM_ALLOC_ENABLE=1 PYTHONPATH=src python3 benchmarks/bench_sources.py
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from moe_offload.checkpoint.matrix import MatrixLayout
from moe_offload.checkpoint.quantized_settings import read_settings
from moe_offload.checkpoint.quantized_source import dequantised
from moe_offload.checkpoint.source_files import LazyTensor
from moe_offload.config import WEIGHT_FORMATS, Scales, WeightFormat
from moe_offload.kernels.bindings import load_kernels
from moe_offload.kernels.cpu_quantise import KernelPacker

ROWS, COLUMNS, GROUP = 4096, 4096, 128
Kept = tuple[WeightFormat, Scales | None]


def words(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int64).to(torch.int32)


def codes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def scales(*shape: int) -> Tensor:
    return torch.rand(shape).add_(0.1)


def sources() -> dict[str, tuple[dict[str, Tensor], dict[str, Any], Kept]]:
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
            ("mxfp4", WEIGHT_FORMATS["mxfp4"].scales),
        ),
    }


NIBBLES = torch.arange(0, 32, 4, dtype=torch.int32)
AWQ_ORDER = NIBBLES[[0, 4, 1, 5, 2, 6, 3, 7]]
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def nibbles(packed: Tensor, order: Tensor = NIBBLES) -> Tensor:
    """[..., 8 n] of int32 [..., n]."""
    return ((packed[..., None] >> order) & 15).flatten(-2)


def plain(name: str, tensors: dict[str, Tensor]) -> None:
    """The weights by the format's own formula, in its own order of rows and columns."""
    parts = [tensor[0] if name == "MXFP4" else tensor for tensor in tensors.values()]
    for chunk in zip(*(part.chunk(COLUMNS // GROUP) for part in parts), strict=True):
        plain_chunk(name, *chunk)


def plain_chunk(name: str, first: Tensor, *others: Tensor) -> Tensor:
    if name.startswith("FP8"):
        return first.float().view(128, -1, 128) * others[0][..., None]
    if name == "MXFP4":
        codes = torch.stack((first & 15, first >> 4), -1).int()
        values = E2M1.index_select(0, codes.flatten()).view(*first.shape[:2], 32)
        return values * torch.exp2(others[0].float() - 127)[..., None]
    if name.startswith("compressed"):
        return (nibbles(first) - 8).unflatten(1, (-1, 32)) * others[0].float()[..., None]
    order = AWQ_ORDER if name == "AWQ" else NIBBLES
    codes = nibbles(first, order) if name == "AWQ" else (first[:, None] >> NIBBLES[:, None]) & 15
    return (codes.view(GROUP, ROWS) - nibbles(others[0], order)) * others[1].float()


def disk_rate(n_bytes: int = 1 << 29) -> float:
    """MB/s of writing so many bytes in one file of the current folder, until they are there."""
    data = os.urandom(1 << 22)
    with tempfile.TemporaryFile(dir=".") as file:
        started_s = time.perf_counter()
        for _ in range(n_bytes // len(data)):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return n_bytes / 1e6 / (time.perf_counter() - started_s)


def seconds(work: Callable[..., object]) -> float:
    """The CPU's; the shortest of three, after one to warm up."""
    times = []
    for _ in range(4):
        started_s = time.process_time()
        work()
        times.append(time.process_time() - started_s)
    return min(times[1:])


def lazy(tensor: Tensor) -> LazyTensor:
    shape = tuple(tensor.shape)
    return LazyTensor(shape, tensor.dtype, Path("memory"), lambda a, b: tensor[a:b])


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    kernels = load_kernels("native")
    assert kernels is not None
    packer = KernelPacker(replace(kernels, threads=1))
    disk = disk_rate()
    print(f"one thread, {ROWS} x {COLUMNS} weights; MB/s of the source; the disk: {disk:.0f}")
    for name, (tensors, config, kept) in sources().items():
        found = dequantised(
            {key: lazy(tensor) for key, tensor in tensors.items()}, read_settings(config, name)
        )
        (weight,) = found.values()
        assert weight.quantised is not None and weight.quantised.read_rows is not None
        layout = MatrixLayout(kept[0], ROWS, COLUMNS, kept[1])
        read_codes, n_first = weight.quantised.read_rows, weight.shape[0]

        def keep() -> None:
            codes = read_codes(0, n_first)  # noqa: B023
            if codes.codes.dim() == 3:
                codes = codes.map(lambda part: part[0].t())
            assert layout.take_over(codes, packer) is not None  # noqa: B023

        n_bytes = sum(tensor.nbytes for tensor in tensors.values())
        by_formula = partial(plain, name, tensors)
        report(name, n_bytes, disk, plain=by_formula, read=weight.read, kept=keep)
    for kind in ("Q8_0", "Q4_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"):
        stored = gguf.GGMLQuantizationType[kind]
        block, block_bytes = gguf.GGML_QUANT_SIZES[stored]
        packed = np.random.randint(0, 120, (ROWS, COLUMNS // block * block_bytes), dtype=np.uint8)
        with np.errstate(all="ignore"):
            report(
                f"GGUF {kind}", packed.nbytes, disk, plain=partial(gguf.dequantize, packed, stored)
            )
    source = torch.randn(ROWS, COLUMNS).bfloat16()
    for weight_format in ("int8", "int4", "mxfp4", "fp8"):
        layout = MatrixLayout(weight_format, ROWS, COLUMNS, WEIGHT_FORMATS[weight_format].scales)
        made = partial(layout.pack, source, packer)
        report(f"bf16 to {weight_format}", source.nbytes, disk, made=made)


def report(name: str, n_bytes: int, disk: float, **works: Callable[[], object]) -> None:
    """A line of what each of `works` takes, and its share of the bound."""
    rates = {what: n_bytes / 1e6 / seconds(work) for what, work in works.items()}
    bound = min(disk, rates.get("plain", disk))
    told = [f"{what} {rate:.0f}, {min(rate / bound, 1):.0%}" for what, rate in rates.items()]
    print(f"{name}: {'; '.join(told)}", flush=True)


if __name__ == "__main__":
    main()
