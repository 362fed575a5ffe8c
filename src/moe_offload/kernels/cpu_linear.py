"""A dense linear layer on the CPU through the expert kernels, in bf16, fp32, int8 or int4."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_offload.checkpoint import quantization
from moe_offload.kernels.bindings import CpuKernels, KernelChoice, load_kernels
from moe_offload.kernels.library import FORMAT_CODES, MatrixArguments

_FORMAT_OF_DTYPE = {torch.bfloat16: "bf16", torch.float32: "fp32"}


class CpuLinear(nn.Module):
    """Stands in for `nn.Linear` at inference: y = x W^T + b, y in x's dtype, fp32 accumulation.

    `weight` is bf16 or fp32 [out, in], or None when `packed` (uint8) and `scale` (float16) hold
    int8 or int4 tiles (`quantization.py`). x is bf16 or fp32 of any leading dimensions; int8 and
    int4 quantise it to int8 in groups of 32. Where no kernel runs, torch computes the same, and in
    bf16 from `onednn_tokens` rows of x on; None, as at first, for never. Set it only where
    `suits_onednn`, to what a measurement found.
    """

    weight: nn.Parameter | None
    packed: Tensor | None
    scale: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        linear: nn.Linear,
        kernels: CpuKernels | None,
        *,
        packed: Tensor | None = None,
        scale: Tensor | None = None,
        bits: int | None = None,
        suits_onednn: bool = False,
    ) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bits = bits
        self.kernels = kernels
        self.suits_onednn = suits_onednn
        self.onednn_tokens: int | None = None
        self._arguments = MatrixArguments()
        self.register_parameter("weight", _parameter(linear.weight) if bits is None else None)
        self.register_parameter("bias", None if linear.bias is None else _parameter(linear.bias))
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)

    @staticmethod
    def from_linear(
        linear: nn.Linear, *, kernel: KernelChoice = "auto", isa: str = "auto"
    ) -> CpuLinear:
        """The same layer over the same bf16 or fp32 weight memory, which must be contiguous."""
        if linear.weight.dtype not in _FORMAT_OF_DTYPE or not linear.weight.is_contiguous():
            raise ValueError(
                f"expected a contiguous bf16 or fp32 weight, got {linear.weight.dtype}"
            )
        kernels = load_kernels(kernel, isa)
        suits_onednn = (
            (kernel, isa) == ("auto", "auto")
            and kernels is not None
            and linear.weight.dtype == torch.bfloat16
            and torch.get_num_threads() == kernels.threads
        )
        return CpuLinear(linear, kernels, suits_onednn=suits_onednn)

    @staticmethod
    def from_packed(
        linear: nn.Linear,
        packed: Tensor,
        scale: Tensor,
        bits: Literal[4, 8],
        *,
        kernel: KernelChoice = "auto",
        isa: str = "auto",
    ) -> CpuLinear:
        """A layer of `linear`'s shape and bias over weights that `quantization.quantize` packed."""
        expected = quantization.packed_shapes(linear.out_features, linear.in_features, bits)
        if (tuple(packed.shape), tuple(scale.shape)) != expected:
            raise ValueError(
                f"expected packed shapes {expected}, got {packed.shape}, {scale.shape}"
            )
        return CpuLinear(
            linear,
            load_kernels(kernel, isa),
            packed=packed.contiguous(),
            scale=scale.contiguous(),
            bits=bits,
        )

    def forward(self, x: Tensor) -> Tensor:
        if (
            self.kernels is None
            or x.dtype not in _FORMAT_OF_DTYPE
            or not x.is_cpu
            or self.is_for_onednn(x)
        ):
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return functional.linear(x, self._dense_weight(x.dtype), bias)
        if x.shape[-1] != self.in_features:
            raise ValueError(f"expected rows of {self.in_features}, found {list(x.shape)}")
        x = x.contiguous()
        y = torch.empty(*x.shape[:-1], self.out_features, dtype=x.dtype)
        is_bf16, n_rows = x.dtype == torch.bfloat16, x.numel() // self.in_features
        self.kernels.call("linear", self.arguments(), x, is_bf16, n_rows, y)
        return y

    def arguments(self) -> MatrixArguments:
        """What the kernels need, with the addresses of now: moving the layer may change them."""
        matrix, scale = self._matrix(), self._buffers["scale"]
        addresses = (matrix.data_ptr(), None if scale is None else scale.data_ptr())
        if addresses != (self._arguments.w, self._arguments.scale):
            self._arguments = self._checked(matrix, scale)
        bias = self._parameters["bias"]
        if bias is None:
            return self._arguments
        # The kernels take an fp32 bias; the parameter keeps the model's own dtype.
        arguments = MatrixArguments.from_buffer_copy(self._arguments)
        arguments.fp32_bias = bias.detach().float().contiguous()  # kept as long as its address
        arguments.bias = arguments.fp32_bias.data_ptr()
        return arguments

    def _matrix(self) -> Tensor:
        matrix = self._parameters["weight"] if self.bits is None else self._buffers["packed"]
        assert matrix is not None
        return matrix

    def _checked(self, matrix: Tensor, scale: Tensor | None) -> MatrixArguments:
        """ValueError where a conversion of the module left what the kernels cannot read."""
        shapes: list[tuple[int, ...]] = [(self.out_features, self.in_features)]
        if self.bits is None:
            name = _FORMAT_OF_DTYPE.get(matrix.dtype)
        else:
            right = matrix.dtype == torch.uint8 and scale is not None and scale.dtype == torch.half
            name = f"int{self.bits}" if right else None
            shapes = [*quantization.packed_shapes(self.out_features, self.in_features, self.bits)]
        parts = [matrix] if scale is None else [matrix, scale]
        if (
            name is None
            or [tuple(part.shape) for part in parts] != shapes
            or not all(part.is_contiguous() and part.device.type == "cpu" for part in parts)
        ):
            found = [(list(part.shape), part.dtype, part.device) for part in parts]
            raise ValueError(f"expected {self.extra_repr()} as it was made, found {found}")
        address = None if scale is None else scale.data_ptr()
        return MatrixArguments(
            FORMAT_CODES[name], self.out_features, self.in_features, matrix.data_ptr(), address
        )

    def is_for_onednn(self, x: Tensor) -> bool:
        """Whether torch's oneDNN computes the layer for `x`."""
        if self.onednn_tokens is None or x.dtype != torch.bfloat16:
            return False
        return x.numel() >= self.onednn_tokens * self.in_features

    def extra_repr(self) -> str:
        kind = f"int{self.bits}" if self.bits else str(self._matrix().dtype)
        return f"in_features={self.in_features}, out_features={self.out_features}, {kind}"

    def _dense_weight(self, dtype: torch.dtype) -> Tensor:
        matrix = self._matrix()
        if self.bits is None:
            return matrix.to(dtype)
        assert self.scale is not None
        shape = (self.out_features, self.in_features)
        return quantization.dequantize(matrix, self.scale, *shape, self.bits).to(dtype)


def _parameter(tensor: Tensor) -> nn.Parameter:
    assert isinstance(tensor, nn.Parameter)
    return tensor
