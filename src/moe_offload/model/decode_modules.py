"""Which of a CPU model's modules our kernels stand in for, each found by what it computes.

A decode step's self-attention on the CPU in three calls, where a module is found to compute it.

Served are modules made of q, k, v and o projections, an optional norm of q and k, and rotary
positions by halves: the block that most architectures share. As norms are, a module is recognised
by what it computes, so gates, sinks, clamps or other rotations leave it to its own code. Prompts do
as well, and every call with something unusual in it.

A router's choice for a few tokens on the CPU in one call, where a module is found to make it.

Recognised by what it computes, as norms are: a linear layer, softmax in fp32, the k most probable
experts, their probabilities divided by their sum or not. Other routers (groups, sigmoids, corrected
scores) stay the model's own.

RMSNorm of a few tokens on the CPU in one call, where a module is found to compute it.

Models differ in where they round and in what they add to the weight. Rather than by name, a module
is recognised by what it computes: it is run on probe values with random weights and compared with
each form. Everything else, and every long prompt, stays the module's own.
"""

from __future__ import annotations

import copy
import ctypes
import inspect
from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from moe_offload.kernels.bindings import (
    DecodeKernels,
    HeadsArguments,
    KernelChoice,
    NormArguments,
    RouterArguments,
    is_plain,
    load_kernels,
)
from moe_offload.kernels.cpu_linear import CpuLinear
from moe_offload.kernels.library import FORMAT_CODES, AttentionArguments, MatrixArguments
from moe_offload.model import attention as attention_module
from moe_offload.model.kv_cache import RoomyLayer, make_cache
from moe_offload.model.loader import install_experts, tests_attention

FORMS: Final = {"round_then_weight": 0, "weight_then_round": 1, "one_plus_weight": 2}
# 16 tokens of Mixtral; beyond, torch's threads are worth their start.
_MAX_ELEMENTS: Final = 1 << 16
_PROBE_ROWS: Final = 16
# A sum in another order may turn the rounding of a value on the edge between two.
_NORM_EQUAL_PART: Final = 0.99


