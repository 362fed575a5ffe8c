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
        in_features: int,
        out_features: int,
        *,
        weight: nn.Parameter | None,
        packed: Tensor | None,
        scale: Tensor | None,
        bits: int | None,
        bias: nn.Parameter | None,
        kernels: CpuKernels | None,
        suits_onednn: bool = False,
    ) -> None:
        super().__init__()
        self.suits_onednn = suits_onednn
        self.onednn_tokens: int | None = None
        self.in_features = in_features
        self.out_features = out_features
        self.bits = bits
        self.kernels = kernels
        self._arguments: MatrixArguments | None = None
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)
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
        return CpuLinear(
            linear.in_features,
            linear.out_features,
            weight=_parameter(linear.weight),
            packed=None,
            scale=None,
            bits=None,
            bias=None if linear.bias is None else _parameter(linear.bias),
            kernels=kernels,
            suits_onednn=(
                (kernel, isa) == ("auto", "auto")
                and kernels is not None
                and linear.weight.dtype == torch.bfloat16
                and torch.get_num_threads() == kernels.threads
            ),
        )

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
            linear.in_features,
            linear.out_features,
            weight=None,
            packed=packed.contiguous(),
            scale=scale.contiguous(),
            bits=bits,
            bias=None if linear.bias is None else _parameter(linear.bias),
            kernels=load_kernels(kernel, isa),
        )

    def forward(self, x: Tensor) -> Tensor:
        if (
            self.kernels is None
            or x.dtype not in _FORMAT_OF_DTYPE
            or x.device.type != "cpu"
            or self._is_for_onednn(x)
        ):
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return functional.linear(x, self._dense_weight(x.dtype), bias)
        x = x.contiguous()
        y = torch.empty(*x.shape[:-1], self.out_features, dtype=x.dtype)
        self.kernels.linear(self.arguments(), x, x.numel() // self.in_features, y)
        return y

    def arguments(self) -> MatrixArguments:
        """What the kernels need, with the addresses of now: moving the layer may change them."""
        weight = self._parameters["weight"] if self.bits is None else self._buffers["packed"]
        assert weight is not None
        arguments = self._arguments
        if arguments is None or arguments.weight != weight.data_ptr():
            arguments = self._arguments = self._matrix(None)
        bias = self._parameters["bias"]
        if bias is None:
            return arguments
        # The kernels take an fp32 bias; the parameter keeps the model's own dtype.
        return self._matrix(bias.detach().float().contiguous())

    def _is_for_onednn(self, x: Tensor) -> bool:
        if self.onednn_tokens is None or x.dtype != torch.bfloat16:
            return False
        return x.numel() >= self.onednn_tokens * self.in_features

    def extra_repr(self) -> str:
        kind = f"int{self.bits}" if self.bits else str(self._plain_weight().dtype)
        return f"in_features={self.in_features}, out_features={self.out_features}, {kind}"

    def _plain_weight(self) -> nn.Parameter:
        assert self.weight is not None
        return self.weight

    def _matrix(self, fp32_bias: Tensor | None) -> MatrixArguments:
        bias = None if fp32_bias is None else fp32_bias.data_ptr()
        if self.packed is None:
            weight = self._plain_weight()
            code = FORMAT_CODES[_FORMAT_OF_DTYPE[weight.dtype]]
            address, scale = weight.data_ptr(), None
        else:
            assert self.scale is not None and self.scale.dtype == torch.float16
            code = FORMAT_CODES[f"int{self.bits}"]
            address, scale = self.packed.data_ptr(), self.scale.data_ptr()
        matrix = MatrixArguments(code, self.out_features, self.in_features, address, scale, bias)
        matrix.fp32_bias = fp32_bias  # kept as long as its address
        return matrix

    def _dense_weight(self, dtype: torch.dtype) -> Tensor:
        if self.packed is None:
            return self._plain_weight().to(dtype)
        assert self.scale is not None and self.bits is not None
        shape = (self.out_features, self.in_features)
        return quantization.dequantize(self.packed, self.scale, *shape, self.bits).to(dtype)


def _parameter(tensor: Tensor) -> nn.Parameter:
    assert isinstance(tensor, nn.Parameter)
    return tensor
