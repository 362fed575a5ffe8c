"""One layer's experts on the CPU: our kernels over the blocks as they lie in memory, or torch.

The kernels (`cpp/`) read every block once for all tokens of a call: a pass over gate and up rows
with the activation, one barrier, a pass over down rows with the routing weights.

Experts with many tokens may go to torch's oneDNN instead, which multiplies bf16 faster than our
kernels where a CPU has AMX or AVX512-BF16, from some number of tokens on; how many is measured
(`engine/calibration.py`). The blocks are read in place, and the steps around the products are ours.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from moe_offload.checkpoint.block import MATRIX_NAMES, Activation, BlockLayout, unpack_matrix
from moe_offload.kernels.bindings import CpuKernels, KernelChoice, load_kernels
from moe_offload.kernels.library import (
    ACTIVATION_CODES,
    FORMAT_CODES,
    OFFSET_CODES,
    SCALE_CODES,
    LayerArguments,
    TokenArguments,
    describe,
)
from moe_offload.kernels.oracle import experts_forward

# What one expert's products give for so many tokens stays small beside its weights, which are read
# again for the next so many.
_CHUNK_TOKENS: Final = 512


@dataclass(frozen=True)
class Routed:
    """T tokens, what the router chose for them, and where the E experts of the layer are.

    All contiguous, on the CPU.
    """

    hidden: Tensor  # [T, H], fp32 or bf16
    block_pointers: Tensor  # int64 [E], addresses of the experts' blocks
    on_cpu: Tensor  # uint8 [E], 0 leaves an expert out
    top_k_index: Tensor  # int64 [T, K]; what is outside 0..E-1 is left out
    top_k_weights: Tensor  # fp32 [T, K]

    def check(self, layout: BlockLayout, out: Tensor) -> None:
        """ValueError for a shape or dtype that the kernels, which see addresses, would misread."""
        n_tokens, n_experts = len(self.hidden), len(self.block_pointers)
        pairs = (n_tokens, *self.top_k_index.shape[1:2])
        expected = {
            "hidden": ((n_tokens, layout.hidden_size), (torch.bfloat16, torch.float32)),
            "block_pointers": ((n_experts,), (torch.int64,)),
            "on_cpu": ((n_experts,), (torch.uint8,)),
            "top_k_index": (pairs, (torch.int64,)),
            "top_k_weights": (pairs, (torch.float32,)),
            "out": ((n_tokens, layout.hidden_size), (torch.float32,)),
        }
        for name, (shape, dtypes) in expected.items():
            found: Tensor = out if name == "out" else getattr(self, name)
            if (
                found.shape != shape
                or found.dtype not in dtypes
                or not found.is_contiguous()
                or not found.is_cpu
            ):
                raise ValueError(
                    f"expected {name} to be {list(shape)} of {' or '.join(map(str, dtypes))}, "
                    f"contiguous, on the CPU; found {list(found.shape)} of {found.dtype}, "
                    f"strides {found.stride()}, on {found.device}"
                )

    def arguments(self) -> TokenArguments:
        """The same for the kernels: addresses, valid as long as these tensors."""
        return TokenArguments(
            hidden=self.hidden.data_ptr(),
            hidden_is_bf16=self.hidden.dtype == torch.bfloat16,
            n_tokens=self.hidden.shape[0],
            top_k=self.top_k_index.shape[1],
            n_experts=self.block_pointers.shape[0],
            index=self.top_k_index.data_ptr(),
            weight=self.top_k_weights.data_ptr(),
            blocks=self.block_pointers.data_ptr(),
            on_cpu=self.on_cpu.data_ptr(),
        )

    def crowds(self, n_tokens: int) -> dict[int, Tensor]:
        """The experts on the CPU that have `n_tokens` or more -> their pairs t * K + k, int64."""
        chosen, pairs = self.top_k_index.flatten().sort(stable=True)
        cuts = torch.searchsorted(chosen, torch.arange(len(self.on_cpu) + 1)).tolist()
        bounds = zip(pairwise(cuts), self.on_cpu.tolist(), strict=True)
        return {
            expert: pairs[first:end]
            for expert, ((first, end), here) in enumerate(bounds)
            if here and end - first >= n_tokens
        }


class CpuExperts:
    """The CPU's share of one MoE layer.

    `act_module` is the model's own gate, [n, R] -> [n, I], for `Activation("module")`: it is called
    in fp32 between the two passes. `kernel`, `isa` and `affinity` are as in `load_kernels`.
    Accumulates in fp32 and gives the same bits for the same arguments and instruction set. Calls
    are thread-safe and release the GIL while they compute.

    `onednn_tokens`: an expert with so many tokens or more goes through oneDNN; None, as at first,
    for none. Set it only where `suits_onednn`, to what a measurement found. A product's sums are
    fp32 inside; what it gives is rounded to bf16, so gate and up, the middle and the output each
    err by half a unit of 2^-8, as in the model itself. The same bits for the same arguments and
    number of threads.
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
        self.act_module = act_module if activation.kind == "module" else None
        self.kernels = load_kernels(kernel, isa, affinity)
        self.onednn_tokens: int | None = None
        self._layer = _layer_arguments(layout, activation)
        self._is_free = kernel == "auto" and isa == "auto"

    @property
    def description(self) -> str:
        """What computes, for people: "native avx2, 2 threads" or "torch, 2 threads"."""
        kernels = self.kernels
        return kernels.description if kernels else describe("torch", torch.get_num_threads())

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

        The others are as in `Routed`; ValueError where they are not.
        """
        routed = Routed(hidden, block_pointers, on_cpu, top_k_index, top_k_weights)
        routed.check(self.layout, out)
        if self.kernels is None:
            self._run_torch(routed, out)
            return
        limit = self.onednn_tokens
        # fp32 activations keep the kernels' exact product.
        if limit is None or hidden.dtype != torch.bfloat16 or top_k_index.numel() < limit:
            self._run_kernels(self.kernels, routed, out)
            return
        crowds = routed.crowds(limit)
        others = on_cpu.clone()
        others[list(crowds)] = 0
        self._run_kernels(self.kernels, replace(routed, on_cpu=others), out)
        self._add_onednn(self.kernels, crowds, routed, out)

    def _run_kernels(self, kernels: CpuKernels, routed: Routed, out: Tensor) -> None:
        tokens = routed.arguments()
        if self.act_module is None:
            kernels.call("run", self._layer, tokens, out)
            return
        first = torch.empty(kernels.count_pairs(tokens), self.layout.first_rows)
        kernels.call("first", self._layer, tokens, first)
        middle = self._own_middle(first).float()
        kernels.call("second", self._layer, tokens, middle.contiguous(), out)

    def _add_onednn(
        self, kernels: CpuKernels, crowds: dict[int, Tensor], routed: Routed, out: Tensor
    ) -> None:
        """Add the weighted outputs of the experts in `crowds`, ascending, to `out`."""
        top_k = routed.top_k_index.shape[1]
        weights = routed.top_k_weights.flatten()
        for expert, pairs in crowds.items():
            block = int(routed.block_pointers[expert])
            for part in pairs.split(_CHUNK_TOKENS):
                token = part // top_k
                y = self._onednn_outputs(kernels, block, routed.hidden.index_select(0, token))
                weight = weights.index_select(0, part)
                kernels.call("add", self._layer, block, y, token, weight, len(part), out)

    def _onednn_outputs(self, kernels: CpuKernels, address: int, x: Tensor) -> Tensor:
        """bf16 [n, H], without the last bias, of the expert at `address` for `x` bf16 [n, H]."""
        block = block_at(address, self.layout.block_bytes)
        first = functional.linear(x, unpack_matrix(self.layout, block, "gate_up"))
        if self.act_module is None:
            middle = x.new_empty(len(x), self.layout.intermediate_size)
            kernels.call("activate", self._layer, address, first, len(x), middle)
        else:
            exact = first.float()
            if self.layout.has_bias:
                exact += self.layout.field("gate_up_bias").view(block)
            middle = self._own_middle(exact).to(torch.bfloat16)
        return functional.linear(middle, unpack_matrix(self.layout, block, "down")).contiguous()

    def _own_middle(self, first: Tensor) -> Tensor:
        """[n, I] from the model's own gate; ValueError for any other shape."""
        assert self.act_module is not None
        middle = self.act_module(first)
        if middle.shape != (len(first), self.layout.intermediate_size):
            raise ValueError(
                f"expected {[len(first), self.layout.intermediate_size]} from the model's own "
                f"activation, found {list(middle.shape)}"
            )
        return middle

    def _run_torch(self, routed: Routed, out: Tensor) -> None:
        chosen = set(routed.top_k_index.flatten().tolist())
        where = zip(routed.block_pointers.tolist(), routed.on_cpu.tolist(), strict=True)
        blocks = {
            expert: block_at(pointer, self.layout.block_bytes)
            for expert, (pointer, here) in enumerate(where)
            if here and expert in chosen
        }
        out.copy_(
            experts_forward(
                self.layout,
                blocks,
                routed.hidden,
                routed.top_k_index,
                routed.top_k_weights,
                self.activation,
                self.act_module,
            )
        )


