"""The expert kernels alone on a card, timed by its own clock: which constants are fastest there.

Decode: the hits of one token's layer, replayed as one graph, over slots that no cache holds. For
prompts: four experts of so many tokens each, in tiles of several sizes and one by one through
cuBLAS, from which number of tokens on is what `slots.py` leaves to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
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
FROM_HOST: Final = "slots from the host"
_ALIGNED: Final = 4  # of such slots: a launch's begin where those of a run do
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
                row: dict[str, Any] = {"shape": shape, "format": weight_format}
                row |= {"hits": n_hits, "way": name}
                n_bytes = n_hits * experts.layout.block_bytes
                with _or_why_not(row):
                    us = _decode_us(experts, n_hits, name == FROM_HOST)
                    row |= {"us": us, "gbps": n_bytes / us / 1e3}
                yield row
    for shape, weight_format in PROMPTED:
        experts = _experts(shape, weight_format, device)
        layout = experts.layout
        for n_tokens in N_TOKENS:
            products = n_tokens * (layout.first_rows + layout.intermediate_size)
            for name, work in _prompt_ways(experts, n_tokens):
                row = {"shape": shape, "format": weight_format, "tokens": n_tokens, "way": name}
                with _or_why_not(row):
                    us = _device_us(work)
                    tflops = 2 * _N_EXPERTS * products * layout.hidden_size / us / 1e6
                    row |= {"us": us, "tflops": tflops}
                yield row


@contextmanager
def _or_why_not(row: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # one way fails, for want of shared memory, say
        row["error"] = repr(error)


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
    yield FROM_HOST, {}
    yield "2 warps", {"num_warps": 2}
    yield "8 warps", {"num_warps": 8}
    if shipped["CODES"] != "fp8":  # whose step is of one scale
        step = shipped["STEP"]
        assert isinstance(step, int)
        yield "steps of half", {"STEP": step // 2}
        yield "steps of twice", {"STEP": 2 * step}


def _decode_us(experts: TritonExperts, n_hits: int, from_host: bool) -> float:
    n_slots, device = len(experts.slots), experts.slots.device
    hidden = torch.zeros(1, experts.layout.hidden_size, dtype=torch.bfloat16, device=device)
    weights = torch.ones(1, n_hits, device=device)
    slots = torch.arange(_REPETITIONS * n_hits, dtype=torch.int32).view(-1, n_hits) % n_slots
    width = -(-n_hits // _ALIGNED) * _ALIGNED
    on_host = torch.zeros(len(slots), width, dtype=torch.int32, pin_memory=device.type == "cuda")
    on_host = on_host[:, :n_hits].copy_(slots)

    def layer(number: int) -> None:
        if from_host:
            experts.grouped_by(hidden, on_host[number], weights)
        else:
            experts.grouped(hidden, slots[number].tolist(), weights)

    def layers() -> None:
        for number in range(_REPETITIONS):
            layer(number)

    layer(0)  # compiles
    return _device_us(_recorded(layers)) / _REPETITIONS


def _prompt_ways(
    experts: TritonExperts, n_tokens: int
) -> Iterator[tuple[str, Callable[[], object]]]:
    n_pairs, device = _N_EXPERTS * n_tokens, experts.slots.device
    hidden = torch.zeros(n_pairs, experts.layout.hidden_size, dtype=torch.bfloat16, device=device)
    pairs = torch.arange(n_pairs, device=device)
    weights = torch.ones(n_pairs, 1, device=device)
    out = torch.zeros(hidden.shape, device=device)
    groups = [(slot, slot * n_tokens, n_tokens) for slot in range(_N_EXPERTS)]
    for tile in TILES:
        tiled = TiledExperts(experts, tile)
        add = partial(tiled.add, hidden, groups, pairs, weights, out)
        yield f"tiles of {tile.tokens} x {tile.rows}", add

    def one_by_one() -> None:
        for slot, first, n in groups:
            token = pairs[first : first + n]
            out.index_add_(0, token, experts.expert(slot, hidden[token]).float())

    yield "cuBLAS", one_by_one


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
