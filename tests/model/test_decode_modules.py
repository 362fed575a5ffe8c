"""The norms and routers that kernels stand in for, against the modules and against float64."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch
from tiny_models import CONFIGS, build_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm, apply_rotary_pos_emb

from moe_offload.checkpoint import quantization
from moe_offload.checkpoint.conversion import find_experts
from moe_offload.kernels.bindings import CpuKernels, load_kernels
from moe_offload.kernels.cpu_linear import CpuLinear
from moe_offload.kernels.library import NormArguments, supported_isas
from moe_offload.model.decode_modules import (
    FORMS,
    CpuNorm,
    CpuRotation,
    CpuRouter,
    chosen_experts,
    find_router,
    probe_norm,
    probe_router,
    use_cpu_kernels,
    use_rotation,
)
from moe_offload.model.generation import cache_argument

NATIVE = load_kernels("native")
assert NATIVE is not None
ISAS = supported_isas(NATIVE.library)
WIDTHS = (1, 7, 16, 33, 100, 300, 2049)
EPSILON = 1e-5


def kernel(x: Tensor, weight: Tensor, form: str) -> Tensor:
    y = torch.full_like(x, float("nan"))
    arguments = NormArguments(
        FORMS[form], weight.dtype == torch.bfloat16, EPSILON, x.shape[-1], weight.data_ptr()
    )
    NATIVE.call("rms_norm", arguments, x, x.dtype == torch.bfloat16, x.numel() // x.shape[-1], y)
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


def serve(module: nn.Module) -> bool:
    """Give a norm our forward where one is found."""
    forward = probe_norm(module, NATIVE)
    module.forward = forward or module.forward
    return forward is not None


@pytest.mark.parametrize("module", [MixtralRMSNorm, GptOssRMSNorm, GemmaRMSNorm])
def test_each_models_form_is_found_and_gives_its_values(module):
    for width in (17, 256, 4096):
        norm = module(width, eps=1e-5).bfloat16().requires_grad_(False)
        norm.weight.copy_(torch.randn(width))
        x = 3 * torch.randn(2, 3, width).bfloat16()
        expected = norm(x)
        assert serve(norm)
        found = norm(x)
        assert found.dtype == x.dtype and found.shape == x.shape
        assert torch.allclose(found.float(), expected.float(), rtol=2**-7, atol=0)
        assert (found == expected).float().mean() >= 0.99


@pytest.mark.parametrize("what", ["mean", "l1", "clamp"])
def test_what_computes_something_else_keeps_its_own_code(what):
    assert not serve(Other(64, what).bfloat16())
    assert serve(Other(64, "none").bfloat16())
    assert not serve(nn.LayerNorm(64).bfloat16())


def test_other_calls_go_to_the_modules_own_code():
    norm = MixtralRMSNorm(64, 1e-5).bfloat16().requires_grad_(False)
    plain = MixtralRMSNorm(64, 1e-5).bfloat16().requires_grad_(False)
    assert serve(norm)
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
    assert serve(norm)
    x = torch.randn(1, 32).bfloat16()
    before = norm(x)
    norm.weight = nn.Parameter(torch.full((32,), 2.0).bfloat16(), requires_grad=False)
    assert torch.equal(norm(x), 2 * before)


def test_weights_of_another_dtype_are_read_as_such():
    """fp32 read as bf16 would be other numbers."""
    norm, router = GptOssRMSNorm(32).bfloat16().requires_grad_(False), Router(16, 32, 4, "plain")
    assert serve(norm)
    router.forward = probe_router(router, NATIVE)
    x = torch.randn(2, 32).bfloat16()
    for module in (norm, router):
        weight = torch.randn_like(module.weight, dtype=torch.float32)
        module.weight = nn.Parameter(weight, requires_grad=False)
    plain = GptOssRMSNorm(32)
    plain.weight = norm.weight
    assert torch.equal(norm(x), plain(x))
    with pytest.raises(RuntimeError, match="dtype"):  # as the module's own linear says
        router(x)


def kernels_of(isa: str) -> CpuKernels:
    kernels = load_kernels("native", isa)
    assert kernels is not None
    return kernels


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
    kernels = kernels_of(isa)
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
    assert probe_router(Router(16, 64, 4, rule), kernels_of("auto")) is None


def test_a_correction_or_a_bias_keeps_its_own_code():
    corrected = Router(16, 64, 4, "plain")
    corrected.register_buffer("e_score_correction_bias", torch.zeros(16))
    biased = Router(16, 64, 4, "plain")
    biased.bias = nn.Parameter(torch.zeros(16).bfloat16())
    for module in (corrected, biased, nn.Linear(64, 16).bfloat16(), nn.LayerNorm(64).bfloat16()):
        assert probe_router(module, kernels_of("auto")) is None


def test_nan_is_chosen_first_and_infinity_spreads():
    module = Router(16, 64, 4, "plain")
    router = probe_router(module, kernels_of("auto"))
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
    assert find_router(block, 32) is block.gate
    router = probe_router(block.gate, kernels_of("auto"))
    assert router is not None
    block.gate.forward = router
    for module in (block.gate, plain):
        module.weight = nn.Parameter(-plain.weight.detach().clone(), requires_grad=False)
    plain.weight.copy_(block.gate.weight)
    for x in (torch.randn(3, 32), torch.randn(300, 32)):  # the second is a prompt
        x = x.bfloat16()
        assert torch.equal(block.gate(x)[2], plain(x)[2])
        assert torch.allclose(block.gate(x)[1], plain(x)[1], rtol=2**-7)


@pytest.mark.parametrize("name", ["mixtral", "phimoe", "qwen2_moe", "olmoe", "gpt_oss"])
def test_a_router_is_found_and_asked(name: str) -> None:
    model = build_model(CONFIGS[name]())
    found = find_experts(model)[0]
    block = model.get_submodule(found.name.rpartition(".")[0])
    router = find_router(block, found.hidden_size)
    assert router is not None
    hidden = torch.randn(5, found.hidden_size)
    asked = []
    experts = model.get_submodule(found.name)
    experts.register_forward_pre_hook(lambda _, arguments: asked.append(arguments[1]))
    block(hidden[None])
    assert torch.equal(chosen_experts(router, hidden), asked[0])


class Gated(nn.Module):
    """A norm whose forward needs a gate, as Qwen3-Next's linear attention has one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))
        self.variance_epsilon = 1e-6

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return x * functional.silu(gate)


