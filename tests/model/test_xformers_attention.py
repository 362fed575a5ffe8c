"""The xformers bridge against torch's own attention, with xformers' one function stood in for.

xformers itself needs a GPU; what is held here is the bridge: layouts, grouped heads, masks.
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from moe_offload.errors import UserError
from moe_offload.model import attention as attention_module


class LowerTriangularMask:
    """xformers' marker for causal attention."""


def memory_efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: object, p: float, scale: float | None
) -> Tensor:
    """xformers' contract: [B, S, heads, D] in and out, an additive bias or a causal marker."""
    assert p == 0.0
    causal = isinstance(attn_bias, LowerTriangularMask)
    out = scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=attn_bias if isinstance(attn_bias, Tensor) else None,
        is_causal=causal,
        scale=scale,
    )
    return out.transpose(1, 2)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = ModuleType("xformers.ops")
    ops.LowerTriangularMask = LowerTriangularMask  # type: ignore[attr-defined]
    ops.memory_efficient_attention = memory_efficient_attention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("n_queries", "n_keys"), [(5, 5), (1, 9)])
def test_equals_torch(masked: bool, n_queries: int, n_keys: int) -> None:
    query = torch.randn(2, 4, n_queries, 8)
    key, value = torch.randn(2, 2, n_keys, 8), torch.randn(2, 2, n_keys, 8)
    causal = torch.ones(n_queries, n_keys).tril(n_keys - n_queries).bool()
    mask = causal.expand(2, 1, -1, -1).clone()
    if masked:
        mask[0, ..., 0] = False  # a padded key
        mask[0, :, 0, -1] = True  # and no row without any key
    out, weights = attention_module.attention(
        nn.Module(), query, key, value, mask if masked else None, scaling=0.3
    )
    grouped = [tensor.repeat_interleave(2, dim=1) for tensor in (key, value)]
    expected = scaled_dot_product_attention(query, *grouped, attn_mask=mask, scale=0.3)
    assert weights is None
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_registers_only_with_a_gpu() -> None:
    with pytest.raises(UserError, match="needs an NVIDIA GPU"):
        attention_module.register_xformers(torch.device("cpu"))
