"""Which of a CPU model's modules our kernels stand in for, each found by what it computes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_offload.kernels.cpu_kernels import KernelChoice, load_kernels
from moe_offload.kernels.cpu_linear import CpuLinear
from moe_offload.kernels.decode_kernels import DecodeKernels
from moe_offload.model import cpu_attention
from moe_offload.model.cpu_norm import use_norm_kernels
from moe_offload.model.cpu_router import use_router_kernel
from moe_offload.model.cpu_self_attention import use_attention_kernels
from moe_offload.model.model_loader import install_experts, tests_attention


def use_cpu_kernels(
    model: PreTrainedModel, kernel: KernelChoice, isa: str, blocks: Iterable[nn.Module] = ()
) -> int:
    """Route plain bf16 linears of a CPU model through the expert kernels; returns how many.

    Subclasses of `nn.Linear` keep the model's own arithmetic. In decode steps attention goes to the
    kernels as well where the model leaves it to torch, and so do the norms, the routers of the MoE
    `blocks` and the self-attentions that are found to compute what the kernels do.
    """
    kernels = load_kernels(kernel, isa)
    implementation = model.config._attn_implementation
    attention = implementation == "sdpa" and not tests_attention(type(model))
    if kernels is not None and attention:
        model.set_attn_implementation(cpu_attention.register(kernels))
    replaced = 0
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and module.weight.dtype == torch.bfloat16:
            linear = CpuLinear.from_linear(module, kernel=kernel, isa=isa)
            install_experts(model, path, linear)
            replaced += 1
    if kernels is not None and model.dtype == torch.bfloat16:
        decode = DecodeKernels(kernels)
        use_norm_kernels(model, decode)
        for block in blocks:
            use_router_kernel(block, decode)
        if attention:
            use_attention_kernels(model, model.config, decode)
    return replaced
