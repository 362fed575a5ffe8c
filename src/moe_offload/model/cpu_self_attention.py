"""A decode step's self-attention on the CPU in three calls, where a module is found to compute it.

Served are modules made of q, k, v and o projections, an optional norm of q and k, and rotary
positions by halves: the block that most architectures share. As norms are, a module is recognised
by what it computes, so gates, sinks, clamps or other rotations leave it to its own code. Prompts do
as well, and every call with something unusual in it.
"""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from moe_offload.kernels.cpu_linear import CpuLinear
from moe_offload.kernels.decode_kernels import DecodeKernels, HeadsArguments, is_plain
from moe_offload.kernels.kernel_library import AttentionArguments
from moe_offload.model.cpu_norm import CpuNorm
from moe_offload.model.kv_cache import RoomyLayer, make_cache

_PROJECTIONS: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
_KNOWN_PARAMETERS: Final = frozenset(
    ("self", "hidden_states", "position_embeddings", "attention_mask", "kwargs")
)
_CACHE_NAMES: Final = frozenset(("cache", "past_key_values"))
_PROBE_TOKENS: Final = 5
_PROBE_SIZES: Final = (1.0, 50.0)  # the second shows clamps and soft caps
# Ours rounds where the module does; only a sum of a norm may fall to the other side of an edge.
_PROBE_TOLERANCE: Final = 2**-9


