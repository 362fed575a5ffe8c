"""The expert FFN from slot memory by the Triton kernels, for all hits of a layer together.

Two launches compute every (token, expert) pair of a layer: rows of `gate_up` with the activation,
then rows of `down` with the routing weight. A third sums each token's pairs. Programs of one row
tile and different pairs run side by side, so tokens that share an expert share its bytes in the L2
cache.

In decode the pairs' slots travel as arguments of the launch, not in memory: a step's layer then
sends the GPU nothing but the CPU's result.

Import this only where Triton is installed. Without a GPU it runs in Triton's interpreter, which is
how it was tested; its speed on a GPU is not measured yet.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
from torch import Tensor

from moe_offload.checkpoint.expert_format import Activation, BlockLayout
from moe_offload.kernels.torch_experts import ActivationModule, apply_activation
from moe_offload.kernels.triton_kernels import (
    DENSE_COLUMNS,
    N_SLOT_WORDS,
    ROWS,
    SLOT_BITS,
    SLOTS_PER_WORD,
    WORDS,
    first_kernel,
    second_kernel,
    unpack_kernel,
)

_PAIRS_IN_WORDS: Final = SLOTS_PER_WORD * N_SLOT_WORDS
# Set in every word, so that Triton sees a 64-bit argument whatever the slots are.
_WORD_MARK: Final = 1 << 62


class TritonExperts:
    """The FFN of the experts in `slots`, uint8 [n_slots, block_bytes]."""

    def __init__(
        self,
        layout: BlockLayout,
        activation: Activation,
        slots: Tensor,
        act_module: ActivationModule | None = None,
    ) -> None:
        self._layout = layout
        self._activation = activation
        self._act_module = act_module
        self._bits = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}[layout.weight_format]
        self._slots = slots
        element = torch.bfloat16 if self._bits == 16 else torch.float32
        self._matrix = slots.view(torch.int32 if self._bits < 16 else element)
        self._scales = slots.view(torch.float16)
        self._biases = slots.view(torch.float32)
        self._step = WORDS if self._bits < 16 else DENSE_COLUMNS
        # Stands where the kernels expect slots in memory and these are in words.
        self._no_slots = torch.zeros(_PAIRS_IN_WORDS, dtype=torch.int32, device=slots.device)

    def warm_up(self, dtype: torch.dtype) -> None:
        """Compile every kernel that hidden states of `dtype` will need, by running it once."""
        layout, device = self._layout, self._slots.device
        hidden = torch.zeros(2, layout.hidden_size, dtype=dtype, device=device)
        for n_pairs in (1, _PAIRS_IN_WORDS + 1):  # slots in words, slots in memory
            self.grouped(
                hidden[:1],
                torch.full((1, n_pairs), -1),
                torch.zeros(1, n_pairs, device=device),
            )
        if len(self._slots):
            self.expert(0, hidden)

    def grouped(self, hidden: Tensor, slot_of_pair: Tensor, weights: Tensor) -> Tensor:
        """fp32 [T, H] for `hidden` [T, H] and `weights` [T, K] on the slots' device.

        `slot_of_pair` int64 [T, K] is on the CPU, -1 for a pair that is left out.
        """
        layout, activation = self._layout, self._activation
        n_tokens, top_k = slot_of_pair.shape
        n_pairs, width = n_tokens * top_k, layout.intermediate_size
        raw = activation.kind == "module"
        middle = torch.empty(n_pairs, layout.first_rows if raw else width, device=hidden.device)
        in_words, slots = self._slot_arguments(slot_of_pair)
        first_kernel[(n_pairs, triton.cdiv(width, ROWS))](
            hidden.contiguous(),
            *self._memory(),
            *slots,
            middle,
            layout.hidden_size,
            width,
            top_k,
            *self._offsets("gate_up"),
            activation.alpha,
            activation.limit,
            BITS=self._bits,
            HAS_GATE=layout.has_gate,
            HAS_BIAS=layout.has_bias,
            KIND=activation.kind,
            IN_WORDS=in_words,
            ROWS=ROWS,
            STEP=self._step,
            enable_fp_fusion=True,
        )
        if raw:
            first = middle.to(hidden.dtype)
            middle = apply_activation(first, activation, layout.has_gate, self._act_module)
            middle = middle.float().contiguous()
        out = torch.empty(n_tokens, top_k, layout.hidden_size, device=hidden.device)
        second_kernel[(n_pairs, triton.cdiv(layout.hidden_size, ROWS))](
            middle,
            *self._memory(),
            *slots,
            weights.float().contiguous(),
            out,
            width,
            layout.hidden_size,
            *self._offsets("down"),
            BITS=self._bits,
            HAS_BIAS=layout.has_bias,
            IN_WORDS=in_words,
            ROWS=ROWS,
            STEP=self._step,
            enable_fp_fusion=True,
        )
        return out.sum(1) if top_k > 1 else out[:, 0]

    def expert(self, slot: int, x: Tensor) -> Tensor:
        """One expert for many tokens: x [n, H] -> [n, H] in x's dtype, through torch's GEMM."""
        layout = self._layout
        first = self._linear(slot, "gate_up", x, layout.first_rows)
        middle = apply_activation(first, self._activation, layout.has_gate, self._act_module)
        return self._linear(slot, "down", middle.to(x.dtype), layout.hidden_size)

    def _linear(self, slot: int, name: str, x: Tensor, n_rows: int) -> Tensor:
        block = self._slots[slot]
        stored = self._layout.field(name).view(block)
        bias = None
        if self._layout.has_bias:
            bias = self._layout.field(f"{name}_bias").view(block).to(x.dtype)
        if self._bits >= 16:
            return torch.nn.functional.linear(x, stored.to(x.dtype), bias)
        n_columns = x.shape[1]
        weight = torch.empty(n_rows, n_columns, dtype=x.dtype, device=x.device)
        scale = self._layout.field(f"{name}_scale").view(block)
        n_words = triton.cdiv(n_columns, 32) * self._bits
        unpack_kernel[(triton.cdiv(n_rows, ROWS), triton.cdiv(n_words, WORDS))](
            stored.view(torch.int32),
            scale,
            weight,
            n_rows,
            n_columns,
            BITS=self._bits,
            WORDS=WORDS,
            enable_fp_fusion=True,
        )
        return torch.nn.functional.linear(x, weight, bias)

    def _slot_arguments(self, slot_of_pair: Tensor) -> tuple[bool, tuple[Tensor | int, ...]]:
        """Whether the slots are in the words, and the kernels' five arguments that hold them."""
        n_pairs = slot_of_pair.numel()
        if n_pairs <= _PAIRS_IN_WORDS and len(self._slots) < (1 << SLOT_BITS) - 1:
            words = [_WORD_MARK] * N_SLOT_WORDS
            for pair, slot in enumerate(slot_of_pair.flatten().tolist()):
                word, place = divmod(pair, SLOTS_PER_WORD)
                words[word] |= (slot + 1) << (SLOT_BITS * place)
            return True, (self._no_slots, *words)
        # At most 2 KiB: CUDA takes so little from pageable memory without holding the host up.
        table = slot_of_pair.to(torch.int32).to(self._slots.device, non_blocking=True)
        return False, (table.contiguous(), *[_WORD_MARK] * N_SLOT_WORDS)

    def _memory(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._matrix, self._scales, self._biases

    def _offsets(self, name: str) -> tuple[int, ...]:
        """Words of a block, and where a matrix, its scales and its bias start in elements."""
        offsets = {field.name: field.offset_bytes for field in self._layout.fields}
        return (
            self._layout.block_bytes // 4,
            offsets[name] // self._matrix.element_size(),
            offsets.get(f"{name}_scale", 0) // 2,
            offsets.get(f"{name}_bias", 0) // 4,
        )
