"""Filling host memory with experts from files, and pinning as much of it as a real model needs."""

from __future__ import annotations

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import psutil
import torch

from moe_offload.checkpoint.block import BlockLayout, block_layout
from moe_offload.checkpoint.prepared import MoeLayer
from moe_offload.checkpoint.safetensors_file import checksum, read_into
from moe_offload.experts.store import READ_THREADS, ExpertStore
from moe_offload.kernels.bindings import load_kernels
from moe_offload.machine.hardware import available_bytes

HOST_MEMORY_SHARE: Final = 0.85
_N_EXPERTS: Final = 8
_PIECE_BYTES: Final = 1 << 26
_CLEAR_PEAK: Final = "5"  # to clear_refs: see proc(5)


def mixtral_layout() -> BlockLayout:
    return block_layout("bf16", 4096, 14336)


def loading_row(layout: BlockLayout, most_bytes: float) -> dict[str, Any]:
    """GB/s into an `ExpertStore` from a file that the page cache holds, and of a plain read of it.

    Both read with as many threads, into memory that has been touched: that of the first round.
    """
    layer_bytes = _N_EXPERTS * layout.block_bytes
    n_layers = max(1, int(most_bytes / layer_bytes))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "experts"
        blocks = torch.arange(layer_bytes // 8).view(torch.uint8).view(_N_EXPERTS, -1)
        path.write_bytes(blocks.numpy().data)
        checksums = tuple(checksum(block) for block in blocks)
        layer = MoeLayer("experts", path, layer_bytes, 0, _N_EXPERTS, layout, 0, checksums)
        kernels = load_kernels()
        store = ExpertStore([layout] * n_layers, [_N_EXPERTS] * n_layers, kernels=kernels)
        layers = [replace(layer, module=f"experts {number}") for number in range(n_layers)]
        times_s = [_timed_s(lambda: store.read(layers)) for _ in range(2)]

        def plain() -> None:
            with ThreadPoolExecutor(READ_THREADS) as pool:
                for one in range(n_layers):
                    for start in range(0, layer_bytes, _PIECE_BYTES):
                        piece = store.blocks(one).view(-1)[start : start + _PIECE_BYTES]
                        pool.submit(read_into, path, start, piece)

        plain_s = min(_timed_s(plain) for _ in range(2))
    return {
        "loaded_bytes": store.total_bytes,
        "first_gbps": store.total_bytes / times_s[0] / 1e9,
        "again_gbps": store.total_bytes / times_s[1] / 1e9,
        "plain_gbps": store.total_bytes / plain_s / 1e9,
    }


def pinning_row(layout: BlockLayout, most_bytes: float, device: str) -> dict[str, Any]:
    """Seconds to fill and to pin so many bytes, or what memory holds, and what the process grew by.

    `peak_over_bytes` is the process's largest resident memory beyond what it was before, over the
    experts' bytes: 1 where pinning needs no second copy.
    """
    layer_bytes = _N_EXPERTS * layout.block_bytes
    n_layers = max(1, int(min(most_bytes, HOST_MEMORY_SHARE * available_bytes()) / layer_bytes))
    template = torch.ones(layout.block_bytes, dtype=torch.uint8)
    before_bytes = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text(_CLEAR_PEAK, encoding="ascii")
    store = ExpertStore([layout] * n_layers, [_N_EXPERTS] * n_layers)

    def fill() -> None:
        for layer in range(n_layers):
            for block in store.blocks(layer):
                block.copy_(template)

    fill_s = _timed_s(fill)
    refused: list[str | None] = [None]
    pin_s = 0.0
    if device == "cuda":
        pin_s = _timed_s(lambda: refused.append(store.pin()))
    peak_bytes = _peak_bytes()
    close_s = _timed_s(store.close)
    return {
        "bytes": store.total_bytes,
        "fill_s": fill_s,
        "pin_s": pin_s,
        "unpin_s": close_s,
        "peak_over_bytes": (peak_bytes - before_bytes) / store.total_bytes,
        "refused": refused[-1],
    }


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def _timed_s(work: Any) -> float:
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s
