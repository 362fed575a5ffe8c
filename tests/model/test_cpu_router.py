"""The router kernel against the routers it stands in for, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_offload.kernels.bindings import DecodeKernels, load_kernels, supported_isas
from moe_offload.model.decode_modules import CpuRouter, probe_router, use_router_kernel

NATIVE = load_kernels("native")
assert NATIVE is not None
ISAS = supported_isas(NATIVE.library)


def decode_kernels(isa: str) -> DecodeKernels:
    kernels = load_kernels("native", isa)
    assert kernels is not None
    return DecodeKernels(kernels)


class Router(nn.Module):
    """A router as models write it: `rule` is what it does with the logits."""

    def __init__(
        self, n_experts: int, width: int, top_k: int, rule: str, fp32_scores: bool = True
    ) -> None:
        super().__init__()
        self.top_k, self.rule, self.fp32_scores = top_k, rule, fp32_scores
        generator = torch.Generator().manual_seed(n_experts * width + top_k)
        weight = torch.randn(n_experts, width, generator=generator) / width**0.5
        self.weight = nn.Parameter(2 * weight.bfloat16(), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        logits = functional.linear(x.reshape(-1, x.shape[-1]), self.weight)
        if self.rule == "sigmoid":
            scores = logits.float().sigmoid()
        elif self.rule == "top first":
            chosen, index = logits.topk(self.top_k, dim=-1)
            return logits, chosen.float().softmax(-1) * 0.5, index
        else:
            scores = logits.float().softmax(-1)
        scores, index = scores.topk(self.top_k, dim=-1)
        if self.rule == "normalised":
            scores = scores / scores.sum(-1, keepdim=True)
        scores = scores if self.fp32_scores else scores.to(x.dtype)
        return (scores, index) if self.rule == "no logits" else (logits, scores, index)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rule", ["normalised", "plain", "no logits"])
@pytest.mark.parametrize("fp32_scores", [True, False])
def test_the_same_choice_and_weights_as_the_module(isa, rule, fp32_scores):
    """Exact inputs: small integers over powers of two, so that both sum without rounding."""
    kernels = decode_kernels(isa)
    for n_experts, width, top_k in ((3, 5, 1), (8, 64, 2), (17, 33, 4), (60, 100, 4), (130, 96, 2)):
        module = Router(n_experts, width, top_k, rule, fp32_scores)
        router = probe_router(module, kernels)
        assert router is not None, (n_experts, width, top_k)
        module.weight.copy_(torch.randint(-8, 9, (n_experts, width)) / 64)
        for n_tokens in (1, 2, 5, 16):
            x = (torch.randint(-8, 9, (n_tokens, width)) / 16).bfloat16()
            for found, expected in zip(router(x), module(x), strict=True):
                assert found.dtype == expected.dtype and found.shape == expected.shape
                if found.dtype == torch.int64:  # many logits are equal here
                    assert torch.equal(found, expected)
                else:
                    rtol = 1e-5 if found.dtype == torch.float32 else 2**-7
                    assert torch.allclose(found.float(), expected.float(), rtol=rtol, atol=0)


@pytest.mark.parametrize("rule", ["sigmoid", "top first"])
def test_other_rules_keep_their_own_code(rule):
    assert probe_router(Router(16, 64, 4, rule), decode_kernels("auto")) is None


def test_a_correction_or_a_bias_keeps_its_own_code():
    corrected = Router(16, 64, 4, "plain")
    corrected.register_buffer("e_score_correction_bias", torch.zeros(16))
    biased = Router(16, 64, 4, "plain")
    biased.bias = nn.Parameter(torch.zeros(16).bfloat16())
    for module in (corrected, biased, nn.Linear(64, 16).bfloat16(), nn.LayerNorm(64).bfloat16()):
        assert probe_router(module, decode_kernels("auto")) is None


def test_nan_is_chosen_first_and_infinity_spreads():
    module = Router(16, 64, 4, "plain")
    router = probe_router(module, decode_kernels("auto"))
    assert router is not None
    for value in (float("nan"), float("inf")):
        x = torch.randn(2, 64).bfloat16()
        x[1, 7] = value
        logits, scores, index = router(x)
        assert torch.equal(logits.isnan(), module(x)[0].isnan())
        assert scores[1].isnan().all() and scores[0].isfinite().all()
        assert torch.equal(index, module(x)[2])


def test_installed_in_a_block_and_followed_when_weights_move():
    block = nn.Module()
    block.gate, block.norm = Router(8, 32, 2, "normalised"), nn.LayerNorm(32)
    plain = Router(8, 32, 2, "normalised")
    assert use_router_kernel(block, decode_kernels("auto")) == 1
    assert isinstance(block.gate.forward, CpuRouter)
    for module in (block.gate, plain):
        module.weight = nn.Parameter(-plain.weight.detach().clone(), requires_grad=False)
    plain.weight.copy_(block.gate.weight)
    for x in (torch.randn(3, 32), torch.randn(300, 32)):  # the second is a prompt
        x = x.bfloat16()
        assert torch.equal(block.gate(x)[2], plain(x)[2])
        assert torch.allclose(block.gate(x)[1], plain(x)[1], rtol=2**-7)
