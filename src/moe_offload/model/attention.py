"""Attention functions of our own behind transformers' attention interface: CPU kernels, xformers.

torch's attention for one bf16 query packs all keys for it, which takes ten times as long as reading
them (`benchmarks/bench_cpu_attention.py`): on the CPU, decode steps go to our kernels and prompts
stay with torch. On a GPU, xformers' memory-efficient attention may be asked for.
"""

from __future__ import annotations

import importlib.util
from typing import Any

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
# Tensors that transformers hands to every attention function and that change nothing in it. Any
# other one (sinks, a bias, indices of a sparse attention) leaves the call to torch.
_WITHOUT_EFFECT = frozenset({"position_ids", "cache_position"})


def takes_other_attention(model_class: type[PreTrainedModel]) -> bool:
    """Whether a model leaves its attention to whatever function is registered for it.

    transformers runs such a model under flash or flex attention as well. One that it runs under
    torch's alone, as DeepSeek-V3.2's sparse attention, masks only under the names that it knows.
    """
    flash_or_flex = model_class._supports_flash_attn or model_class._supports_flex_attn
    return bool(model_class._supports_sdpa and flash_or_flex)


def register_kernels(kernels: CpuKernels) -> str:
    """Make attention by `kernels` known to transformers; returns its `attn_implementation`."""
    name = f"cpu_{kernels.isa}_{kernels.threads}"
    AttentionInterface.register(name, CpuAttention(kernels))
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


class CpuAttention:
    """transformers' attention function: one new token by the kernels, everything else by torch."""

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
        """Attention of `query` [B, heads, S, Dk] over `key`, `value` [B, kv_heads, S', Dk or Dv].

        Returns [B, S, heads, Dv] and no weights. `attention_mask` is boolean, or None where each
        query sees all keys up to its own.
        """
        if _served(query, key, value, attention_mask, extras):
            return self.attend(query, key, value, attention_mask, extras.get("scaling")), None
        if attention_mask is None:
            attention_mask = _causal_at_the_end(query, key)
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **extras)
        return output, None

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float | None = None,
    ) -> Tensor:
        """[B, 1, heads, Dv] for one query per sequence, `query` [B, heads, 1, Dk].

        All bf16 or all fp32, on the CPU; sums in fp32. `mask` is boolean [B, 1, 1, S'] or None;
        a sequence that sees no key gets zeros. `scaling` defaults to Dk ** -0.5.
        """
        n_batch, n_heads, _, key_size = query.shape
        query, key, value = query.contiguous(), _rows(key), _rows(value)
        if mask is not None:
            mask = mask.expand(n_batch, 1, 1, key.shape[2]).contiguous()
        out = query.new_empty(n_batch, 1, n_heads, value.shape[3])
        arguments = AttentionArguments(
            is_bf16=query.dtype == torch.bfloat16,
            n_batch=n_batch,
            n_heads=n_heads,
            n_kv_heads=key.shape[1],
            n_keys=key.shape[2],
            key_size=key_size,
            value_size=value.shape[3],
            scale=key_size**-0.5 if scaling is None else scaling,
            query=query.data_ptr(),
            keys=key.data_ptr(),
            values=value.data_ptr(),
            key_strides=key.stride()[:2],
            value_strides=value.stride()[:2],
            mask=None if mask is None else mask.data_ptr(),
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


def _served(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, extras: dict[str, Any]
) -> bool:
    """Whether the kernels compute this call."""
    return (
        query.shape[2] == 1
        and query.shape[1] % key.shape[1] == 0
        and query.device.type == "cpu"
        and query.dtype in (torch.bfloat16, torch.float32)
        and query.dtype == key.dtype == value.dtype
        and (mask is None or (mask.dtype == torch.bool and mask.shape[1:3] == (1, 1)))
        and not extras.get("dropout")
        and extras.get("softcap") is None
        and not any(
            isinstance(extra, Tensor) and name not in _WITHOUT_EFFECT
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
