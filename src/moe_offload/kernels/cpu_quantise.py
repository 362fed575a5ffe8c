"""Our own int8 and int4 from a matrix's weights, by the C++ kernels: `quantization.quantize`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_offload.checkpoint import quantization
from moe_offload.kernels.bindings import CpuKernels
from moe_offload.kernels.library import WeightsArguments


def quantiser(kernels: CpuKernels) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    """What gives the same bytes as `quantization.quantize`, and the same errors, of CPU tensors."""

    def quantize(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        rows, columns = weight.shape
        packed_shape, scale_shape = quantization.packed_shapes(rows, columns, bits)
        if weight.dtype != torch.bfloat16:
            weight = weight.float()
        is_bf16 = weight.dtype == torch.bfloat16
        source = WeightsArguments(weight.data_ptr(), is_bf16, rows, columns, *weight.stride())
        packed = torch.empty(packed_shape, dtype=torch.uint8)
        scales = torch.empty(scale_shape, dtype=torch.float16)
        try:
            kernels.call("quantise", source, bits, packed, scales)
        except OverflowError:
            return quantization.quantize(weight, bits)  # its sentence says what was found
        return packed, scales

    return quantize
