"""Attention functions of our own behind transformers' attention interface: CPU kernels, xformers.

On the CPU, torch packs all keys for one bf16 query, computes what a mask leaves out, and knows
neither sinks nor capped scores: there our kernels compute attention, and what each takes shows
`benchmarks/bench_cpu_attention.py`. On a GPU, xformers' memory-efficient one may be asked for.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from moe_offload.errors import UserError
from moe_offload.kernels.bindings import CpuKernels
from moe_offload.kernels.library import AttentionArguments

XFORMERS = "xformers"
_MASK_ALIGNMENT = 8  # xformers wants the key dimension of a bias padded to a multiple of this
# Sinks, and tensors that transformers hands to every attention function and that change nothing in
# it. Any other one (a bias, indices of a sparse attention) leaves the call to torch.
_KNOWN_TENSORS = frozenset({"s_aux", "position_ids", "cache_position"})


def takes_other_attention(model_class: type[PreTrainedModel]) -> bool:
    """Whether a model leaves its attention to whatever function is registered for it.

    transformers runs such a model under flash or flex attention as well. One that it runs under
    torch's alone, as DeepSeek-V3.2's sparse attention, masks only under the names that it knows.
    """
    return bool(model_class._supports_flash_attn or model_class._supports_flex_attn)


def register_kernels(kernels: CpuKernels) -> str:
    """Make attention by `kernels` known to transformers; returns its `attn_implementation`."""
    name = f"cpu_{kernels.isa}_{kernels.threads}"
    AttentionInterface.register(name, CpuAttention(kernels))
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


class CpuAttention:
    """transformers' attention function: by the kernels, or as the model would without them."""

    def __init__(self, kernels: CpuKernels) -> None:
        self.kernels = kernels

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **extras: Any,
    ) -> tuple[Tensor, None]:
        """Attention of `query` [B, heads, T, Dk] over `key`, `value` [B, kv_heads, S, Dk or Dv].

        Returns [B, T, heads, Dv] and no weights. `attention_mask` is boolean, or None where each
        query sees all keys up to its own.
        """
        if _served(module, query, key, value, attention_mask, extras):
            out = self.attend(
                query,
                key,
                value,
                attention_mask,
                scaling=extras.get("scaling"),
                softcap=extras.get("softcap"),
                sinks=extras.get("s_aux"),
            )
            return out, None
        if attention_mask is None:
            attention_mask = _causal_at_the_end(query, key)
        own = _eager_function(module, extras)
        if own is not None:
            attention_mask = _additive(attention_mask, query)
            output, _ = own(module, query, key, value, attention_mask, **extras)
        else:
            output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **extras)
        return output, None

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """[B, T, heads, Dv] of the last T of S tokens, `query` [B, heads, T, Dk].

        All bf16 or all fp32, on the CPU; sums in fp32. `mask` is boolean [B or 1, 1, T, S], or None
        where a token sees all keys up to its own; one that sees no key gets zeros. `scaling` is
        Dk ** -0.5 by default, scores become softcap * tanh(score / softcap), and `sinks` [heads]
        are scores of a key without a value.
        """
        n_batch, n_heads, n_queries, key_size = query.shape
        query = query if query.stride(3) == 1 else query.contiguous()
        key, value = _rows(key), _rows(value)
        mask_strides = (0, 0)
        if mask is not None:
            mask = mask if mask.stride(3) == 1 else mask.contiguous()
            mask_strides = (mask.stride(0) if mask.shape[0] > 1 else 0, mask.stride(2))
        sinks = None if sinks is None else sinks.float().contiguous()
        out = query.new_empty(n_batch, n_queries, n_heads, value.shape[3])
        arguments = AttentionArguments(
            is_bf16=query.dtype == torch.bfloat16,
            n_batch=n_batch,
            n_heads=n_heads,
            n_kv_heads=key.shape[1],
            n_queries=n_queries,
            n_keys=key.shape[2],
            key_size=key_size,
            value_size=value.shape[3],
            scale=key_size**-0.5 if scaling is None else scaling,
            softcap=softcap or 0.0,
            sinks=None if sinks is None else sinks.data_ptr(),
            query=query.data_ptr(),
            keys=key.data_ptr(),
            values=value.data_ptr(),
            query_strides=query.stride()[:3],
            key_strides=key.stride()[:2],
            value_strides=value.stride()[:2],
            mask=None if mask is None else mask.data_ptr(),
            mask_strides=mask_strides,
        )
        self.kernels.attend(arguments, out)
        return out


