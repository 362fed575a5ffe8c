"""Matrices to packed tiles by the C++ kernels: the bytes of `checkpoint/quantization.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_offload.checkpoint import quantization
from moe_offload.kernels.bindings import CpuKernels
from moe_offload.kernels.library import FORMAT_CODES, WeightsArguments


class KernelPacker(quantization.Packer):
    """What gives the same bytes as torch's, and the same errors, of CPU tensors."""

    def __init__(self, kernels: CpuKernels) -> None:
        self._kernels = kernels

    def quantize(self, weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        return self._round(weight, f"int{bits}") or super().quantize(weight, bits)

    def round_to_e2m1(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return self._round(weight, "mxfp4") or super().round_to_e2m1(weight)

    def pack_levels(self, levels: Tensor, bits: int) -> Tensor:
        rows, columns = levels.shape
        shape, _ = quantization.packed_shapes(rows, columns, bits)
        packed = torch.empty(shape, dtype=torch.uint8)
        size = (rows, columns, *levels.stride())
        self._kernels.call("pack", levels.data_ptr(), *size, bits, packed)
        return packed

    def _round(self, weight: Tensor, weight_format: str) -> tuple[Tensor, Tensor] | None:
        """None for weights that torch's search refuses: its sentence says what was found."""
        rows, columns = weight.shape
        bits = 8 if weight_format == "int8" else 4
        packed_shape, scale_shape = quantization.packed_shapes(rows, columns, bits)
        if weight.dtype != torch.bfloat16:
            weight = weight.float()
        is_bf16 = weight.dtype == torch.bfloat16
        source = WeightsArguments(weight.data_ptr(), is_bf16, rows, columns, *weight.stride())
        packed = torch.empty(packed_shape, dtype=torch.uint8)
        dtype = torch.uint8 if weight_format == "mxfp4" else torch.float16
        scales = torch.empty(scale_shape, dtype=dtype)
        try:
            self._kernels.call("quantise", source, FORMAT_CODES[weight_format], packed, scales)
        except OverflowError:
            return None
        return packed, scales