def block_at(address: int, block_bytes: int) -> Tensor:
    """A view of the block's memory, which the caller keeps alive."""
    return torch.frombuffer((ctypes.c_uint8 * block_bytes).from_address(address), dtype=torch.uint8)


def _layer_arguments(layout: BlockLayout, activation: Activation) -> LayerArguments:
    scales = layout.matrix("down").scales
    places = {field.name: field.offset_bytes for field in layout.fields}
    offset = scales.offset if scales else ""
    parts = {"": "", "_scale": "_scale", "_offset": f"_{offset}", "_bias": "_bias"}
    arrays = {
        f"{matrix}{part}": places.get(f"{matrix}{suffix}", -1)
        for matrix in MATRIX_NAMES
        for part, suffix in parts.items()
    }
    return LayerArguments(
        weight_format=FORMAT_CODES[layout.weight_format],
        activation=ACTIVATION_CODES[activation.kind],
        has_gate=layout.has_gate,
        alpha=activation.alpha,
        limit=activation.limit,
        hidden_size=layout.hidden_size,
        intermediate_size=layout.intermediate_size,
        **arrays,
        scale_type=SCALE_CODES[scales.dtype] if scales else 0,
        offset_type=OFFSET_CODES[offset],
        scale_group=scales.group if scales else 0,
        scale_rows=scales.rows if scales else 1,
    )
