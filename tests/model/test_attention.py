"""Attention functions of our own: the CPU kernels against float64, and both as transformers calls
them. xformers needs a GPU; of it the bridge is held here, with its one function stood in for."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from against_transformers import greedy
from cpu_oracle import TINY, U
from tiny_models import build_model, gpt_oss, mixtral
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    CONFIG_MAPPING,
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from moe_offload.errors import UserError
from moe_offload.kernels.bindings import CpuKernels, load_kernels
from moe_offload.kernels.library import supported_isas
from moe_offload.model import attention as attention_module
from moe_offload.model.attention import CpuAttention, register_kernels
from moe_offload.model.decode_modules import use_cpu_kernels
from moe_offload.model.loader import build_skeleton

NATIVE = load_kernels("native")
assert NATIVE is not None
ISAS = supported_isas(NATIVE.library)
# batch, heads, kv_heads, tokens, keys, key size, value size: one key, odd sizes, more than one
# chunk or block of keys, groups of more heads than one product takes, keys wider than values; of
# tokens one, a whole prompt, the end of one, and more than one item's.
SHAPES = (
    (1, 1, 1, 1, 1, 1, 1),
    (2, 4, 2, 1, 9, 8, 8),
    (1, 6, 1, 1, 33, 31, 17),
    (3, 8, 8, 1, 257, 24, 40),
    (1, 10, 2, 1, 700, 128, 128),
    (2, 14, 2, 1, 300, 64, 5),
    (2, 4, 2, 9, 9, 8, 8),
    (1, 6, 1, 2, 33, 31, 17),
    (2, 3, 3, 130, 130, 80, 96),
    (1, 10, 2, 70, 300, 72, 64),
)


def random_call(
    shape: tuple[int, ...], dtype: torch.dtype, masked: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    torch.manual_seed(sum(shape))
    batch, heads, kv_heads, tokens, keys, key_size, value_size = shape
    query = torch.randn(batch, heads, tokens, key_size).to(dtype)
    key = torch.randn(batch, kv_heads, keys, key_size).to(dtype)
    value = torch.randn(batch, kv_heads, keys, value_size).to(dtype)
    mask = None
    if masked:
        mask = torch.rand(batch, 1, tokens, keys) < 0.6
        mask[..., -1] = True
        mask[0, ..., : keys // 2] = False  # whole chunks without a key
        mask[0, ..., -1] = True
    return query, key, value, mask


def exact(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, T, heads, Dv] in float64, the bound of an fp32 computation, and sums of magnitudes.

    A score is off by (Dk + 3) u times the sum of its products' magnitudes, which moves each weight
    by that factor; exponentials add 8 u, sums over S keys (S + 8) u of the magnitudes they add. A
    capped score is off by 8 u of the cap.
    """
    groups = query.shape[1] // key.shape[1]
    n_queries, n_keys = query.shape[2], key.shape[2]
    q = query.double()
    k, v = (tensor.double().repeat_interleave(groups, dim=1) for tensor in (key, value))
    scores = q @ k.transpose(2, 3) * scaling
    magnitude = (q.abs() @ k.abs().transpose(2, 3) * scaling).amax(dim=-1, keepdim=True)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if mask is None:
        mask = torch.ones(n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        column = sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(dim=-1)[..., :n_keys]
    error = 2 * (query.shape[3] + 3) * U * magnitude + (2 * n_keys + 32) * U
    error = error + 16 * U * (softcap or 0.0)
    sums = weights @ v.abs()
    return (
        (weights @ v).transpose(1, 2),
        (error * sums + TINY).transpose(1, 2),
        sums.transpose(1, 2),
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("special", [False, True])
def test_within_the_bound_of_float64(
    isa: str, dtype: torch.dtype, masked: bool, special: bool
) -> None:
    """`special`: with sinks and capped scores."""
    kernels = load_kernels("native", isa)
    assert kernels is not None
    for shape in SHAPES:
        query, key, value, mask = random_call(shape, dtype, masked)
        extras = (2.5, torch.randn(shape[1])) if special else (None, None)
        want, bound, sums = exact(query, key, value, mask, 0.3, *extras)
        if dtype == torch.bfloat16:
            if query.shape[2] > 1:  # terms of a prompt's sums may be rounded
                bound = bound + 2.0**-8 * sums
            bound = bound + 2.0**-8 * (want.abs() + bound)  # of the rounded output
        out = CpuAttention(kernels).attend(query, key, value, mask, 0.3, *extras)
        assert out.dtype == dtype and out.shape == want.shape
        error = (out.double() - want).abs()
        assert (error <= bound).all(), (shape, float((error / bound).max()))


@pytest.mark.parametrize("shape", [SHAPES[4], SHAPES[9]])
@pytest.mark.parametrize("masked", [False, True])
def test_the_same_bits_for_any_number_of_threads(shape: tuple[int, ...], masked: bool) -> None:
    """Of a prompt, more threads get items of fewer tokens."""
    assert NATIVE is not None
    query, key, value, mask = random_call(shape, torch.bfloat16, masked)
    outputs = [
        CpuAttention(type(NATIVE)(NATIVE.library, NATIVE.isa, NATIVE.isa_code, threads)).attend(
            query, key, value, mask
        )
        for threads in (1, 2, 3, 7)
    ]
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n_queries", [1, 2])
def test_extremes(isa: str, n_queries: int) -> None:
    """Scores far apart or huge, keys all left out, and what is not a number."""
    kernels = load_kernels("native", isa)
    assert kernels is not None
    query = torch.ones(1, 1, n_queries, 1)

    def last(mask: Tensor | None = None) -> Tensor:
        return CpuAttention(kernels).attend(query, key, value, mask, 1.0)[:, -1]

    key = torch.tensor([1e30, -1e30, 0.0, 1e30]).view(1, 1, 4, 1)
    value = torch.tensor([2.0, 100.0, 100.0, 4.0]).view(1, 1, 4, 1)
    assert last().item() == 3.0
    nobody = torch.zeros(1, 1, n_queries, 4, dtype=torch.bool)
    assert last(nobody).item() == 0.0
    key[0, 0, 2] = torch.nan
    assert last().isnan().all()
    key[0, 0, 2] = torch.inf
    assert last().isnan().all()
    key[0, 0, 2] = 0.0
    value[0, 0, 0] = torch.inf
    assert last().item() == torch.inf


@pytest.mark.parametrize("n_queries", [1, 20])
def test_strided_tensors_are_read_in_place_or_copied(n_queries: int) -> None:
    assert NATIVE is not None
    attend = CpuAttention(NATIVE).attend
    shape = (2, 4, 2, n_queries, 30, 16, 16)
    query, key, value, mask = random_call(shape, torch.float32, True)
    assert mask is not None
    mask = mask[..., 10:]
    tensors = (query, key[:, :, 10:], value[:, :, 10:])
    want = attend(*(tensor.contiguous() for tensor in tensors), mask.contiguous())
    assert torch.equal(attend(*tensors, mask), want)
    turned = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors)
    assert torch.equal(attend(*turned, mask), want)
    shared = attend(*(tensor[1:] for tensor in tensors), mask[1:])
    assert torch.equal(shared, attend(*tensors, mask[1:])[1:])  # one mask for both sequences


def test_as_transformers_calls_it() -> None:
    assert NATIVE is not None
    function = AttentionInterface()[register_kernels(NATIVE)]
    module = nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    module.is_causal = True  # type: ignore[assignment]
    query, key, value, _ = random_call((1, 4, 2, 1, 6, 16, 16), torch.float32, False)
    out, weights = function(module, query, key, value, None, scaling=0.25)
    want, *_ = exact(query, key, value, None, 0.25)
    assert weights is None
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    many = torch.cat([query, query], dim=2)
    causal = torch.ones(2, 6, dtype=torch.bool).tril(4)[None, None]
    prompt, _ = function(module, many, key, value, causal, scaling=0.25)
    torch.testing.assert_close(prompt[:, 1:], out, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(prompt[:, :1], out, rtol=1e-3)  # it sees one key less
    assert torch.equal(function(module, many, key, value, None, scaling=0.25)[0], prompt)
    additive = torch.zeros(1, 1, 1, 6)
    biased, _ = function(module, query, key, value, additive, scaling=0.25)
    torch.testing.assert_close(biased, out, rtol=1e-5, atol=1e-5)


def logits_of_steps(model: PreTrainedModel) -> Tensor:
    """Logits [steps, B, V] of a left-padded batch of two prompts, prefill first."""
    steps: list[Tensor] = []
    handle = model.register_forward_hook(lambda _, __, out: steps.append(out.logits[:, -1]))
    greedy(model, [[9, 3, 33, 60, 5], [8, 50, 4, 21, 7, 40, 12, 6, 3]], n_tokens=12)
    handle.remove()
    return torch.stack(steps)


@pytest.mark.parametrize(
    "config", [mixtral(), mixtral(sliding_window=6), gpt_oss()], ids=["full", "window", "sinks"]
)
@pytest.mark.parametrize("served", [True, False])
def test_a_loaded_model_uses_it(
    config: PretrainedConfig, served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against transformers' eager attention, with padding; not `served`: by what it leaves."""
    model = build_model(config)
    want = logits_of_steps(model)
    if model._supports_sdpa:
        model.set_attn_implementation("sdpa")
    use_cpu_kernels(model, "native", "auto")
    calls = []
    attend = CpuKernels.attend

    def counted(self: CpuKernels, *arguments: Any) -> None:
        calls.append(arguments)
        attend(self, *arguments)

    monkeypatch.setattr(CpuKernels, "attend", counted)
    if not served:
        monkeypatch.setattr(attention_module, "_served", lambda *_: False)
    torch.testing.assert_close(logits_of_steps(model), want, rtol=1e-4, atol=1e-5)
    assert len(calls) == (config.num_hidden_layers * 12 if served else 0)


def test_a_model_that_asks_for_its_attention_by_name_keeps_torchs() -> None:
    """DeepSeek-V3.2 masks for its sparse attention only under the names it knows."""
    if "deepseek_v32" not in CONFIG_MAPPING:
        pytest.skip("this release of transformers has no such model")
    config = AutoConfig.for_model("deepseek_v32", num_hidden_layers=1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    use_cpu_kernels(model, "native", "auto")
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(UserError, match="use --attention sdpa"):
        build_skeleton(config, torch.float32, "xformers")


@pytest.mark.parametrize("extra", ["indices", "dropout"])
def test_what_it_does_not_compute_is_left_to_torch(
    extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert NATIVE is not None
    seen = []
    monkeypatch.setattr(
        attention_module,
        "sdpa_attention_forward",
        lambda *_, **keywords: (seen.append(keywords), None),
    )
    query, key, value, _ = random_call((1, 4, 2, 1, 6, 16, 16), torch.float32, False)
    term = 0.1 if extra == "dropout" else torch.zeros(1)
    CpuAttention(NATIVE)(nn.Module(), query, key, value, None, **{extra: term})
    assert seen[0][extra] is term


class LowerTriangularMask:
    """xformers' marker for causal attention."""


def memory_efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: object, p: float, scale: float | None
) -> Tensor:
    """xformers' contract: [B, S, groups, heads, D], an additive bias of whole size or a marker.

    Strides but the last are multiples of eight, or 0 where numbers are shared.
    """
    assert p == 0.0 and query.shape[2:4] == key.shape[2:4] == value.shape[2:4]
    assert key.stride(3) == value.stride(3) == 0, "keys were copied for each of their heads"
    mask = None
    if isinstance(attn_bias, Tensor):
        batch, n_queries, n_groups, n_heads, _ = query.shape
        assert attn_bias.shape == (batch, n_groups, n_heads, n_queries, key.shape[1])
        assert all(stride % 8 == 0 for stride in attn_bias.stride()[:-1])
        assert attn_bias.untyped_storage().nbytes() <= batch * n_queries * (key.shape[1] + 7) * 4
        mask = attn_bias.flatten(1, 2)
    out = scaled_dot_product_attention(
        *(tensor.flatten(2, 3).transpose(1, 2) for tensor in (query, key, value)),
        attn_mask=mask,
        is_causal=isinstance(attn_bias, LowerTriangularMask),
        scale=scale,
    )
    return out.transpose(1, 2).unflatten(2, query.shape[2:4])


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = ModuleType("xformers.ops")
    ops.LowerTriangularMask = LowerTriangularMask  # type: ignore[attr-defined]
    ops.memory_efficient_attention = memory_efficient_attention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("n_queries", "n_keys"), [(5, 5), (1, 9), (3, 9)])
def test_xformers_equals_torch(masked: bool, n_queries: int, n_keys: int) -> None:
    query = torch.randn(2, 4, n_queries, 8)
    key, value = torch.randn(2, 2, n_keys, 8), torch.randn(2, 2, n_keys, 8)
    causal = torch.ones(n_queries, n_keys).tril(n_keys - n_queries).bool()
    mask = causal.expand(2, 1, -1, -1).clone()
    if masked:
        mask[0, ..., 0] = False  # a padded key
        mask[0, :, 0, -1] = True  # and no row without any key
    out, weights = attention_module.xformers_attention(
        nn.Module(), query, key, value, mask if masked else None, scaling=0.3
    )
    grouped = [tensor.repeat_interleave(2, dim=1) for tensor in (key, value)]
    expected = scaled_dot_product_attention(query, *grouped, attn_mask=mask, scale=0.3)
    assert weights is None
    torch.testing.assert_close(out, expected.transpose(1, 2))


@pytest.mark.usefixtures("stand_in")
def test_a_padded_query_of_xformers_is_a_number() -> None:
    """Left padding: the first two tokens of the second sequence see nothing."""
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    mask = torch.ones(5, 5).tril().bool().expand(2, 1, 5, 5).clone()
    mask[1, ..., :2] = False
    assert not mask[1, 0, :2].any()
    out, _ = attention_module.xformers_attention(nn.Module(), query, key, value, mask)
    grouped = [tensor.repeat_interleave(2, dim=1) for tensor in (key, value)]
    expected = scaled_dot_product_attention(query, *grouped, attn_mask=mask).transpose(1, 2)
    assert out.isfinite().all()
    torch.testing.assert_close(out[0], expected[0])
    torch.testing.assert_close(out[1, 2:], expected[1, 2:])


def test_xformers_registers_only_with_a_gpu() -> None:
    with pytest.raises(UserError, match="needs an NVIDIA GPU"):
        attention_module.register_xformers(torch.device("cpu"))
