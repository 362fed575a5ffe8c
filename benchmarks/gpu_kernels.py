"""The expert kernels alone on a card, timed by its own clock: which constants are fastest there.

Decode: the hits of one token's layer, replayed as one graph, over slots that no cache holds. For
prompts: four experts of so many tokens each, in tiles of several sizes and one by one through
cuBLAS, from which number of tokens on is what `slots.py` leaves to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import torch

from benchmarks.gpu_check import Format
from moe_offload.checkpoint.block import Activation
from moe_offload.config import ModelOptions
from moe_offload.kernels.triton_experts import TritonExperts
from moe_offload.kernels.triton_tiles import DEFAULT_TILE, Tile, TiledExperts
from moe_offload.model.dummy import DummyModel

DECODED: Final[tuple[tuple[str, Format, tuple[int, ...]], ...]] = (
    ("qwen3-30b-a3b", "int4", (1, 2, 8)),
    ("mixtral-8x7b", "bf16", (1, 2)),
    ("qwen3-30b-a3b", "fp8", (8,)),
    ("gpt-oss-20b", "mxfp4", (4,)),
)
PROMPTED: Final[tuple[tuple[str, Format], ...]] = (
    ("mixtral-8x7b", "bf16"),
    ("qwen3-30b-a3b", "int4"),
)
N_TOKENS: Final = (16, 64, 128, 256, 512, 1024)  # of each expert
TILES: Final = (DEFAULT_TILE, Tile(tokens=128), Tile(tokens=128, rows=128))
_N_EXPERTS: Final = 4  # of a prompt
_SLOTS_BYTES: Final = 400e6  # several times the largest second-level cache
_REPETITIONS: Final = 16


def kernel_rows(device: str = "cuda") -> Iterator[dict[str, Any]]:
    """One row of each shape, number of hits or tokens, and way to compute."""
    for shape, weight_format, hits in DECODED:
        experts = _experts(shape, weight_format, device)
        shipped = dict(experts.constants)
        for name, change in _decode_variants(shipped):
            experts.constants = {**shipped, **change}
            for n_hits in hits:
                us = _decode_us(experts, n_hits)
                n_bytes = n_hits * experts.layout.block_bytes
                row = {"hits": n_hits, "way": name, "us": us, "gbps": n_bytes / us / 1e3}
                yield {"shape": shape, "format": weight_format, **row}
    for shape, weight_format in PROMPTED:
        experts = _experts(shape, weight_format, device)
        for n_tokens in N_TOKENS:
            for name, us in _prompt_us(experts, n_tokens):
                layout = experts.layout
                products = n_tokens * (layout.first_rows + layout.intermediate_size)
                tflops = 2 * _N_EXPERTS * products * layout.hidden_size / us / 1e6
                row = {"tokens": n_tokens, "way": name, "us": us, "tflops": tflops}
                yield {"shape": shape, "format": weight_format, **row}


def _experts(shape: str, weight_format: Format, device: str) -> TritonExperts:
    """Over slots of random bytes."""
    options = ModelOptions(None, dummy_shape=shape, dummy_layers=1, dummy_format=weight_format)
    layout = DummyModel(options).layouts[0]
    n_slots = max(_N_EXPERTS, int(_SLOTS_BYTES / layout.block_bytes))
    size = n_slots, layout.block_bytes
    slots = torch.randint(0, 60, size, dtype=torch.uint8, device=device)
    return TritonExperts(layout, Activation("silu"), slots)


def _decode_variants(shipped: dict[str, object]) -> Iterator[tuple[str, dict[str, object]]]:
    yield "as it is", {}
    yield "2 warps", {"num_warps": 2}
    yield "8 warps", {"num_warps": 8}
    if shipped["CODES"] != "fp8":  # whose step is of one scale
        step = shipped["STEP"]
        assert isinstance(step, int)
        yield "steps of half", {"STEP": step // 2}
        yield "steps of twice", {"STEP": 2 * step}


def _decode_us(experts: TritonExperts, n_hits: int) -> float:
    n_slots, device = len(experts.slots), experts.slots.device
    hidden = torch.zeros(1, experts.layout.hidden_size, dtype=torch.bfloat16, device=device)
    weights = torch.ones(1, n_hits, device=device)

    def layer(number: int) -> None:
        first = number * n_hits
        experts.grouped(hidden, [(first + hit) % n_slots for hit in range(n_hits)], weights)

    def layers() -> None:
        for number in range(_REPETITIONS):
            layer(number)

    layer(0)  # compiles
    return _device_us(_recorded(layers)) / _REPETITIONS


def _prompt_us(experts: TritonExperts, n_tokens: int) -> Iterator[tuple[str, float]]:
    n_pairs, device = _N_EXPERTS * n_tokens, experts.slots.device
    hidden = torch.zeros(n_pairs, experts.layout.hidden_size, dtype=torch.bfloat16, device=device)
    pairs = torch.arange(n_pairs, device=device)
    weights = torch.ones(n_pairs, 1, device=device)
    out = torch.zeros(hidden.shape, device=device)
    groups = [(slot, slot * n_tokens, n_tokens) for slot in range(_N_EXPERTS)]
    for tile in TILES:
        tiled = TiledExperts(experts, tile)
        us = _device_us(lambda tiled=tiled: tiled.add(hidden, groups, pairs, weights, out))
        yield f"tiles of {tile.tokens} x {tile.rows}", us

    def one_by_one() -> None:
        for slot, first, n in groups:
            token = pairs[first : first + n]
            out.index_add_(0, token, experts.expert(slot, hidden[token]).float())

    yield "cuBLAS", _device_us(one_by_one)


def _recorded(work: Callable[[], None]) -> Callable[[], object]:
    """`work` in one launch, so that the host's part is none."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    replay: Callable[[], object] = graph.replay
    return replay


def _device_us(work: Callable[[], object]) -> float:
    """The least of several, between two events."""
    times_us = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times_us.append(1e3 * start.elapsed_time(end))
    return min(times_us)
