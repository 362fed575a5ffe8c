"""How close the CPU expert kernels come to this machine's memory bandwidth and arithmetic.

Run as `PYTHONPATH=src python benchmarks/bench_cpu_experts.py [--json FILE]`. Every case rotates
over more experts than any cache holds. Each repetition times the kernels, a plain read of other
experts' memory and, for many tokens, a burst of multiply-adds, one after the other on the same
threads and instruction set: percentages are medians of ratios within a repetition, so a noisy
neighbour slows both sides. `torch` is bf16 through `torch.nn.functional.linear`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from moe_offload.checkpoint.block import Activation, BlockLayout, block_layout
from moe_offload.config import WeightFormat
from moe_offload.experts.store import ExpertStore
from moe_offload.kernels.bindings import CpuKernels
from moe_offload.kernels.cpu_experts import CpuExperts
from moe_offload.kernels.oracle import expert_ffn


@dataclass(frozen=True)
class Shape:
    name: str
    hidden_size: int
    intermediate_size: int
    n_chosen: int  # experts of one call


SHAPES = (
    Shape("mixtral", 4096, 14336, 2),
    Shape("phi3.5", 4096, 6400, 2),
    Shape("qwen3-30b", 2048, 768, 8),
)
FORMATS: tuple[WeightFormat, ...] = ("bf16", "int8", "int4", "mxfp4", "fp8")
TOKENS = (1, 4, 128)
POOL_BYTES = 1 << 30  # several times the largest last-level cache in use


@dataclass(frozen=True)
class Row:
    """One case. `percent_of_fma_peak` is of fp32: integer products may pass 100."""

    shape: str
    dtype: str
    tokens: int
    us: float
    us_low: float
    us_high: float
    gbps: float
    percent_of_read: float
    gflops: float
    percent_of_fma_peak: float
    torch_us: float


class Pool:
    """Blocks of one shape and format in one allocation; plausible weights, cheap to fill."""

    def __init__(self, layout: BlockLayout, n_chosen: int) -> None:
        n_blocks = max(2 * n_chosen, POOL_BYTES // layout.block_bytes // n_chosen * n_chosen)
        self.layout = layout
        self.blocks = ExpertStore([layout], [n_blocks]).blocks(0)
        self._fill(self.blocks[0])
        self.blocks[1:] = self.blocks[0]
        self.pointers = torch.tensor([block.data_ptr() for block in self.blocks])
        self.used_bytes = sum(field.n_bytes for field in layout.fields)
        self.next = 0

    def _fill(self, block: torch.Tensor) -> None:
        for field in self.layout.fields:
            view = field.view(block)
            if field.name.endswith("_scale") and field.dtype == "uint8":
                view.random_(115, 120)  # E8M0: 2^-12 to 2^-8
            elif field.dtype == "uint8":
                view.random_(0, 256)
            elif field.dtype == "float8_e4m3fn":
                view.copy_(torch.randn(view.shape) * 100)
            else:
                view.normal_(0, 0.02)

    def take(self, n: int) -> list[int]:
        chosen = [(self.next + i) % len(self.blocks) for i in range(n)]
        self.next = (self.next + n) % len(self.blocks)
        return chosen


def measure(
    shape: Shape,
    pool: Pool,
    n_tokens: int,
    isa: str,
    budget_s: float,
    torch_us: float,
    onednn_tokens: int | None,
) -> Row:
    experts = CpuExperts(pool.layout, Activation("silu"), kernel="native", isa=isa)
    if pool.layout.weight_format == "bf16":
        experts = experts.with_onednn(onednn_tokens)
    kernels = experts.kernels
    assert kernels is not None
    hidden = torch.randn(n_tokens, shape.hidden_size).bfloat16()
    weights = torch.full((n_tokens, shape.n_chosen), 1.0 / shape.n_chosen)
    on_cpu = torch.ones(len(pool.blocks), dtype=torch.uint8)
    out = torch.empty(n_tokens, shape.hidden_size)
    work_bytes = shape.n_chosen * pool.used_bytes
    work_flops = 6.0 * n_tokens * shape.n_chosen * shape.hidden_size * shape.intermediate_size
    peak = 0.0
    times, read_ratios, fma_ratios = [], [], []
    started = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - started < budget_s and len(times) < 300):
        index = torch.tensor([pool.take(shape.n_chosen)]).expand(n_tokens, -1).contiguous()
        before = time.perf_counter()
        experts.run(hidden, pool.pointers, on_cpu, index, weights, out)
        times.append(time.perf_counter() - before)
        read_gbps = kernels.read_gbps(_other_bytes(pool, shape.n_chosen))
        read_ratios.append(work_bytes / times[-1] / 1e9 / read_gbps)
        if n_tokens >= 16 or not fma_ratios:
            peak = kernels.fma_gflops(0.02)
        fma_ratios.append(work_flops / times[-1] / 1e9 / peak)
    times, read_ratios, fma_ratios = times[1:], read_ratios[1:], fma_ratios[1:]  # warm-up
    median = statistics.median(times)
    deciles = statistics.quantiles(times, n=10)
    return Row(
        shape=shape.name,
        dtype=pool.layout.weight_format,
        tokens=n_tokens,
        us=median * 1e6,
        us_low=deciles[0] * 1e6,
        us_high=deciles[-1] * 1e6,
        gbps=work_bytes / median / 1e9,
        percent_of_read=100 * statistics.median(read_ratios),
        gflops=work_flops / median / 1e9,
        percent_of_fma_peak=100 * statistics.median(fma_ratios),
        torch_us=torch_us,
    )


def _other_bytes(pool: Pool, n: int) -> torch.Tensor:
    """Memory of the next experts: as cold as what the kernels will read, and as much."""
    first = pool.take(n)[0]
    flat = pool.blocks.view(-1)
    start = first * pool.layout.block_bytes
    return flat[start : start + max(n * pool.layout.block_bytes, 64 << 20)]


def measure_torch(shape: Shape, pool: Pool, n_tokens: int, budget_s: float) -> float:
    """Median us of the same work through torch in bf16."""
    hidden = torch.randn(n_tokens, shape.hidden_size).bfloat16()
    times = []
    started = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - started < budget_s and len(times) < 100):
        chosen = pool.take(shape.n_chosen)
        before = time.perf_counter()
        for expert in chosen:
            expert_ffn(pool.layout, pool.blocks[expert], hidden, Activation("silu"))
        times.append(time.perf_counter() - before)
    return statistics.median(times[1:]) * 1e6


def report_machine(kernels: CpuKernels) -> None:
    data = torch.ones(POOL_BYTES // 4)
    reads = [kernels.read_gbps(data) for _ in range(7)]
    peaks = [kernels.fma_gflops(0.05) for _ in range(7)]
    print(
        f"{kernels.description}: plain read {statistics.median(reads):.1f} GB/s "
        f"({min(reads):.1f}-{max(reads):.1f}), FMA peak {statistics.median(peaks):.0f} GFLOP/s "
        f"({min(peaks):.0f}-{max(peaks):.0f}); torch uses {torch.get_num_threads()} threads"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    parser.add_argument("--isa", default="auto", help="instruction set (default: the best)")
    parser.add_argument(
        "--only", nargs="*", default=[], help="shapes, dtypes, token counts to keep"
    )
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS, help="token counts")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each case")
    parser.add_argument(
        "--onednn",
        type=int,
        metavar="N",
        help="bf16 experts with N tokens or more through oneDNN, as a calibration may decide",
    )
    parser.add_argument("--no-torch", action="store_true", help="leave torch out")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)

    def kept(kind: set[str], value: str) -> bool:
        named = kind & set(arguments.only)
        return not named or value in named

    probe = CpuExperts(
        block_layout("bf16", 16, 16), Activation("silu"), kernel="native", isa=arguments.isa
    )
    assert probe.kernels is not None
    report_machine(probe.kernels)
    print(
        f"{'shape':10} {'dtype':5} {'T':>4} {'ms':>9} {'p10-p90':>17} {'GB/s':>6} {'%read':>6} "
        f"{'GFLOP/s':>8} {'%FMA':>6} {'torch ms':>9}"
    )
    rows = []
    for shape in SHAPES:
        if not kept({s.name for s in SHAPES}, shape.name):
            continue
        torch_us: dict[int, float] = {}
        for weight_format in FORMATS:
            formats = [f for f in FORMATS if kept(set(FORMATS), f)]
            if weight_format not in formats and (weight_format != "bf16" or arguments.no_torch):
                continue
            pool = Pool(
                block_layout(weight_format, shape.hidden_size, shape.intermediate_size),
                shape.n_chosen,
            )
            for n_tokens in arguments.tokens:
                if weight_format == "bf16" and not arguments.no_torch:
                    torch_us[n_tokens] = measure_torch(shape, pool, n_tokens, arguments.seconds / 2)
                if weight_format not in formats:
                    continue
                row = measure(
                    shape,
                    pool,
                    n_tokens,
                    arguments.isa,
                    arguments.seconds,
                    torch_us.get(n_tokens, float("nan")),
                    arguments.onednn,
                )
                rows.append(row)
                print(
                    f"{row.shape:10} {row.dtype:5} {row.tokens:4} {row.us / 1e3:9.3f} "
                    f"{row.us_low / 1e3:8.3f}-{row.us_high / 1e3:8.3f} {row.gbps:6.1f} "
                    f"{row.percent_of_read:6.1f} {row.gflops:8.1f} {row.percent_of_fma_peak:6.1f} "
                    f"{row.torch_us / 1e3:9.3f}",
                    flush=True,
                )
            del pool
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
