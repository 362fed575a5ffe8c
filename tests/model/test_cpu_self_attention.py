"""A decode step's self-attention by the kernels against the modules it stands in for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_models import CONFIGS, build_model
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from moe_offload.checkpoint import quantization
from moe_offload.kernels.bindings import load_kernels, supported_isas
from moe_offload.kernels.cpu_linear import CpuLinear
from moe_offload.model.decode_modules import CpuSelfAttention, use_cpu_kernels
from moe_offload.model.generation import cache_argument
from moe_offload.model.kv_cache import make_cache
from moe_offload.model.loader import install_experts

NATIVE = load_kernels("native")
assert NATIVE is not None
ISAS = supported_isas(NATIVE.library)
# Whose attention is projections, norms of heads and rotary halves; OLMoE's clamps here, GPT-OSS has
# sinks, DeepSeek's is latent.
SERVED = frozenset(("mixtral", "phimoe", "qwen2_moe", "qwen3_moe", "granitemoe"))
# Ours rounds wherever the module rounds: most values have the same bits, and one that a norm's sum
# in another order turns to the other side differs by one unit of bf16.
EQUAL_PART, RTOL, ATOL = 0.98, 2**-6, 2**-12


def sdpa_model(name: str, isa: str = "auto", **changes: object) -> PreTrainedModel:
    model = build_model(CONFIGS[name](**changes), dtype=torch.bfloat16).requires_grad_(False)
    if type(model)._supports_sdpa:
        model.set_attn_implementation("sdpa")
    use_cpu_kernels(model, "native", isa)
    return model


def attentions(model: nn.Module) -> list[CpuSelfAttention]:
    forwards = [module.forward for module in model.modules()]
    return [forward for forward in forwards if isinstance(forward, CpuSelfAttention)]


def steps(
    model: PreTrainedModel,
    inputs: list[Tensor],
    make: Callable[[], DynamicCache],
    mask: Tensor | None = None,
) -> tuple[list[Tensor], DynamicCache]:
    """Hidden states of the last layer for each of `inputs` [B, S] in turn, and the cache."""
    cache, out, n_tokens = make(), [], 0
    for ids in inputs:
        n_tokens += ids.shape[1]
        kwargs = {} if mask is None else {"attention_mask": mask[:, :n_tokens]}
        with torch.inference_mode():
            output = model.model(
                input_ids=ids, use_cache=True, **kwargs, **{cache_argument(model): cache}
            )
        out.append(output.last_hidden_state)
    return out, cache


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert torch.allclose(found.float(), expected.float(), rtol=RTOL, atol=ATOL)
    assert (found == expected).float().mean() >= EQUAL_PART


def without(model: PreTrainedModel) -> list[tuple[nn.Module, CpuSelfAttention]]:
    """Gives the modules their own forward back."""
    replaced = []
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, CpuSelfAttention):
            del module.forward
            replaced.append((module, forward))
    return replaced


def call(
    attention: CpuSelfAttention | nn.Module,
    cache: DynamicCache,
    name: str,
    hidden: Tensor,
    rotary: tuple[Tensor, Tensor],
    mask: Tensor | None,
) -> Tensor:
    with torch.inference_mode():
        return attention(
            hidden_states=hidden, position_embeddings=rotary, attention_mask=mask, **{name: cache}
        )[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_served_are_the_modules_that_compute_what_the_kernels_do(name):
    model = sdpa_model(name)
    n_layers = model.config.num_hidden_layers
    assert len(attentions(model)) == (n_layers if name in SERVED else 0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "qwen2_moe"])
@pytest.mark.parametrize("make", [DynamicCache, make_cache])
def test_a_step_gives_what_the_module_gives(name, isa, make):
    """One sequence and several, the third padded; prompts that end inside a room and at its end."""
    model = sdpa_model(name, isa)
    module, ours = without(model)[0]
    size = ours._heads.rotary_size
    for n_batch, n_prompt in ((1, 1), (1, 255), (3, 7), (5, 20)):
        torch.manual_seed(n_prompt)
        caches = [
            DynamicCache(config=model.config) if make is DynamicCache else make(model.config, 300)
            for _ in range(2)
        ]
        for n_tokens in (n_prompt, 1, 1):
            hidden = torch.randn(n_batch, n_tokens, model.config.hidden_size).bfloat16()
            angles = torch.randn(n_batch, n_tokens, size // 2).repeat(1, 1, 2) * 3
            rotary = (angles.cos().bfloat16(), angles.sin().bfloat16())
            mask = None
            if n_batch > 2 and n_tokens == 1:
                mask = torch.ones(n_batch, 1, 1, caches[0].get_seq_length() + 1).bool()
                mask[2, :, :, :3] = False
            expected = call(module, caches[0], ours._cache_name, hidden, rotary, mask)
            assert_same(call(ours, caches[1], ours._cache_name, hidden, rotary, mask), expected)
            theirs, mine = caches[0].layers[0], caches[1].layers[0]
            assert_same(mine.keys, theirs.keys)
            assert torch.equal(mine.values, theirs.values)


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_projections_are_served_the_same(bits):
    model = build_model(CONFIGS["qwen3_moe"](), dtype=torch.bfloat16).requires_grad_(False)
    model.set_attn_implementation("sdpa")
    for path, linear in list(model.named_modules()):
        if type(linear) is nn.Linear:
            packed, scale = quantization.quantize(linear.weight, bits)
            install_experts(model, path, CpuLinear.from_packed(linear, packed, scale, bits))
    use_cpu_kernels(model, "native", "auto")
    assert len(attentions(model)) == model.config.num_hidden_layers
    ids = [torch.tensor([[5, 9, 7, 11]]), torch.tensor([[4]]), torch.tensor([[8]])]
    found, _ = steps(model, ids, lambda: make_cache(model.config, 10))
    without(model)
    expected, _ = steps(model, ids, lambda: DynamicCache(config=model.config))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.float() - theirs.float()).norm() <= 2**-6 * theirs.float().norm()


def test_a_sliding_window_is_kept():
    model = sdpa_model("mixtral", sliding_window=9)
    assert len(attentions(model)) == model.config.num_hidden_layers
    ids = [torch.randint(3, 90, (2, 5)), *(torch.randint(3, 90, (2, 1)) for _ in range(9))]
    found, _ = steps(model, ids, lambda: make_cache(model.config, 20))
    without(model)
    expected, _ = steps(model, ids, lambda: DynamicCache(config=model.config))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.float() - theirs.float()).norm() <= 2**-6 * theirs.float().norm()


def test_what_is_unusual_goes_to_the_modules_own_code(monkeypatch):
    model = sdpa_model("mixtral")
    ours = without(model)[0][1]
    monkeypatch.setattr(ours, "own", lambda *_, **__: ("own", None))
    hidden = torch.randn(1, 1, model.config.hidden_size).bfloat16()
    rotary = (torch.ones(1, 1, ours._heads.rotary_size).bfloat16(),) * 2

    def cache() -> DynamicCache:
        return make_cache(model.config, 10)

    name = ours._cache_name
    assert call(ours, cache(), name, hidden, rotary, None) != "own"
    long = hidden.expand(1, 4, -1).contiguous()
    assert call(ours, cache(), name, long, rotary, None) == "own"
    assert call(ours, cache(), name, hidden.float(), rotary, None) == "own"
    assert call(ours, None, name, hidden, rotary, None) == "own"
    assert call(ours, cache(), name, hidden, (rotary[0][..., :4],) * 2, None) == "own"
    assert call(ours, cache(), name, hidden, rotary, torch.zeros(1, 1, 1, 1)) == "own"
    assert ours(hidden, position_embeddings=rotary, **{name: cache()})[0] == "own"


class Positioned(nn.Module):
    """Mixtral's attention, changed beyond what a probe at low positions can see."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(own.__dict__)

    def forward(
        self, hidden_states, position_embeddings, attention_mask, cache=None, **kwargs
    ):  # pragma: no cover
        if kwargs["position_ids"].max() > 8192:
            hidden_states = 2 * hidden_states
        return hidden_states, None


def test_a_module_that_may_look_at_positions_keeps_its_own_code():
    model = build_model(CONFIGS["mixtral"](), dtype=torch.bfloat16).requires_grad_(False)
    model.set_attn_implementation("sdpa")
    model.model.layers[1].self_attn = Positioned(model.model.layers[1].self_attn)
    use_cpu_kernels(model, "native", "auto")
    assert [one._layer for one in attentions(model)] == [0]
