"""Attention on the CPU, of a decode step and of a prompt, beside torch's.

Run as `PYTHONPATH=src python benchmarks/bench_cpu_attention.py`. 32 heads of 128 that share 8 heads
of keys and values, as in Mixtral and Phi-3.5-MoE, or 4, as in Qwen3-30B; bf16, one sequence. A
decode step reads keys and values of its own, so that no cache holds them, and is compared with a
plain read of as many bytes. A prompt attends to itself; it is compared with independent fp32
multiply-adds, and only what a causal mask leaves counts. Limits are measured after each call.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from moe_offload.kernels.bindings import CpuKernels, load_kernels
from moe_offload.model.attention import CpuAttention

HEADS, HEAD_SIZE = 32, 128
KV_HEADS = {"mixtral": 8, "qwen3-30b": 4}
POOL_BYTES = 1 << 28
FMA_SECONDS = 0.02


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def against(call: Callable[[int], object], limit: Callable[[], float], n: int) -> tuple[float, ...]:
    """Median seconds of a call, and medians of the limit beside it and of their product."""
    call(0)  # the first warms up
    pairs = [(seconds(lambda i=i: call(i)), limit()) for i in range(1, n + 1)]
    times, limits = zip(*pairs, strict=True)
    return (
        statistics.median(times),
        statistics.median(limits),
        statistics.median(time * rate for time, rate in pairs),
    )


def decode(kernels: CpuKernels, shape: str, n_keys: int, n: int, beside_torch: bool) -> str:
    attention = CpuAttention(kernels)
    kv_heads = KV_HEADS[shape]
    query = torch.randn(1, HEADS, 1, HEAD_SIZE).bfloat16()
    n_bytes = 2 * kv_heads * n_keys * HEAD_SIZE * 2
    n_pool = max(2, POOL_BYTES // n_bytes)
    pool = torch.empty(n_pool, 2, 1, kv_heads, n_keys, HEAD_SIZE, dtype=torch.bfloat16).normal_()

    def ours(i: int) -> Tensor:
        return attention.attend(query, *pool[i % n_pool], None)

    def torchs(i: int) -> Tensor:
        return scaled_dot_product_attention(query, *pool[i % n_pool], enable_gqa=True)

    took, gbps, read_bytes = against(ours, lambda: kernels.read_gbps(pool) * 1e9, n)
    theirs = against(torchs, lambda: 0.0, n)[0] * 1e6 if beside_torch else float("nan")
    return (
        f"{took * 1e6:10.0f} us {n_bytes / took / 1e9:7.1f} GB/s"
        f" {100 * n_bytes / read_bytes:5.0f}% of {gbps / 1e9:.1f} {theirs:10.0f} us"
    )


def prompt(kernels: CpuKernels, shape: str, n_keys: int, n: int, beside_torch: bool) -> str:
    attention = CpuAttention(kernels)
    query = torch.randn(1, HEADS, n_keys, HEAD_SIZE).bfloat16()
    key, value = torch.randn(2, 1, KV_HEADS[shape], n_keys, HEAD_SIZE).bfloat16()
    flops = 4 * HEADS * HEAD_SIZE * n_keys * (n_keys + 1) / 2

    def ours(_: int) -> Tensor:
        return attention.attend(query, key, value, None)

    def torchs(_: int) -> Tensor:
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    took, peak, peak_flops = against(ours, lambda: kernels.fma_gflops(FMA_SECONDS) * 1e9, n)
    theirs = against(torchs, lambda: 0.0, n)[0] * 1e3 if beside_torch else float("nan")
    return (
        f"{took * 1e3:10.1f} ms {flops / took / 1e9:5.0f} GFLOP/s"
        f" {100 * flops / peak_flops:4.0f}% of {peak / 1e9:.0f} {theirs:10.1f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--isa", default="auto", help="instruction set (default: the best)")
    parser.add_argument("--keys", type=int, nargs="*", default=(128, 512, 2048, 8192, 32768))
    parser.add_argument("--prompts", type=int, nargs="*", default=(512, 4096))
    parser.add_argument("--repetitions", type=int, default=9, help="of a decode step; a prompt: 3")
    parser.add_argument("--no-torch", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    kernels = load_kernels("native", arguments.isa)
    assert kernels is not None
    print(f"{kernels.description}; last column: torch")
    for shape in KV_HEADS:
        for what, sizes, n in (
            (decode, arguments.keys, arguments.repetitions),
            (prompt, arguments.prompts, 3),
        ):
            for n_keys in sizes:
                line = what(kernels, shape, n_keys, n, not arguments.no_torch)
                print(f"{shape:9} {what.__name__:6} {n_keys:6} {line}", flush=True)


if __name__ == "__main__":
    main()
