"""Decoder layers whose step up to the experts is one call of the kernels.

Between two layers' experts the CPU's caches hold weights, so that every call from Python costs
several times what the kernel in it takes; norm, projections, rotation, cache, attention, sum and
norm are some thirty. Where a layer is made of parts that the kernels compute, and gives the very
bits that one call of them gives, that call takes its decode steps.
"""

from __future__ import annotations

import ctypes
from functools import partial
from operator import itemgetter
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from moe_offload.kernels.bindings import CpuKernels, is_plain
from moe_offload.kernels.cpu_linear import CpuLinear
from moe_offload.kernels.library import StepArguments
from moe_offload.model.decode_modules import CpuNorm, answer_to
from moe_offload.model.generation import cache_argument
from moe_offload.model.kv_cache import RoomyLayer, make_cache

# transformers' names, in the order of `StepArguments`.
_PROJECTIONS: Final = {
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "output": "o_proj",
}
# What a layer is given beside its cache; the last asks for what a hook on the router records.
_KNOWN_ARGUMENTS: Final = frozenset(
    ["attention_mask", "position_ids", "use_cache", "position_embeddings", "output_router_logits"]
)
_MOST_SEQUENCES: Final = 8
_PROBE_TOKENS: Final = 5
_PROBE_FACTOR: Final = 1024.0  # of queries, keys and values: one that is clipped shows


class CpuDecoderLayer:
    """The forward of a decoder layer: x + attention(norm(x)), then + experts(norm of the sum)."""

    def __init__(
        self, layer: nn.Module, attention: nn.Module, rest: str, kernels: CpuKernels
    ) -> None:
        """`rest` names the child that computes experts, or the like, from the normed sum."""
        self.own = layer.forward
        self._layer, self._rest, self._kernels = layer, rest, kernels
        self.cache_name = cache_argument(layer)
        self._known = _KNOWN_ARGUMENTS | {self.cache_name}
        self.index: int = attention.layer_idx  # type: ignore[assignment]
        self._linears: dict[str, Any] = {
            place: getattr(attention, name) for place, name in _PROJECTIONS.items()
        }
        self._onednn = [linear for linear in self._linears.values() if linear.suits_onednn]
        before, after = norms_of(layer).values()
        norms = dict(zip(("query_norm", "key_norm"), norms_of(attention).values(), strict=False))
        self._norms: dict[str, CpuNorm] = norms | {"before": before, "after": after}
        self.head_size: int = attention.head_dim  # type: ignore[assignment]
        self.hidden_size: int = self._linears["query"].in_features
        self.n_kv_heads: int = self._linears["key"].out_features // self.head_size
        self._step = StepArguments(
            n_heads=self._linears["query"].out_features // self.head_size,
            n_kv_heads=self.n_kv_heads,
            head_size=self.head_size,
            scale=getattr(attention, "scaling", self.head_size**-0.5),
        )
        modules = [*norms_of(layer), *norms_of(attention), *self._linears.values()]
        self._tensors = [tensor for module in modules for tensor in tensors_of(module)]
        self._parts: dict[str, ctypes.Structure] = {}
        self._addresses: list[int] = []  # of these, when the step's arguments were made
        self._strides: tuple[int, ...] = ()  # of the cache's keys and values, likewise
        # What a user may change: modules put in the place of these, biases, and hooks on them.
        self._owners: list[tuple[dict[str, Any], itemgetter[Any]]] = [
            (owner._modules, itemgetter(*(owner._modules.keys() - {rest})))
            for owner in (layer, attention)
        ]
        self._owners += [
            (linear._parameters, itemgetter("bias")) for linear in self._linears.values()
        ]
        self._children = [get(children) for children, get in self._owners]
        skipped = [attention, *attention.children(), *norms_of(layer)]
        self._hooks = [
            hooks for one in skipped for hooks in (one._forward_hooks, one._forward_pre_hooks)
        ]

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        cache = None if args else self.served(hidden_states, kwargs)
        if cache is None:
            output: Tensor = self.own(hidden_states, *args, **kwargs)
            return output
        total, normed = torch.empty_like(hidden_states), torch.empty_like(hidden_states)
        cos, sin = kwargs["position_embeddings"]
        step, n_batch = self._arguments(cache), len(hidden_states)
        self._kernels.call("attend_step", step, hidden_states, cos, sin, n_batch, total, normed)
        rest: Any = self._layer._modules[self._rest]
        return total.add_(rest(normed))

    def served(self, hidden: Tensor, arguments: dict[str, Any]) -> RoomyLayer | None:
        """The layer's keys and values where the kernels take this call, else None."""
        caches = arguments.get(self.cache_name)
        angles = arguments.get("position_embeddings")
        if (
            not isinstance(caches, DynamicCache)
            or not isinstance(angles, tuple)
            or arguments.get("attention_mask") is not None
            or not arguments.keys() <= self._known
            or self.index >= len(caches.layers)
        ):
            return None
        cache = caches.layers[self.index]
        batch, n_tokens, _ = hidden.shape
        cos, sin = angles
        fits = (
            n_tokens == 1
            and batch <= _MOST_SEQUENCES
            and isinstance(cache, RoomyLayer)
            and cache.can_extend(hidden)
            and cos.shape == sin.shape == (batch, 1, self.head_size)
            and is_plain(hidden)
            and is_plain(cos)
            and is_plain(sin)
            and not any(one.is_for_onednn(hidden) for one in self._onednn)
            and not self._layer.training
            and self._is_untouched()
        )
        return cache if fits else None

    def _is_untouched(self) -> bool:
        """Whether the modules are still those that were found, without hooks, and their weights
        such as the kernels read, whose addresses of now are the step's then."""
        now = [get(children) for children, get in self._owners]
        if now != self._children or any(self._hooks):
            return False
        addresses = [holder[name].data_ptr() for holder, name in self._tensors]
        if addresses != self._addresses:
            if not all(norm.fits() for norm in self._norms.values()):
                return False
            for place, part in (*self._norms.items(), *self._linears.items()):
                self._parts[place] = arguments = part.arguments()  # kept as long as its address
                setattr(self._step, place, ctypes.addressof(arguments))
            self._addresses = addresses
        return True

    def _arguments(self, cache: RoomyLayer) -> StepArguments:
        """The step's, with one token more in `cache`."""
        step = self._step
        cache.extend(1)
        keys, values = cache.keys, cache.values
        step.keys, step.values, step.n_keys = keys.data_ptr(), values.data_ptr(), keys.shape[2]
        strides = keys.stride()[:2] + values.stride()[:2]
        if strides != self._strides:
            step.key_strides, step.value_strides = strides[:2], strides[2:]
            self._strides = strides
        return step


