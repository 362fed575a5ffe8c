"""One layer's experts on the CPU: our kernels over the blocks as they lie in memory, or torch.

The kernels (`cpu_experts/`) read every block once for all tokens of a call: a pass over gate and up
rows with the activation, one barrier, a pass over down rows with the routing weights. Experts with
many tokens may go to oneDNN instead (`onednn_experts.py`).

Experts with many tokens: bf16 products by torch's oneDNN, the steps around them by our kernels.

Where a CPU has AMX, or AVX512-BF16, oneDNN may multiply faster than our kernels from some number of
tokens on; how many is measured (`machine_costs.py`). The blocks are read in place.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moe_offload.checkpoint.block import Activation, BlockLayout, unpack_matrix
from moe_offload.kernels.bindings import CpuKernels, KernelChoice, load_kernels
from moe_offload.kernels.library import (
    ACTIVATION_CODES,
    FORMAT_CODES,
    LayerArguments,
    TokenArguments,
)
from moe_offload.kernels.oracle import experts_forward

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


class CpuExperts:
    """The CPU's share of one MoE layer.

    `act_module` is the model's own gate, [n, R] -> [n, I], for `Activation("module")`: it is called
    in fp32 between the two passes. `kernel`, `isa` and `affinity` are as in `load_kernels`.
    Accumulates in fp32 and gives the same bits for the same arguments and instruction set. Calls
    are thread-safe and release the GIL while they compute.

    `onednn_tokens`: an expert with so many tokens or more goes through oneDNN; None, as at first,
    for none. Set it only where `suits_onednn`, to what a measurement found.
    """

    def __init__(
        self,
        layout: BlockLayout,
        activation: Activation,
        *,
        act_module: Callable[[Tensor], Tensor] | None = None,
        kernel: KernelChoice = "auto",
        isa: str = "auto",
        affinity: tuple[int, ...] | None = None,
    ) -> None:
        if activation.kind == "module" and act_module is None:
            raise ValueError("activation 'module' needs the model's own callable")
        self.layout = layout
        self.activation = activation
        self.act_module = act_module
        self.kernels = load_kernels(kernel, isa, affinity)
        self.onednn_tokens: int | None = None
        self._layer = _layer_arguments(layout, activation)
        self._is_free = kernel == "auto" and isa == "auto"

    @property
    def description(self) -> str:
        """What computes, for people: "native avx2, 2 threads" or "torch"."""
        return self.kernels.description if self.kernels else "torch"

    @property
    def suits_onednn(self) -> bool:
        """Whether experts may go through oneDNN: bf16 blocks, no kernel or instruction set forced,
        and as many threads for torch as for the kernels, which share one pool."""
        return (
            self._is_free
            and self.kernels is not None
            and self.layout.weight_format == "bf16"
            and torch.get_num_threads() == self.kernels.threads
        )

    def with_onednn(self, n_tokens: int | None) -> CpuExperts:
        """The same experts with another `onednn_tokens`."""
        other = copy.copy(self)
        other.onednn_tokens = n_tokens
        return other

    def run(
        self,
        hidden: Tensor,
        block_pointers: Tensor,
        on_cpu: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        out: Tensor,
    ) -> None:
        """Overwrite `out` fp32 [T, H] with the weighted sum over the experts on the CPU.

        `hidden` [T, H] fp32 or bf16; `block_pointers` int64 [E], addresses of the experts' blocks;
        `on_cpu` uint8 [E], 0 leaves an expert out; `top_k_index` int64 [T, K], indexes outside
        0..E-1 are left out; `top_k_weights` fp32 [T, K]. All contiguous, on the CPU.
        """
        _check_arguments(
            self.layout, hidden, block_pointers, on_cpu, top_k_index, top_k_weights, out
        )
        if self.kernels is None:
            self._run_torch(hidden, block_pointers, on_cpu, top_k_index, top_k_weights, out)
            return
        # fp32 activations keep the kernels' exact product.
        limit = self.onednn_tokens
        if limit is None or hidden.dtype != torch.bfloat16 or top_k_index.numel() < limit:
            self._run_kernels(hidden, block_pointers, on_cpu, top_k_index, top_k_weights, out)
            return
        crowd = find_crowd(top_k_index, on_cpu, limit)
        if crowd.bounds:
            on_cpu = on_cpu.clone()
            on_cpu[list(crowd.bounds)] = 0
        self._run_kernels(hidden, block_pointers, on_cpu, top_k_index, top_k_weights, out)
        assert self.kernels is not None
        module = self.act_module if self.activation.kind == "module" else None
        OnednnExperts(self.layout, self._layer, module, self.kernels).add(
            crowd, hidden, block_pointers, top_k_weights, out
        )

    def _run_kernels(
        self,
        hidden: Tensor,
        block_pointers: Tensor,
        on_cpu: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        out: Tensor,
    ) -> None:
        assert self.kernels is not None
        tokens = TokenArguments(
            hidden=hidden.data_ptr(),
            hidden_is_bf16=hidden.dtype == torch.bfloat16,
            n_tokens=hidden.shape[0],
            top_k=top_k_index.shape[1],
            n_experts=block_pointers.shape[0],
            index=top_k_index.data_ptr(),
            weight=top_k_weights.data_ptr(),
            blocks=block_pointers.data_ptr(),
            on_cpu=on_cpu.data_ptr(),
        )
        if self.act_module is None or self.activation.kind != "module":
            self.kernels.run(self._layer, tokens, out)
            return
        first = torch.empty(self.kernels.count_pairs(tokens), self.layout.first_rows)
        self.kernels.first(self._layer, tokens, first)
        middle = self.act_module(first).float().contiguous()
        self.kernels.second(self._layer, tokens, middle, out)

    def _run_torch(
        self,
        hidden: Tensor,
        block_pointers: Tensor,
        on_cpu: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        out: Tensor,
    ) -> None:
        chosen = set(top_k_index.flatten().tolist())
        blocks = {
            expert: block_at(pointer, self.layout.block_bytes)
            for expert, (pointer, here) in enumerate(
                zip(block_pointers.tolist(), on_cpu.tolist(), strict=True)
            )
            if here and expert in chosen
        }
        out.copy_(
            experts_forward(
                self.layout,
                blocks,
                hidden,
                top_k_index,
                top_k_weights,
                self.activation,
                self.act_module,
            )
        )


def _layer_arguments(layout: BlockLayout, activation: Activation) -> LayerArguments:
    offsets = {field.name: field.offset_bytes for field in layout.fields}
    arrays = [
        f"{matrix}{part}" for matrix in ("gate_up", "down") for part in ("", "_scale", "_bias")
    ]
    return LayerArguments(
        weight_format=FORMAT_CODES[layout.weight_format],
        activation=ACTIVATION_CODES[activation.kind],
        has_gate=layout.has_gate,
        alpha=activation.alpha,
        limit=activation.limit,
        hidden_size=layout.hidden_size,
        intermediate_size=layout.intermediate_size,
        **{name: offsets.get(name, -1) for name in arrays},
    )


def _check_arguments(
    layout: BlockLayout,
    hidden: Tensor,
    block_pointers: Tensor,
    on_cpu: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    out: Tensor,
) -> None:
    """The kernels see raw addresses: a wrong shape or dtype must stop here."""
    n_tokens, width = hidden.shape
    assert width == layout.hidden_size
    assert hidden.dtype in (torch.float32, torch.bfloat16)
    assert block_pointers.dtype == torch.int64 and on_cpu.dtype == torch.uint8
    assert block_pointers.shape == on_cpu.shape
    assert top_k_index.dtype == torch.int64 and top_k_weights.dtype == torch.float32
    assert top_k_index.shape == top_k_weights.shape and top_k_index.shape[0] == n_tokens
    assert out.dtype == torch.float32 and out.shape == hidden.shape
    for tensor in (hidden, block_pointers, on_cpu, top_k_index, top_k_weights, out):
        assert tensor.is_contiguous() and tensor.device.type == "cpu"