class CpuSelfAttention:
    """The forward of a self-attention module: one bf16 token per sequence by the kernels."""

    def __init__(
        self, module: nn.Module, cache_name: str, rotary_size: int, kernels: DecodeKernels
    ) -> None:
        self.own = module.forward
        self._cache_name = cache_name
        self._kernels = kernels
        self._q, self._k, self._v, self._o = (_linear(module, name) for name in _PROJECTIONS)
        self._norms = [_norm(module, name) for name in ("q_norm", "k_norm")]
        size = _attribute(module, "head_dim", int)
        n_heads, n_kv_heads = self._q.out_features // size, self._k.out_features // size
        self._value_size = self._v.out_features // n_kv_heads
        self._layer = _attribute(module, "layer_idx", int)
        self._scaling = _attribute(module, "scaling", float)
        self._width = self._q.out_features + self._k.out_features + self._v.out_features
        self._heads = HeadsArguments(
            is_bf16=True,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            key_size=size,
            value_size=self._value_size,
            rotary_size=rotary_size,
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's own forward returns: the output [B, 1, H], and no weights."""
        if args or not self._serves(kwargs):
            return self.own(*args, **kwargs)
        hidden: Tensor = kwargs["hidden_states"]
        mask: Tensor | None = kwargs.get("attention_mask")
        cache = kwargs[self._cache_name]
        n_batch, heads = hidden.shape[0], self._heads
        projected = torch.empty(n_batch, self._width, dtype=hidden.dtype)
        layer = cache.layers[self._layer]
        place = layer.add_token() if type(layer) is RoomyLayer else None
        if place is None:
            shape = (n_batch, heads.n_kv_heads, 1)
            keys = torch.empty(*shape, heads.key_size, dtype=hidden.dtype)
            values = torch.empty(*shape, heads.value_size, dtype=hidden.dtype)
            self._project(hidden, kwargs["position_embeddings"], keys, values, 0, projected)
            keys, values = cache.update(keys, values, self._layer, kwargs=kwargs)
            keys, values, n_keys = keys.contiguous(), values.contiguous(), keys.shape[2]
        else:
            keys, values, number = place
            self._project(hidden, kwargs["position_embeddings"], keys, values, number, projected)
            n_keys = number + 1
        if mask is not None:
            mask = mask.expand(n_batch, 1, 1, n_keys).contiguous()
        mixed = torch.empty(n_batch, 1, heads.n_heads * self._value_size, dtype=hidden.dtype)
        self._kernels.kernels.attend(
            AttentionArguments(
                is_bf16=True,
                n_batch=n_batch,
                n_heads=heads.n_heads,
                n_kv_heads=heads.n_kv_heads,
                n_keys=n_keys,
                key_size=heads.key_size,
                value_size=heads.value_size,
                scale=self._scaling,
                query=projected.data_ptr(),
                keys=keys.data_ptr(),
                values=values.data_ptr(),
                key_strides=keys.stride()[:2],
                value_strides=values.stride()[:2],
                mask=None if mask is None else mask.data_ptr(),
            ),
            mixed,
        )
        return self._o(mixed), None

    def _serves(self, kwargs: dict[str, Any]) -> bool:
        hidden, mask = kwargs["hidden_states"], kwargs.get("attention_mask")
        cache, rotary = kwargs.get(self._cache_name), kwargs.get("position_embeddings")
        if cache is None or rotary is None or hidden.shape[1] != 1:
            return False
        cos, sin = rotary
        shape = (1, self._heads.rotary_size)
        return (
            is_plain(hidden)
            and cos.dtype == sin.dtype == torch.bfloat16
            and cos.shape[1:] == sin.shape[1:] == shape
            and cos.shape[0] == sin.shape[0]
            and cos.shape[0] in (1, hidden.shape[0])
            and cos.is_contiguous()
            and sin.is_contiguous()
            and (mask is None or (mask.dtype == torch.bool and mask.shape[1:3] == (1, 1)))
            and len(cache.layers) > self._layer
            and not kwargs.get("output_attentions")
        )

    def _project(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        keys: Tensor,
        values: Tensor,
        number: int,
        projected: Tensor,
    ) -> None:
        """Query into `projected`; key and value as token `number` of `keys` and `values`."""
        cos, sin = rotary
        heads = self._heads
        heads.n_batch = hidden.shape[0]
        heads.q, heads.k, heads.v = (
            ctypes.pointer(linear.arguments()) for linear in (self._q, self._k, self._v)
        )
        q_norm, k_norm = self._norms
        if q_norm is not None and k_norm is not None:
            heads.q_norm = ctypes.pointer(q_norm.arguments())
            heads.k_norm = ctypes.pointer(k_norm.arguments())
        heads.cos, heads.sin = cos.data_ptr(), sin.data_ptr()
        heads.rotary_stride = 0 if cos.shape[0] == 1 else heads.rotary_size
        item = hidden.element_size()
        heads.key = keys.data_ptr() + number * heads.key_size * item
        heads.value = values.data_ptr() + number * heads.value_size * item
        heads.key_strides = keys.stride()[:2]
        heads.value_strides = values.stride()[:2]
        self._kernels.project(heads, hidden, projected)


def use_attention_kernels(
    model: nn.Module, config: PretrainedConfig, kernels: DecodeKernels
) -> int:
    """Give each self-attention that the kernels describe our forward; returns how many.

    Linears and norms have their own kernels before. The model's attention function is ours.
    """
    installed = 0
    text = config.get_text_config()
    known: dict[tuple[object, ...], bool] = {}
    for module in model.modules():
        cache_name = _cache_name(module)
        if cache_name is None:
            continue
        rotary_size = _rotary_size(text, module)
        attention = CpuSelfAttention(module, cache_name, rotary_size, kernels)
        key = _kind(module, rotary_size)
        if key not in known:
            known[key] = probe_attention(attention, module, text)
        if known[key]:
            module.forward = attention
            installed += 1
    return installed


@torch.no_grad()
def probe_attention(
    attention: CpuSelfAttention, module: nn.Module, config: PretrainedConfig
) -> bool:
    """Whether `attention` gives what `module` gives: one sequence and two, small and large values,
    without a mask and with one, at arbitrary angles."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    width, rotary_size = attention._q.in_features, attention._heads.rotary_size
    for n_batch, size in ((1, _PROBE_SIZES[0]), (2, _PROBE_SIZES[1]), (2, _PROBE_SIZES[0])):
        caches = [make_cache(config, 2 * _PROBE_TOKENS) for _ in range(2)]
        for n_tokens in (_PROBE_TOKENS, 1, 1):
            angles = 3 * random(n_batch, n_tokens, rotary_size)
            hidden = (size * random(n_batch, n_tokens, width)).bfloat16()
            mask = None
            if n_batch == 2 and n_tokens == 1:
                n_keys = caches[0].get_seq_length(attention._layer) + 1
                mask = torch.ones(n_batch, 1, 1, n_keys, dtype=torch.bool)
                mask[1, :, :, 0] = False
            call = {
                "hidden_states": hidden,
                "position_embeddings": (angles.cos().bfloat16(), angles.sin().bfloat16()),
                "attention_mask": mask,
            }
            try:
                theirs = module.forward(**call, **{attention._cache_name: caches[0]})[0]
            except Exception:
                return False  # it needs more than these arguments
            if n_tokens > 1:
                attention.own(**call, **{attention._cache_name: caches[1]})
                continue
            ours = attention(**call, **{attention._cache_name: caches[1]})[0]
            pairs: list[tuple[Tensor, Tensor]] = [(ours, theirs)]
            layers = [cache.layers[attention._layer] for cache in caches]
            pairs += [(layers[1].keys, layers[0].keys), (layers[1].values, layers[0].values)]
            if not all(_close(a, b) for a, b in pairs):
                return False
    return True


def _close(ours: Tensor, theirs: Tensor) -> bool:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    error = (ours.float() - theirs.float()).norm()
    return bool((error <= _PROBE_TOLERANCE * theirs.float().norm()).item())


def _cache_name(module: nn.Module) -> str | None:
    """How the forward of what may be such a module calls the cache; None for any other module."""
    if not all(isinstance(getattr(module, name, None), CpuLinear) for name in _PROJECTIONS):
        return None
    names = [*_PROJECTIONS]
    for name in ("q_norm", "k_norm"):
        norm = getattr(module, name, None)
        if norm is not None:
            if not isinstance(norm.forward, CpuNorm):
                return None
            names.append(name)
    if len(names) == 5 or {name for name, child in module.named_children() if child} - set(names):
        return None
    own_tensors = any(True for _ in module.parameters(False)) or any(
        True for _ in module.buffers(False)
    )
    if own_tensors or _linear(module, "q_proj").kernels is None:
        return None
    if not isinstance(getattr(module, "head_dim", None), int) or not isinstance(
        getattr(module, "layer_idx", None), int
    ):
        return None
    if not isinstance(getattr(module, "scaling", None), float):
        return None
    size = _attribute(module, "head_dim", int)
    q, k, v, o = (_linear(module, name) for name in _PROJECTIONS)
    n_heads, n_kv_heads = q.out_features // size, k.out_features // size
    if (
        n_kv_heads == 0
        or q.out_features != n_heads * size
        or k.out_features != n_kv_heads * size
        or n_heads % n_kv_heads
        or v.out_features % n_kv_heads
        or o.in_features != n_heads * (v.out_features // n_kv_heads)
    ):
        return None
    return _position_free(inspect.unwrap(type(module).forward))


def _position_free(forward: Any) -> str | None:
    """The cache's name in a forward that learns positions from cos and sin alone, else None.

    No probe can show what happens at a position it does not try.
    """
    names = set(inspect.signature(forward).parameters)
    cache_names = names & _CACHE_NAMES
    texts = {text for text in forward.__code__.co_consts if isinstance(text, str)}
    used = {*forward.__code__.co_names, *forward.__code__.co_varnames, *texts}
    if len(cache_names) != 1 or names - cache_names - _KNOWN_PARAMETERS:
        return None
    if used & {"position_ids", "cache_position", "get_seq_length"}:
        return None
    return cache_names.pop()


def _kind(module: nn.Module, rotary_size: int) -> tuple[object, ...]:
    """What decides which formula a module computes; its weights' values do not."""
    plain = tuple(
        (name, value)
        for name, value in sorted(vars(module).items())
        if isinstance(value, (int, float, str, bool, type(None))) and name != "layer_idx"
    )
    shapes: list[Sequence[int]] = []
    for name in _PROJECTIONS:
        linear = _linear(module, name)
        shapes.append((linear.out_features, linear.in_features, linear.bits or 16))
    return (type(module), rotary_size, plain, tuple(map(tuple, shapes)))


def _rotary_size(config: PretrainedConfig, module: nn.Module) -> int:
    parameters = getattr(config, "rope_parameters", None) or {}
    part = parameters.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None)
    return int(_attribute(module, "head_dim", int) * (part if isinstance(part, float) else 1.0))


def _linear(module: nn.Module, name: str) -> CpuLinear:
    linear = getattr(module, name)
    assert isinstance(linear, CpuLinear)
    return linear


def _norm(module: nn.Module, name: str) -> CpuNorm | None:
    norm = getattr(module, name, None)
    if norm is None:
        return None
    assert isinstance(norm.forward, CpuNorm)
    return norm.forward


def _attribute(module: nn.Module, name: str, kind: type) -> Any:
    value = getattr(module, name)
    assert isinstance(value, kind), name
    return value
