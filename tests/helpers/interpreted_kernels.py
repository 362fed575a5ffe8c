"""Runs the Triton kernels in Triton's interpreter and prints their errors as JSON.

A program of its own: the interpreter is chosen by TRITON_INTERPRET when Triton is first imported.
"""

from __future__ import annotations

import json

import numpy as np
import torch
import triton.language as tl
from expert_cases import Case, random_blocks
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _convert_float

from moe_offload.config import WEIGHT_FORMATS, Scales
from moe_offload.experts.fetcher import HostFetcher
from moe_offload.experts.slots import GpuExperts
from moe_offload.kernels.oracle import expert_ffn

FORMATS = tuple(WEIGHT_FORMATS)
CASES = [
    *(Case(f, 64, 48) for f in FORMATS),
    *(Case(f, 37, 29, "clamped_swiglu", has_bias=True) for f in FORMATS),
    *(Case(f, 260, 9, "gelu", has_gate=False, has_bias=True, n_tokens=1) for f in FORMATS),
    *(
        Case("int8", 33, 21, kind, has_bias=True, n_tokens=2)
        for kind in ("gelu_tanh", "relu", "relu2", "module")
    ),
    *(
        Case(f, 160, 45, has_bias=True, scales=scales)
        for f, scales in (
            ("int4", Scales("bfloat16", 64, offset="zero")),
            ("int4", Scales("float16", offset="minimum")),
            ("int8", Scales("float32", 0)),
            ("fp8", Scales("uint8")),
            ("fp8", Scales("float32", 0)),
        )
    ),
    Case("int4", 32, 16, n_tokens=1, top_k=1, n_experts=1),
    *(Case(f, 40, 24, n_tokens=12, n_experts=2, has_bias=True) for f in ("bf16", "int4")),
    Case("int4", 40, 70, n_tokens=150, top_k=1, n_experts=2),  # several tiles of tokens and of rows
]


def multiply_bf16_as_numbers() -> None:
    """The interpreter keeps bf16 as uint16, and its dot multiplies those."""
    create_dot = InterpreterBuilder.create_dot

    def widened(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        data = _convert_float(handle.data, tl.bfloat16, tl.float32, None)
        return TensorHandle(data.view(np.float32), tl.float32)

    InterpreterBuilder.create_dot = lambda self, a, b, *more: create_dot(
        self, widened(a), widened(b), *more
    )


def run(case: Case) -> dict[str, object]:
    """The largest error of a layer through GpuExperts, and of one expert for many tokens."""
    blocks = random_blocks(case.layout(), case.n_experts)
    gpu = GpuExperts(
        case.layout(),
        case.activation(),
        case.n_experts,
        "cpu",
        case.act_module(),
    )
    gpu._use_triton()
    gpu._use_tiles()
    gpu.slots.copy_(blocks)
    fetcher = HostFetcher(gpu.slots)
    hidden, slots, weights = case.routing()
    pairs = slots.flatten().tolist()
    out = gpu.launch(hidden, pairs, weights, fetcher).result()
    by_memory = gpu._kernels.grouped_by(hidden, slots.flatten().int(), weights)
    assert torch.equal(by_memory, gpu._kernels.grouped(hidden, pairs, weights)), case.name
    bf16 = gpu.launch(hidden.bfloat16(), pairs, weights.bfloat16(), fetcher).result()
    expected = case.oracle(blocks, hidden, slots, weights)
    rounded = hidden.bfloat16().float(), slots, weights.bfloat16().float()
    expert = gpu._kernels.expert(0, hidden)
    one = expert_ffn(case.layout(), blocks[0], hidden, case.activation(), case.act_module())
    poisoned = hidden[:1].clone()
    poisoned[0, -1] = float("nan")
    nan = gpu.launch(poisoned, slots[0].tolist(), weights[:1], fetcher).result().isnan().any(1)
    tile_error = 0.0
    offset = "" if case.scales is None else case.scales.offset
    if case.hidden_size == 64 or case.kind == "module" or offset or case.n_tokens > 64:  # slow ones
        by_slot = torch.argsort(slots.flatten())
        counts = torch.bincount(slots.flatten() + 1, minlength=case.n_experts + 1).tolist()
        groups = [(slot, sum(counts[: slot + 1]), counts[slot + 1]) for slot in range(len(blocks))]
        groups = [group for group in groups if group[2]]
        total = torch.zeros(hidden.shape)
        for chosen in filter(
            None, (groups[:1], groups[1:])
        ):  # one expert alone is launched in another way
            gpu._tiles.add(hidden, chosen, by_slot, weights, total)
        tile_error = float((total - expected).abs().max())
    gpu.close()
    fetcher.close()
    return {
        "tile_error": tile_error,
        "case": case.name,
        "error": float((out - expected).abs().max()),
        "bf16_error": float((bf16 - case.oracle(blocks, *rounded)).abs().max()),
        "expert_error": float((expert - one).abs().max()),
        "nan_tokens": nan.nonzero()[:, 0].tolist(),
        "hit_tokens": (slots >= 0).any(1).nonzero()[:, 0].tolist(),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    multiply_bf16_as_numbers()
    print(json.dumps([run(case) for case in CASES]))
