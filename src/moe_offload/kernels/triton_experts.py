"""The expert FFN from slot memory by Triton kernels, for all hits of a layer together.

In decode the pairs' slots travel as arguments of the launch, or, in a recorded graph, are read once
from memory of the host, in a launch of their own: a step's layer sends nothing.

Import this only where Triton is installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
import triton
from torch import Tensor

from moe_offload.checkpoint.block import Activation, BlockLayout, MatrixName
from moe_offload.config import WEIGHT_FORMATS, Scales
from moe_offload.kernels.oracle import ActivationModule, apply_activation
from moe_offload.kernels.triton_kernels import (
    first_kernel,
    second_kernel,
    take_slots_kernel,
    unpack_fp8_kernel,
    unpack_kernel,
)

ROWS: Final = 16  # of a tile: one row block of the packed layout
DENSE_COLUMNS: Final = 256  # per step: 8 KiB of bf16 in a tile
WORDS: Final = 128  # per step: 8 KiB of packed weights in a tile
SLOT_BITS: Final = 15
SLOTS_PER_WORD: Final = 4
N_SLOT_WORDS: Final = 4
_PAIRS_IN_WORDS: Final = SLOTS_PER_WORD * N_SLOT_WORDS
_SLOTS_AT_ONCE: Final = 128  # of a program that takes them from the host
# Set in every word, so that Triton sees a 64-bit argument whatever the slots are.
_WORD_MARK: Final = 1 << 62


def format_constants(weight_format: str, scales: Scales) -> dict[str, object]:
    """What a format makes constant in `first_kernel` and `second_kernel`."""
    facts = WEIGHT_FORMATS[weight_format]
    step, size = WORDS, 4
    if not facts.group:
        # the largest power of two that divides the scales' columns
        step = min(DENSE_COLUMNS, scales.group & -scales.group or DENSE_COLUMNS)
        step, size = (step if facts.scales else DENSE_COLUMNS), facts.bits // 8
    return {
        "CODES": weight_format if facts.scales else "float",
        "MATRIX_BYTES": size,
        "SCALE_BYTES": getattr(torch, scales.dtype).itemsize,
        "OFFSET_BYTES": getattr(torch, scales.offset_dtype).itemsize,
        "GROUP": scales.group,
        "SCALE_ROWS": scales.rows,
        "OFFSET": scales.offset,
        "STEP": step,
    }


class TritonExperts:
    """The FFN of the experts in `slots`, uint8 [n_slots, block_bytes]."""

    def __init__(
        self,
        layout: BlockLayout,
        activation: Activation,
        slots: Tensor,
        act_module: ActivationModule | None = None,
    ) -> None:
        self.layout = layout
        self.activation = activation
        self.act_module = act_module
        self.slots = slots
        facts = WEIGHT_FORMATS[layout.weight_format]
        self._is_tiled = facts.group > 0
        element = {"float8_e4m3fn": "uint8"}.get(facts.dtype, facts.dtype)
        self._matrix = slots.view(torch.int32 if self._is_tiled else getattr(torch, element))
        scales = layout.matrix("down").scales or Scales("float16")
        self._scales = slots.view(getattr(torch, scales.dtype))
        self._offsets_of = slots.view(getattr(torch, scales.offset_dtype))
        self._biases = slots.view(torch.float32)
        self.constants = format_constants(layout.weight_format, scales)
        # Stands where the kernels expect slots in memory and these are in words.
        self._no_slots = torch.zeros(_PAIRS_IN_WORDS, dtype=torch.int32, device=slots.device)

    def warm_up(self, dtype: torch.dtype) -> None:
        """Compile every kernel that hidden states of `dtype` will need, by running it once."""
        layout, device = self.layout, self.slots.device
        hidden = torch.zeros(2, layout.hidden_size, dtype=dtype, device=device)
        for n_pairs in (1, _PAIRS_IN_WORDS + 1):  # slots in words, slots in memory
            none, weights = [-1] * n_pairs, torch.zeros(1, n_pairs, device=device)
            self.grouped(hidden[:1], none, weights)
        self.grouped_by(hidden[:1], torch.tensor(none, dtype=torch.int32, device=device), weights)
        if len(self.slots):
            self.expert(0, hidden)

    def grouped(self, hidden: Tensor, slot_of_pair: Sequence[int], weights: Tensor) -> Tensor:
        """fp32 [T, H] for `hidden` [T, H] and `weights` [T, K] on the slots' device.

        `slot_of_pair` has T * K entries, -1 for a pair that is left out.
        """
        return self._grouped(hidden, *self._slot_arguments(slot_of_pair), weights)

    def grouped_by(self, hidden: Tensor, slot_of_pair: Tensor, weights: Tensor) -> Tensor:
        """The same by slots int32 [T * K] that the GPU reads: its own memory, or pinned."""
        taken = torch.empty(slot_of_pair.shape, dtype=torch.int32, device=hidden.device)
        n = len(taken)
        take_slots_kernel[(triton.cdiv(n, _SLOTS_AT_ONCE),)](
            slot_of_pair, taken, n, BLOCK=_SLOTS_AT_ONCE
        )
        return self._grouped(hidden, False, (taken, *[_WORD_MARK] * N_SLOT_WORDS), weights)

    def _grouped(
        self, hidden: Tensor, in_words: bool, slots: tuple[Tensor | int, ...], weights: Tensor
    ) -> Tensor:
        layout, activation = self.layout, self.activation
        n_tokens, top_k = weights.shape
        n_pairs, width = n_tokens * top_k, layout.intermediate_size
        raw = activation.kind == "module"
        middle = torch.empty(n_pairs, layout.first_rows if raw else width, device=hidden.device)
        first_kernel[(n_pairs, triton.cdiv(width, ROWS))](
            hidden.contiguous(),
            *self.memory(),
            *slots,
            middle,
            layout.hidden_size,
            width,
            top_k,
            *self.offsets("gate_up"),
            activation.alpha,
            activation.limit,
            **self.constants,
            HAS_GATE=layout.has_gate,
            HAS_BIAS=layout.has_bias,
            KIND=activation.kind,
            IN_WORDS=in_words,
            ROWS=ROWS,
            enable_fp_fusion=True,
        )
        if raw:
            first = middle.to(hidden.dtype)
            middle = apply_activation(first, activation, layout.has_gate, self.act_module)
            middle = middle.float().contiguous()
        out = torch.empty(n_tokens, top_k, layout.hidden_size, device=hidden.device)
        second_kernel[(n_pairs, triton.cdiv(layout.hidden_size, ROWS))](
            middle,
            *self.memory(),
            *slots,
            weights.float().contiguous(),
            out,
            width,
            layout.hidden_size,
            *self.offsets("down"),
            **self.constants,
            HAS_BIAS=layout.has_bias,
            IN_WORDS=in_words,
            ROWS=ROWS,
            enable_fp_fusion=True,
        )
        return out.sum(1) if top_k > 1 else out[:, 0]

    def expert(self, slot: int, x: Tensor) -> Tensor:
        """One expert for many tokens: x [n, H] -> [n, H] in x's dtype, through torch's GEMM."""
        layout = self.layout
        first = self._linear(slot, "gate_up", x, layout.first_rows)
        middle = apply_activation(first, self.activation, layout.has_gate, self.act_module)
        return self._linear(slot, "down", middle.to(x.dtype), layout.hidden_size)

    def _linear(self, slot: int, name: MatrixName, x: Tensor, n_rows: int) -> Tensor:
        block = self.slots[slot]
        stored = self.layout.field(name).view(block)
        bias = None
        if self.layout.has_bias:
            bias = self.layout.field(f"{name}_bias").view(block).to(x.dtype)
        matrix = self.layout.matrix(name)
        if matrix.scales is None:
            return torch.nn.functional.linear(x, stored.to(x.dtype), bias)
        n_columns = x.shape[1]
        weight = torch.empty(n_rows, n_columns, dtype=x.dtype, device=x.device)
        scale = self.layout.field(f"{name}_scale").view(block)
        if not self._is_tiled:
            unpack_fp8_kernel[(triton.cdiv(n_rows, ROWS), triton.cdiv(n_columns, DENSE_COLUMNS))](
                stored.view(torch.uint8),
                scale,
                weight,
                n_rows,
                n_columns,
                GROUP=matrix.scales.group,
                SCALE_ROWS=matrix.scales.rows,
                ROWS=ROWS,
                COLUMNS=DENSE_COLUMNS,
                enable_fp_fusion=True,
            )
            return torch.nn.functional.linear(x, weight, bias)
        offsets = scale
        if matrix.scales.offset:
            offsets = self.layout.field(f"{name}_{matrix.scales.offset}").view(block)
        n_words = stored.numel() // (4 * ROWS * stored.shape[0])
        unpack_kernel[(triton.cdiv(n_rows, ROWS), triton.cdiv(n_words, WORDS))](
            stored.view(torch.int32),
            scale,
            offsets,
            weight,
            n_rows,
            n_columns,
            CODES=self.layout.weight_format,
            GROUP=matrix.scales.group,
            OFFSET=matrix.scales.offset,
            WORDS=WORDS,
            enable_fp_fusion=True,
        )
        return torch.nn.functional.linear(x, weight, bias)

    def _slot_arguments(self, slot_of_pair: Sequence[int]) -> tuple[bool, tuple[Tensor | int, ...]]:
        """Whether the slots are in the words, and the kernels' five arguments that hold them."""
        if len(slot_of_pair) <= _PAIRS_IN_WORDS and len(self.slots) < (1 << SLOT_BITS) - 1:
            words = [_WORD_MARK] * N_SLOT_WORDS
            for pair, slot in enumerate(slot_of_pair):
                word, place = divmod(pair, SLOTS_PER_WORD)
                words[word] |= (slot + 1) << (SLOT_BITS * place)
            return True, (self._no_slots, *words)
        # At most 2 KiB: CUDA takes so little from pageable memory without holding the host up.
        table = torch.tensor(slot_of_pair, dtype=torch.int32)
        table = table.to(self.slots.device, non_blocking=True)
        return False, (table, *[_WORD_MARK] * N_SLOT_WORDS)

    def memory(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The slots as the kernels read them: matrices, scales, offsets and biases."""
        return self._matrix, self._scales, self._offsets_of, self._biases

    def offsets(self, name: MatrixName) -> tuple[int, ...]:
        """Words of a block, and where a matrix's arrays start, each in its own elements."""
        places = {field.name: field.offset_bytes for field in self.layout.fields}
        ends = ("", "_scale", f"_{self.constants['OFFSET'] or 'none'}", "_bias")
        return (
            self.layout.block_bytes // 4,
            *(
                places.get(f"{name}{end}", 0) // memory.element_size()
                for end, memory in zip(ends, self.memory(), strict=True)
            ),
        )