class Asking(nn.Module):
    """A router that fails in a way of its own without the tokens' ids."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 64).bfloat16())

    def forward(self, x: Tensor, ids: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        return x, ids["of tokens"]


def test_what_raises_when_probed_keeps_its_own_code():
    assert not serve(Gated().bfloat16())
    block = nn.Module()
    block.gate = Asking()
    assert probe_router(block.gate, NATIVE) is None
    assert find_router(block, 64) is None


def test_a_loaded_models_norms_and_routers_are_served_where_they_compute_the_same():
    model = build_model(CONFIGS["qwen3_moe"](), dtype=torch.bfloat16)
    block = model.model.layers[0].mlp
    use_cpu_kernels(model, "native", "auto", [find_router(block, model.config.hidden_size)])
    assert isinstance(block.gate.forward, CpuRouter)
    norms = [m for m in model.modules() if isinstance(m.__dict__.get("forward"), CpuNorm)]
    assert len(norms) == 4 * 2 + 1  # two of each layer, of its queries and of its keys, the last


@pytest.mark.parametrize("width", [2, 6, 64, 130])
def test_queries_are_rotated_bit_for_bit(width: int) -> None:
    torch.manual_seed(width)
    served = []
    rotation = CpuRotation(lambda *parts: served.append(parts), NATIVE)
    q, k = (torch.randn(3, 1, heads, width) * 10.0 ** torch.randn(width) for heads in (8, 2))
    angles = torch.rand(3, 1, width) * 6.3
    q, k, cos, sin = (
        part.bfloat16()
        for part in (q.transpose(1, 2), k.transpose(1, 2), angles.cos(), angles.sin())
    )
    expected = apply_rotary_pos_emb(q, k, cos, sin)
    for mine, theirs in zip(rotation(q, k, cos, sin), expected, strict=True):
        assert mine.shape == theirs.shape and torch.equal(mine, theirs)
    # what it does not know goes to the model's own
    for other in (
        (q.float(), k, cos, sin),
        (q, k, cos[:1], sin[:1]),
        (q, k, cos[..., :1], sin[..., :1]),
        (q.expand(3, 8, 2, width), k.expand(3, 2, 2, width), cos, sin),
        (q, k, cos, sin, 1),
    ):
        rotation(*other)
    assert len(served) == 5


@pytest.mark.parametrize(("name", "is_served"), [("qwen3_moe", True), ("gpt_oss", False)])
def test_a_models_attention_rotates_as_before(name: str, is_served: bool) -> None:
    """And only this model's: the function keeps its meaning for others, and for prompts."""
    plain, changed = (build_model(CONFIGS[name](), dtype=torch.bfloat16) for _ in range(2))
    module = sys.modules[type(plain).__module__]
    own = module.apply_rotary_pos_emb
    for part in changed.modules():
        use_rotation(part, NATIVE)
    attention = changed.model.layers[0].self_attn
    assert ("forward" in attention.__dict__) == is_served
    assert module.apply_rotary_pos_emb is own
    caches = [DynamicCache(config=plain.config) for _ in range(2)]
    for ids in (torch.randint(3, 50, (2, 9)), torch.tensor([[4], [7]]), torch.tensor([[5], [6]])):
        logits = [
            model(input_ids=ids, **{cache_argument(model): cache}).logits
            for model, cache in zip((plain, changed), caches, strict=True)
        ]
        assert torch.equal(*logits)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_attention_keeps_its_decorators(name: str) -> None:
    """By which it takes the cache in an older argument's name as well."""
    model = build_model(CONFIGS[name](), dtype=torch.bfloat16)
    attention = model.model.layers[0].self_attn
    hidden = torch.randn(1, 1, model.config.hidden_size).bfloat16()
    angles = model.model.rotary_emb(hidden, torch.zeros(1, 1, dtype=torch.int64))
    names = list(inspect.signature(attention.forward).parameters)
    for is_served in (False, True):
        if is_served:
            use_rotation(attention, NATIVE)
        assert ("forward" in vars(attention)) == is_served
        assert list(inspect.signature(attention.forward).parameters) == names
        for argument in {cache_argument(model), "past_key_values"}:
            cache = DynamicCache(config=model.config)
            attention(hidden, position_embeddings=angles, attention_mask=None, **{argument: cache})
            assert cache.get_seq_length() == 1, (is_served, argument)


def test_a_forward_that_somebody_replaced_stays() -> None:
    attention = build_model(CONFIGS["mixtral"](), dtype=torch.bfloat16).model.layers[0].self_attn
    attention.forward = replaced = lambda hidden: hidden
    use_rotation(attention, NATIVE)
    assert attention.forward is replaced


@pytest.mark.parametrize(("kernel", "isa"), [("torch", "auto"), ("native", "scalar")])
def test_packed_linears_are_computed_as_asked(kernel: str, isa: str) -> None:
    linear = nn.Linear(64, 32, bias=False).bfloat16().requires_grad_(False)
    model = build_model(CONFIGS["qwen3_moe"](), dtype=torch.bfloat16)
    packed, scale = quantization.quantize(linear.weight, 8)
    model.model.layers[0].packed = CpuLinear.from_packed(linear, packed, scale, 8)
    use_cpu_kernels(model, kernel, isa)
    assert model.model.layers[0].packed.kernels is load_kernels(kernel, isa)