def tensors_of(module: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where a module keeps its parameters and buffers: those of now, whatever is put there."""
    holders: list[dict[str, Any]] = [module._parameters, module._buffers]
    return [(holder, name) for holder in holders for name, one in holder.items() if one is not None]


def norms_of(module: nn.Module) -> dict[nn.Module, CpuNorm]:
    """The children whose forward is the kernels' norm."""
    forwards = {child: vars(child).get("forward") for child in module.children()}
    return {child: norm for child, norm in forwards.items() if isinstance(norm, CpuNorm)}


def use_decoder_layers(model: PreTrainedModel, kernels: CpuKernels | None) -> None:
    """One call in the place of the kernels' many, in each layer that is found to compute the same.

    The model's norms, linears and attention are the kernels' already.
    """
    if kernels is None:
        return
    for layer in list(model.modules()):
        forward = probe_layer(layer, model.config.get_text_config(), kernels)
        if forward is not None:
            layer.forward = forward


@torch.no_grad()
def probe_layer(
    layer: nn.Module, config: PretrainedConfig, kernels: CpuKernels
) -> CpuDecoderLayer | None:
    """Our forward for a decoder layer, or None where it does not give the layer's own bits.

    What follows the attention is left out of the comparison, for it stays the layer's own.
    """
    attentions = [child for child in layer.children() if _is_attention(child)]
    norms = norms_of(layer)
    own = {*attentions, *norms}
    rest = [name for name, child in layer.named_children() if child not in own]
    if (len(attentions), len(norms), len(rest)) != (1, 2, 1) or "forward" in vars(layer):
        return None
    forward = CpuDecoderLayer(layer, attentions[0], rest[0], kernels)
    parameters, experts = next(iter(norms))._parameters, layer._modules[rest[0]]
    weight: Any = parameters["weight"]
    layer._modules[rest[0]] = nn.Identity()
    try:
        for factor in (1.0, _PROBE_FACTOR):
            parameters["weight"] = nn.Parameter(weight * factor, requires_grad=False)
            if not _gives_the_same(forward, config):
                return None
    finally:
        layer._modules[rest[0]], parameters["weight"] = experts, weight
    return forward


def _is_attention(module: nn.Module) -> bool:
    """Whether a module has the usual projections, no biases, two norms or none and nothing else."""
    linears = [getattr(module, name, None) for name in _PROJECTIONS.values()]
    n_norms = len(norms_of(module))
    return (
        all(isinstance(one, CpuLinear) and one.bias is None for one in linears)
        and n_norms in (0, 2)
        and len(list(module.children())) == len(linears) + n_norms
        and hasattr(module, "head_dim")
        and hasattr(module, "layer_idx")
    )


def _gives_the_same(forward: CpuDecoderLayer, config: PretrainedConfig) -> bool:
    """Whether a new token of two sequences gets the layer's own bits, in the cache as well."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    hidden, angle = random(2, 1, forward.hidden_size), random(2, 1, forward.head_size).float()
    held = [random(2, forward.n_kv_heads, _PROBE_TOKENS, forward.head_size) for _ in range(2)]
    angles = angle.cos().bfloat16(), angle.sin().bfloat16()
    found = []
    for compute in (forward.own, forward):
        caches = make_cache(config, 2 * _PROBE_TOKENS)
        if forward.index >= len(caches.layers):
            return False
        cache = caches.layers[forward.index]
        cache.update(*held)
        arguments = {forward.cache_name: caches, "position_embeddings": angles}
        if forward.served(hidden, arguments) is None:
            return False
        output = answer_to(partial(compute, **arguments), hidden)
        found.append((output, cache.keys, cache.values))
    return all(
        isinstance(ours, Tensor) and isinstance(theirs, Tensor) and torch.equal(ours, theirs)
        for theirs, ours in zip(*found, strict=True)
    )
