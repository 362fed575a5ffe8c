"""The norm kernel against float64 and against the modules it stands in for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm

from moe_offload.kernels.bindings import DecodeKernels, NormArguments, load_kernels
from moe_offload.model.decode_modules import FORMS, CpuNorm, probe_norm, use_norm_kernels

NATIVE = load_kernels("native")
assert NATIVE is not None
KERNELS = DecodeKernels(NATIVE)
WIDTHS = (1, 7, 16, 33, 100, 300, 2049)
EPSILON = 1e-5


def kernel(x: Tensor, weight: Tensor, form: str) -> Tensor:
    y = torch.full_like(x, float("nan"))
    arguments = NormArguments(
        FORMS[form], weight.dtype == torch.bfloat16, EPSILON, x.shape[-1], weight.data_ptr()
    )
    KERNELS.norm(arguments, x, x.dtype == torch.bfloat16, x.numel() // x.shape[-1], y)
    return y


class Other(nn.Module):
    """What looks like an RMSNorm and computes something else."""

    def __init__(self, width: int, what: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = 1e-6
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        if self.what == "mean":
            y = y - y.mean(-1, keepdim=True)
        power = 1 if self.what == "l1" else 2
        y = y * torch.rsqrt(y.abs().pow(power).mean(-1, keepdim=True) + self.eps)
        if self.what == "clamp":
            y = y.clamp(-1, 1)
        return (self.weight.float() * y).to(x.dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_within_its_roundings_of_float64(form, dtype, weight_dtype):
    """One rounding of the result to bf16 (2^-8 relative at most), before it one more in the form
    that rounds first; sums and products in fp32 stay below 2^-18."""
    for width in WIDTHS:
        torch.manual_seed(width)
        x = (torch.randn(5, width) * torch.tensor([1e-3, 1.0, 30.0, 1e4, 0.0])[:, None]).to(dtype)
        weight = torch.randn(width).to(weight_dtype)
        scale = (x.double().pow(2).mean(-1, keepdim=True) + EPSILON).rsqrt()
        want = x.double() * scale * (weight.double() + (form == "one_plus_weight"))
        n_roundings = 0 if dtype == torch.float32 else 1 + (form == "round_then_weight")
        bound = ((1 + 2**-8) ** n_roundings - 1 + 2**-18) * want.abs() + 1e-30
        assert ((kernel(x, weight, form).double() - want).abs() <= bound).all()


def test_nan_and_infinity_spread_over_their_row_alone():
    x = torch.randn(4, 40).bfloat16()
    x[1, 3], x[2, 39] = float("nan"), float("inf")
    y = kernel(x, torch.ones(40).bfloat16(), "round_then_weight")
    expected = MixtralRMSNorm(40, EPSILON).bfloat16()(x)
    assert torch.equal(y.isnan(), expected.isnan())
    assert y[1].isnan().all() and y[[0, 3]].isfinite().all()


@pytest.mark.parametrize(
    ("module", "form"),
    [
        (MixtralRMSNorm, "round_then_weight"),
        (GptOssRMSNorm, "weight_then_round"),
        (GemmaRMSNorm, "one_plus_weight"),
    ],
)
def test_each_models_form_is_found_and_gives_its_values(module, form):
    for width in (17, 256, 4096):
        norm = module(width, eps=1e-5).bfloat16().requires_grad_(False)
        norm.weight.copy_(torch.randn(width))
        x = 3 * torch.randn(2, 3, width).bfloat16()
        expected = norm(x)
        assert probe_norm(norm, 1e-5, KERNELS) == form
        assert use_norm_kernels(nn.ModuleList([norm]), KERNELS) == 1
        assert isinstance(norm.forward, CpuNorm)
        found = norm(x)
        assert found.dtype == x.dtype and found.shape == x.shape
        assert torch.allclose(found.float(), expected.float(), rtol=2**-7, atol=0)
        assert (found == expected).float().mean() >= 0.99


@pytest.mark.parametrize("what", ["mean", "l1", "clamp"])
def test_what_computes_something_else_keeps_its_own_code(what):
    assert use_norm_kernels(nn.ModuleList([Other(64, what).bfloat16()]), KERNELS) == 0
    assert use_norm_kernels(nn.ModuleList([Other(64, "none").bfloat16()]), KERNELS) == 1
    assert use_norm_kernels(nn.ModuleList([nn.LayerNorm(64).bfloat16()]), KERNELS) == 0


def test_other_calls_go_to_the_modules_own_code():
    norm = MixtralRMSNorm(64, 1e-5).bfloat16().requires_grad_(False)
    plain = MixtralRMSNorm(64, 1e-5).bfloat16().requires_grad_(False)
    assert use_norm_kernels(nn.ModuleList([norm]), KERNELS) == 1
    for x in (
        torch.randn(2000, 64).bfloat16(),  # a prompt
        torch.randn(3, 64),
        torch.randn(64, 3).bfloat16().T,
        torch.randn(3, 64).bfloat16().requires_grad_(),
    ):
        assert torch.equal(norm(x), plain(x))
    assert norm(torch.randn(3, 64).bfloat16().requires_grad_()).requires_grad


def test_weights_that_move_are_followed():
    norm = MixtralRMSNorm(32, 1e-5).bfloat16().requires_grad_(False)
    assert use_norm_kernels(nn.ModuleList([norm]), KERNELS) == 1
    x = torch.randn(1, 32).bfloat16()
    before = norm(x)
    norm.weight = nn.Parameter(torch.full((32,), 2.0).bfloat16(), requires_grad=False)
    assert torch.equal(norm(x), 2 * before)
