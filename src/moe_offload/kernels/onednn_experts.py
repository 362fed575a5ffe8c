"""Experts with many tokens: bf16 products by torch's oneDNN, the steps around them by our kernels.

Where a CPU has AMX, or AVX512-BF16, oneDNN may multiply faster than our kernels from some number of
tokens on; how many is measured (`machine_costs.py`). The blocks are read in place.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moe_offload.checkpoint.expert_format import BlockLayout, unpack_matrix
from moe_offload.kernels.cpu_kernels import CpuKernels
from moe_offload.kernels.kernel_library import LayerArguments

# What one expert's products give for so many tokens stays small beside its weights, which are read
# again for the next so many.
_CHUNK_TOKENS = 512


@dataclass(frozen=True)
class Crowd:
    """The experts with many tokens: `pairs` int64 lists the pairs t * K + k by expert, and those
    of expert e are `pairs[first:end]` with `first, end = bounds[e]`."""

    bounds: dict[int, tuple[int, int]]
    pairs: Tensor


def find_crowd(top_k_index: Tensor, on_cpu: Tensor, n_tokens: int) -> Crowd:
    """The experts on the CPU (`on_cpu` uint8 [E]) that `top_k_index` [T, K] gives `n_tokens` or
    more."""
    chosen, pairs = top_k_index.flatten().sort(stable=True)
    cuts = torch.searchsorted(chosen, torch.arange(len(on_cpu) + 1)).tolist()
    bounds = {
        expert: (first, end)
        for expert, (first, end, here) in enumerate(
            zip(cuts[:-1], cuts[1:], on_cpu.tolist(), strict=True)
        )
        if here and end - first >= n_tokens
    }
    return Crowd(bounds, pairs)


class OnednnExperts:
    """One layer's experts in bf16, each for all of its tokens.

    A product's sums are fp32 inside; what it gives is rounded to bf16, so gate and up, the middle
    and the output each err by half a unit of 2^-8, as in the model itself. Bias, activation and the
    weighted sum are fp32. The same bits for the same arguments and number of threads. `act_module`
    is the model's own gate, or None where the kernels compute it.
    """

    def __init__(
        self,
        layout: BlockLayout,
        arguments: LayerArguments,
        act_module: Callable[[Tensor], Tensor] | None,
        kernels: CpuKernels,
    ) -> None:
        self._layout = layout
        self._arguments = arguments
        self._act_module = act_module
        self._kernels = kernels

    def add(
        self,
        crowd: Crowd,
        hidden: Tensor,
        block_pointers: Tensor,
        top_k_weights: Tensor,
        out: Tensor,
    ) -> None:
        """Add the weighted outputs of the crowd's experts, ascending, to `out` fp32 [T, H].

        `hidden` is bf16 [T, H], the others are as in `CpuExperts.run`.
        """
        tokens = crowd.pairs // top_k_weights.shape[1]
        weights = top_k_weights.flatten().index_select(0, crowd.pairs)
        for expert, (first, end) in crowd.bounds.items():
            address = int(block_pointers[expert])
            for start in range(first, end, _CHUNK_TOKENS):
                part = slice(start, min(start + _CHUNK_TOKENS, end))
                y = self._outputs(address, hidden.index_select(0, tokens[part]))
                self._kernels.add(self._arguments, address, y, tokens[part], weights[part], out)

    def _outputs(self, address: int, x: Tensor) -> Tensor:
        """bf16 [n, H], without the last bias, for `x` bf16 [n, H]."""
        block = block_at(address, self._layout.block_bytes)
        first = functional.linear(x, unpack_matrix(self._layout, block, "gate_up"))
        if self._act_module is None:
            middle = x.new_empty(len(x), self._layout.intermediate_size)
            self._kernels.activate(self._arguments, address, first, middle)
        else:
            exact = first.float()
            if self._layout.has_bias:
                exact += self._layout.field("gate_up_bias").view(block)
            middle = self._act_module(exact).to(torch.bfloat16)
        return functional.linear(middle, unpack_matrix(self._layout, block, "down")).contiguous()


def block_at(address: int, block_bytes: int) -> Tensor:
    """A view of the block's memory, which the caller keeps alive."""
    return torch.frombuffer((ctypes.c_uint8 * block_bytes).from_address(address), dtype=torch.uint8)