class CpuNorm:
    """The forward of a norm module: y = norm(x) over the last dimension, bf16."""

    def __init__(
        self, module: nn.Module, form: str, epsilon: float, kernels: DecodeKernels
    ) -> None:
        self.own = module.forward
        self.form = form
        self._parameters = module._parameters
        self._kernels = kernels
        weight = self._parameters["weight"]
        assert weight is not None
        self._width = weight.numel()
        self._arguments = NormArguments(
            FORMS[form], weight.dtype == torch.bfloat16, epsilon, self._width, weight.data_ptr()
        )

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        n = hidden_states.numel()
        if (
            n > _MAX_ELEMENTS
            or args
            or kwargs
            or not is_plain(hidden_states)
            or hidden_states.shape[-1] != self._width
        ):
            result: Tensor = self.own(hidden_states, *args, **kwargs)
            return result
        out = torch.empty_like(hidden_states)
        self._kernels.norm(self.arguments(), hidden_states, True, n // self._width, out)
        return out

    def arguments(self) -> NormArguments:
        """What the kernels need, with the weight's address of now: moving it may replace it."""
        weight = self._parameters["weight"]
        assert weight is not None
        self._arguments.weight = weight.data_ptr()
        return self._arguments


def use_norm_kernels(model: nn.Module, kernels: DecodeKernels) -> int:
    """Give each bf16 norm that a form describes our forward; returns how many."""
    known: dict[tuple[object, ...], str | None] = {}
    installed = 0
    for module in model.modules():
        epsilon = _epsilon(module)
        if epsilon is None:
            continue
        weight = module._parameters["weight"]
        assert weight is not None
        key = (type(module), weight.shape, weight.dtype, epsilon)
        if key not in known:
            known[key] = probe_norm(module, epsilon, kernels)
        form = known[key]
        if form is not None:
            module.forward = CpuNorm(module, form, epsilon, kernels)
            installed += 1
    return installed


def probe_norm(module: nn.Module, epsilon: float, kernels: DecodeKernels) -> str | None:
    """The form that gives what `module` gives for values of all sizes; None where none does."""
    probe = copy.deepcopy(module)
    weight = probe._parameters["weight"]
    assert weight is not None
    generator = torch.Generator().manual_seed(0)
    width = weight.numel()
    x = torch.randn(_PROBE_ROWS, width, generator=generator)
    x = (x * torch.logspace(-4, 4, _PROBE_ROWS)[:, None]).bfloat16()
    with torch.no_grad():
        weight.copy_(torch.randn(width, generator=generator))
        expected = probe(x)
        if expected.dtype != x.dtype or expected.shape != x.shape:
            return None
        for form in FORMS:
            found = CpuNorm(probe, form, epsilon, kernels)(x)
            close = torch.allclose(found.float(), expected.float(), rtol=2**-7, atol=0)
            if close and (found == expected).float().mean() >= _NORM_EQUAL_PART:
                return form
    return None


def _epsilon(module: nn.Module) -> float | None:
    """The epsilon of what may be an RMSNorm: nothing but one vector, `weight`; else None."""
    if any(module.children()) or any(True for _ in module.buffers()):
        return None
    parameters = {name: value for name, value in module._parameters.items() if value is not None}
    if list(parameters) != ["weight"] or parameters["weight"].dim() != 1:
        return None
    if parameters["weight"].dtype not in (torch.bfloat16, torch.float32):
        return None
    for name in ("variance_epsilon", "eps", "epsilon"):
        epsilon = getattr(module, name, None)
        if isinstance(epsilon, float):
            return epsilon
    return None


Part = Literal["logits", "scores", "index"]

_MAX_TOKENS: Final = 16
_ROUTER_TOKENS: Final = 16  # of each size
_ROUTER_SIZES: Final = (0.25, 1.0, 4.0)
# Rounding a logit to bf16 the other way may change a close choice; a different rule changes most.
_ROUTER_EQUAL_PART: Final = 0.75


class CpuRouter:
    """The forward of a router module: hidden [..., H] bf16 -> its tuple, in the module's order."""

    def __init__(
        self,
        module: nn.Module,
        order: tuple[Part, ...],
        top_k: int,
        normalise: bool,
        scores_dtype: torch.dtype,
        kernels: DecodeKernels,
    ) -> None:
        self.own = module.forward
        self._parameters = module._parameters
        self._order = order
        self._top_k = top_k
        self._scores_dtype = scores_dtype
        self._kernels = kernels
        weight = self._weight()
        self._n_experts, self._width = weight.shape
        matrix = MatrixArguments(
            FORMAT_CODES["bf16"], self._n_experts, self._width, weight.data_ptr(), None, None
        )
        self._arguments = RouterArguments(
            matrix, True, scores_dtype == torch.bfloat16, normalise, top_k
        )

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        n_tokens = hidden_states.numel() // self._width
        if (
            n_tokens > _MAX_TOKENS
            or args
            or kwargs
            or not is_plain(hidden_states)
            or hidden_states.shape[-1] != self._width
        ):
            return cast(tuple[Tensor, ...], self.own(hidden_states, *args, **kwargs))
        parts: dict[Part, Tensor] = {
            "logits": torch.empty(n_tokens, self._n_experts, dtype=torch.bfloat16),
            "scores": torch.empty(n_tokens, self._top_k, dtype=self._scores_dtype),
            "index": torch.empty(n_tokens, self._top_k, dtype=torch.int64),
        }
        arguments = self._arguments
        arguments.matrix.weight = self._weight().data_ptr()  # of now: moving may replace it
        self._kernels.route(
            arguments, hidden_states, n_tokens, parts["logits"], parts["scores"], parts["index"]
        )
        return tuple(parts[part] for part in self._order)

    def _weight(self) -> Tensor:
        weight = self._parameters["weight"]
        assert weight is not None
        return weight


def use_router_kernel(block: nn.Module, kernels: DecodeKernels) -> int:
    """Give each bf16 router in an MoE block that the kernel describes our forward; how many."""
    installed = 0
    for module in block.children():
        router = probe_router(module, kernels)
        if router is not None:
            module.forward = router
            installed += 1
    return installed


@torch.no_grad()
def probe_router(module: nn.Module, kernels: DecodeKernels) -> CpuRouter | None:
    """Our forward for `module`, or None where it does not give what the module gives."""
    if not _may_be_router(module):
        return None
    weight = module._parameters["weight"]
    assert weight is not None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_ROUTER_TOKENS, weight.shape[1], generator=generator)
    inputs = [(x * size).bfloat16() for size in _ROUTER_SIZES]
    try:
        expected = [module.forward(one) for one in inputs]
    except (TypeError, RuntimeError, ValueError):
        return None  # it takes more than the hidden state
    found = _order(expected[0], weight.shape[0])
    if found is None:
        return None
    order, top_k, scores_dtype = found
    for normalise in (True, False):
        router = CpuRouter(module, order, top_k, normalise, scores_dtype, kernels)
        if all(
            _agree(order, router(one), theirs) for one, theirs in zip(inputs, expected, strict=True)
        ):
            return router
    return None