def _causal_at_the_end(query: Tensor, key: Tensor) -> Tensor | None:
    """The mask [S, S'] of the last S of S' tokens; None where the plain causal one says the same.

    torch and xformers align the plain one with the first key. Gemma 4 leaves out all but the last
    queries of a prompt, and spares the mask except under names that it knows.
    """
    n_queries, n_keys = query.shape[2], key.shape[2]
    if n_queries == 1 or n_queries == n_keys:
        return None
    ones = torch.ones(n_queries, n_keys, dtype=torch.bool, device=query.device)
    return ones.tril(n_keys - n_queries)[None, None]


def _eager_function(module: nn.Module, extras: dict[str, Any]) -> Callable[..., Any] | None:
    """The model's own attention, where a call has what torch's would leave out."""
    if extras.get("s_aux") is None and extras.get("softcap") is None:
        return None
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return cast("Callable[..., Any] | None", own)


def _additive(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """A boolean mask as one that eager attention adds to scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.where(mask, 0.0, torch.finfo(query.dtype).min).to(query.dtype)


def _served(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    extras: dict[str, Any],
) -> bool:
    """Whether the kernels compute this call."""
    n_queries, n_keys = query.shape[2], key.shape[2]
    if mask is None:
        is_causal = extras.get("is_causal")
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        known_mask = n_queries == 1 or (is_causal and n_queries <= n_keys)
    else:
        known_mask = mask.dtype == torch.bool and mask.shape[1:] == (1, n_queries, n_keys)
    return (
        known_mask
        and query.shape[1] % key.shape[1] == 0
        and query.device.type == "cpu"
        and query.dtype in (torch.bfloat16, torch.float32)
        and query.dtype == key.dtype == value.dtype
        and not extras.get("dropout")
        and not any(
            isinstance(extra, Tensor) and name not in _KNOWN_TENSORS
            for name, extra in extras.items()
        )
        and not (torch.is_grad_enabled() and query.requires_grad)
    )


def _rows(cache: Tensor) -> Tensor:
    """[B, heads, S, D] with the rows of one head back to back; a view where it is so already."""
    width = cache.shape[3]
    return cache if cache.stride()[2:] == (width, 1) else cache.contiguous()


def register_xformers(device: torch.device) -> None:
    """Make `attn_implementation="xformers"` known; UserError without a GPU or xformers."""
    if device.type != "cuda":
        raise UserError("--attention xformers needs an NVIDIA GPU: use --attention sdpa here")
    if importlib.util.find_spec("xformers") is None:
        raise UserError(
            "--attention xformers needs the xformers package: pip install -r requirements-gpu.txt"
        )
    AttentionInterface.register(XFORMERS, xformers_attention)
    AttentionMaskInterface.register(XFORMERS, sdpa_mask)


def xformers_attention(
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

    if attention_mask is None:
        attention_mask = _causal_at_the_end(query, key)
    bias: Any = None if query.shape[2] == 1 else LowerTriangularMask()
    if attention_mask is not None:
        bias = _bias(attention_mask, query, key.shape[1])
    # [B, S, kv_heads, heads of each, D]: the heads of a group share keys that are read as they lie.
    n_shared = query.shape[1] // key.shape[1]
    out = memory_efficient_attention(
        query.transpose(1, 2).unflatten(2, (key.shape[1], n_shared)),
        _rows(key).transpose(1, 2)[:, :, :, None].expand(-1, -1, -1, n_shared, -1),
        _rows(value).transpose(1, 2)[:, :, :, None].expand(-1, -1, -1, n_shared, -1),
        attn_bias=bias,
        p=dropout,
        scale=scaling,
    )
    return out.flatten(2, 3), None


def _bias(mask: Tensor, query: Tensor, n_kv_heads: int) -> Tensor:
    """[B, kv_heads, heads of each, S, S'], of memory B x S x S': what a mask leaves out is -inf.

    A query that sees no key, which is padding, sees all of them: no sum of nothing makes NaN.
    """
    batch, n_heads, n_queries, _ = query.shape
    n_keys = mask.shape[-1]
    padded = -(-n_keys // _MASK_ALIGNMENT) * _MASK_ALIGNMENT
    seen = (mask | ~mask.any(dim=-1, keepdim=True)).expand(-1, 1, n_queries, n_keys)
    bias = query.new_full((mask.shape[0], 1, n_queries, padded), float("-inf"))
    bias[..., :n_keys].masked_fill_(seen, 0.0)
    shape = (batch, n_kv_heads, n_heads // n_kv_heads, n_queries, padded)
    return bias[:, :, None].expand(shape)[..., :n_keys]
