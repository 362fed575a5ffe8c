"""Starting and preparing: a run's first token, its loading, and what makes int8 and int4.

Starts `src/main.py` on a prepared folder a few times, on the CPU, and reads the experts as a run
does and, in turns, with as many threads that only copy. Both are warm: the files were read before,
and lie in the page cache where memory has room. Then quantises a bf16 matrix on one core.

PYTHONPATH=src python3 benchmarks/bench_start.py --model-path build/demo/prepared
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from moe_offload.checkpoint.prepared import Manifest, read_manifest
from moe_offload.experts.store import READ_THREADS, ExpertStore
from moe_offload.kernels.bindings import load_kernels
from moe_offload.kernels.cpu_quantise import KernelPacker
from moe_offload.kernels.library import open_library, supported_isas

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ("--device", "cpu", "--prompt", "Hello", "--max-tokens", "2", "--no-record", "--quiet")


def start(folder: Path) -> tuple[float, float]:
    """Seconds from the command to the first text on stdout, and to the end."""
    started_s = time.perf_counter()
    command = [sys.executable, ROOT / "src" / "main.py", "--model-path", folder, *FLAGS]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        if not process.stdout.read(1):
            sys.exit(f"{folder}: no token came")
        first_s = time.perf_counter() - started_s
        process.stdout.read()
    return first_s, time.perf_counter() - started_s


def new_store(manifest: Manifest) -> ExpertStore:
    layers = manifest.moe_layers
    layouts, n_experts = [one.layout for one in layers], [one.n_experts for one in layers]
    return ExpertStore(layouts, n_experts, kernels=load_kernels())


def load(manifest: Manifest) -> float:
    """GB/s of the experts' loading."""
    store = new_store(manifest)
    started_s = time.perf_counter()
    store.read(manifest.moe_layers)
    return store.total_bytes / (time.perf_counter() - started_s) / 1e9


def copy(manifest: Manifest) -> float:
    """GB/s of reads into the same kind of memory, block by block, nothing checked."""
    store = new_store(manifest)

    def read(position: int, expert: int) -> None:
        layer = manifest.moe_layers[position]
        with layer.file.open("rb", buffering=0) as file:
            view = store.block(position, expert).numpy().data
            os.preadv(file.fileno(), [view], layer.block_offset_bytes(expert))

    jobs = [
        (position, expert)
        for position, layer in enumerate(manifest.moe_layers)
        for expert in range(layer.n_experts)
    ]
    started_s = time.perf_counter()
    with ThreadPoolExecutor(READ_THREADS) as pool:
        list(pool.map(lambda job: read(*job), jobs))
    return store.total_bytes / (time.perf_counter() - started_s) / 1e9


def quantise_gbps(bits: int, isa: str, repetitions: int) -> float:
    """GB/s of bf16 that one thread turns into int8 or int4."""
    kernels = load_kernels("native", isa)
    assert kernels is not None
    packer = KernelPacker(replace(kernels, threads=1))
    weight = torch.randn(2048, 4096).mul_(0.02).bfloat16()
    times = []
    for _ in range(repetitions):
        started_s = time.perf_counter()
        packer.quantize(weight, bits)
        times.append(time.perf_counter() - started_s)
    return weight.nbytes / statistics.median(times) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", type=Path, default=ROOT / "build" / "demo" / "prepared")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    folder = arguments.model_path
    manifest = read_manifest(folder)
    start(folder)  # compiles what is missing, and warms the page cache
    times = [start(folder) for _ in range(arguments.runs)]
    for what, of in (("first token", 0), ("end", 1)):
        found = sorted(one[of] for one in times)
        print(f"{what}: median {statistics.median(found):.2f} s, {found[0]:.2f} to {found[-1]:.2f}")
    pairs = [(load(manifest), copy(manifest)) for _ in range(arguments.runs)]
    ratio = statistics.median(loaded / copied for loaded, copied in pairs)
    loaded, copied = (statistics.median(one) for one in zip(*pairs, strict=True))
    print(f"loading: {loaded:.2f} GB/s, plain copies {copied:.2f} GB/s, {ratio:.0%} of them")
    for isa in supported_isas(open_library()):
        found = [quantise_gbps(bits, isa, arguments.runs) for bits in (8, 4)]
        print(f"quantising, {isa}: int8 {found[0]:.2f}, int4 {found[1]:.2f} GB/s of bf16 a core")


if __name__ == "__main__":
    main()