def _may_be_router(module: nn.Module) -> bool:
    parameters = {name: value for name, value in module._parameters.items() if value is not None}
    return (
        not any(module.children())
        and not any(True for _ in module.buffers())
        and type(module).forward is not nn.Linear.forward
        and list(parameters) == ["weight"]
        and parameters["weight"].dim() == 2
        and parameters["weight"].dtype == torch.bfloat16
        and parameters["weight"].is_contiguous()
    )


def _order(output: object, n_experts: int) -> tuple[tuple[Part, ...], int, torch.dtype] | None:
    """Which part is where in a router's output, its k and the scores' type; None if unclear."""
    if not isinstance(output, tuple) or not all(isinstance(part, Tensor) for part in output):
        return None
    index = [part for part in output if part.dtype == torch.int64]
    if len(index) != 1 or index[0].dim() != 2 or index[0].shape[1] == n_experts:
        return None
    top_k = index[0].shape[1]
    order: list[Part] = []
    scores_dtype = torch.float32
    for part in output:
        if part is index[0]:
            order.append("index")
        elif part.shape == (len(index[0]), n_experts) and part.dtype == torch.bfloat16:
            order.append("logits")
        elif part.shape == index[0].shape and part.dtype in (torch.bfloat16, torch.float32):
            order.append("scores")
            scores_dtype = part.dtype
        else:
            return None
    if len(set(order)) < len(order) or not {"index", "scores"} <= set(order):
        return None
    return tuple(order), top_k, scores_dtype


def _agree(order: tuple[Part, ...], ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> bool:
    found, expected = dict(zip(order, ours, strict=True)), dict(zip(order, theirs, strict=True))
    same = (found["index"] == expected["index"]).all(dim=1)
    if same.float().mean() < _ROUTER_EQUAL_PART:
        return False
    pairs = [(found["scores"][same], expected["scores"][same])]
    if "logits" in order:
        pairs.append((found["logits"], expected["logits"]))
    # one unit of bf16 in a logit is 2^-8 of it, and e to that in a probability
    return all(
        bool(((a.double() - b.double()).norm() <= 2**-8 * b.double().norm()).item())
        for a, b in pairs
    )


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


def use_cpu_kernels(
    model: PreTrainedModel, kernel: KernelChoice, isa: str, blocks: Iterable[nn.Module] = ()
) -> int:
    """Route plain bf16 linears of a CPU model through the expert kernels; returns how many.

    Subclasses of `nn.Linear` keep the model's own arithmetic. In decode steps attention goes to the
    kernels as well where the model leaves it to torch, and so do the norms, the routers of the MoE
    `blocks` and the self-attentions that are found to compute what the kernels do.
    """
    kernels = load_kernels(kernel, isa)
    implementation = model.config._attn_implementation
    attention = implementation == "sdpa" and not tests_attention(type(model))
    if kernels is not None and attention:
        model.set_attn_implementation(attention_module.register_kernels(kernels))
    replaced = 0
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and module.weight.dtype == torch.bfloat16:
            linear = CpuLinear.from_linear(module, kernel=kernel, isa=isa)
            install_experts(model, path, linear)
            replaced += 1
    if kernels is not None and model.dtype == torch.bfloat16:
        decode = DecodeKernels(kernels)
        use_norm_kernels(model, decode)
        for block in blocks:
            use_router_kernel(block, decode)
        if attention:
            use_attention_kernels(model, model.config, decode)
    return replaced
