"""Attention of one decode step on the CPU, beside torch's.

Run as `PYTHONPATH=src python benchmarks/bench_cpu_attention.py`. Mixtral's and Phi-3.5-MoE's shape:
32 heads of 128 that share 8 heads of keys and values, bf16, one sequence. Each call reads keys and
values of its own, so that no cache holds them. `% of read` is of a plain read of as many bytes
beside it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from moe_offload.kernels.bindings import load_kernels
from moe_offload.model.attention import CpuAttention

HEADS, KV_HEADS, HEAD_SIZE = 32, 8, 128
POOL_BYTES = 1 << 28


def median_us(call: Callable[[int], object], n: int) -> float:
    times = []
    for i in range(n + 1):
        started = time.perf_counter()
        call(i)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:]) * 1e6  # the first warms up


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--isa", default="auto", help="instruction set (default: the best)")
    parser.add_argument("--keys", type=int, nargs="*", default=(128, 512, 2048, 8192))
    parser.add_argument("--repetitions", type=int, default=15)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    kernels = load_kernels("native", arguments.isa)
    assert kernels is not None
    attention = CpuAttention(kernels)
    query = torch.randn(1, HEADS, 1, HEAD_SIZE).bfloat16()
    print(
        f"{kernels.description}\n{'keys':>6} {'us':>8} {'GB/s':>6} {'% of read':>9} {'torch us':>9}"
    )
    for n_keys in arguments.keys:
        n_bytes = 2 * KV_HEADS * n_keys * HEAD_SIZE * 2
        n_pool = max(2, min(arguments.repetitions, POOL_BYTES // n_bytes))
        pool = torch.randn(n_pool, 2, 1, KV_HEADS, n_keys, HEAD_SIZE).bfloat16()

        def ours(i: int, pool: Tensor = pool) -> None:
            key, value = pool[i % len(pool)]
            attention.attend(query, key, value, None)

        def torchs(i: int, pool: Tensor = pool) -> None:
            key, value = pool[i % len(pool)]
            scaled_dot_product_attention(query, key, value, enable_gqa=True)

        us = median_us(ours, arguments.repetitions)
        read_gbps = kernels.read_gbps(pool)
        print(
            f"{n_keys:6} {us:8.0f} {n_bytes / us / 1e3:6.1f} {n_bytes / us / 10 / read_gbps:9.1f}"
            f" {median_us(torchs, arguments.repetitions):9.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
