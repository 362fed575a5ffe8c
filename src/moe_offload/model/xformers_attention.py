"""xformers' memory-efficient attention behind transformers' attention interface."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from moe_offload.errors import UserError

NAME = "xformers"
_MASK_ALIGNMENT = 8  # xformers wants the key dimension of a bias padded to a multiple of this


def register(device: torch.device) -> None:
    """Make `attn_implementation="xformers"` known; UserError without a GPU or xformers."""
    if device.type != "cuda":
        raise UserError("--attention xformers needs an NVIDIA GPU: use --attention sdpa here")
    if importlib.util.find_spec("xformers") is None:
        raise UserError(
            "--attention xformers needs the xformers package: pip install -r requirements-gpu.txt"
        )
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **extras: Any,
) -> tuple[Tensor, None]:
    """Attention of `query` [B, heads, S, D] over `key`, `value` [B, kv_heads, S', D].

    Returns [B, S, heads, D] and no weights, as transformers expects. `attention_mask` is boolean
    [B, 1, S, S'] or None for plain causal attention.
    """
    for name in ("s_aux", "softcap"):
        if extras.get(name) is not None:
            raise UserError(
                f"this model's attention needs '{name}', which xformers does not compute: "
                "use --attention sdpa"
            )
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
    bias: Any = None
    if attention_mask is not None:
        bias = _bias(attention_mask, query)
    elif query.shape[2] > 1:
        bias = LowerTriangularMask()
    out = memory_efficient_attention(
        query.transpose(1, 2).contiguous(),
        key.transpose(1, 2).contiguous(),
        value.transpose(1, 2).contiguous(),
        attn_bias=bias,
        p=dropout,
        scale=scaling,
    )
    return out, None


def _bias(mask: Tensor, query: Tensor) -> Tensor:
    batch, heads, n_queries, _ = query.shape
    n_keys = mask.shape[-1]
    padded = -(-n_keys // _MASK_ALIGNMENT) * _MASK_ALIGNMENT
    bias = query.new_full((batch, heads, n_queries, padded), float("-inf"))
    bias[..., :n_keys].masked_fill_(mask.expand(batch, heads, n_queries, n_keys), 0.0)
    return bias[..., :n_keys]
