"""Which of a CPU model's modules our kernels stand in for, each found by what it computes.

Models differ in where they round, in what a norm adds to its weight, in how a router scores. Rather
than by name, a module is recognised by running it on probe values: where a form that the kernels
know gives the same, they compute decode steps in its place. So is the function that rotates queries
and keys. Everything else, every long prompt and
every call with something unusual in it stays the module's own.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable
from types import CellType, FunctionType, MethodType
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_offload.kernels.bindings import CpuKernels, KernelChoice, is_plain, load_kernels
from moe_offload.kernels.cpu_linear import CpuLinear
from moe_offload.kernels.library import (
    FORMAT_CODES,
    MatrixArguments,
    NormArguments,
    RouterArguments,
)
from moe_offload.model.attention import register_kernels, takes_other_attention

FORMS: Final = {"round_then_weight": 0, "weight_then_round": 1, "one_plus_weight": 2}
# 16 tokens of Mixtral; beyond, torch's threads are worth their start.
_MAX_NORM_ELEMENTS: Final = 1 << 16
_MAX_ROUTED_TOKENS: Final = 16
_PROBE_ROWS: Final = 16
# A sum in another order may turn the rounding of a value on the edge between two.
_NORM_EQUAL_PART: Final = 0.99
# Rounding a logit to bf16 the other way may change a close choice; a different rule changes most.
_ROUTER_EQUAL_PART: Final = 0.75


def use_cpu_kernels(
    model: PreTrainedModel, kernel: KernelChoice, isa: str, routers: Iterable[nn.Module] = ()
) -> None:
    """Route plain bf16 linears of a CPU model, and packed ones, through the expert kernels.

    Subclasses of `nn.Linear` keep the model's own arithmetic. Attention goes to the kernels as well
    where the model leaves it to a registered function; so do, in decode steps, the norms and those
    of `routers` that are found to compute what the kernels do.
    """
    kernels = load_kernels(kernel, isa)
    for module in model.modules():
        if isinstance(module, CpuLinear):  # its weights came packed
            module.kernels = kernels
    if kernels is None:
        return
    if takes_other_attention(type(model)):
        model.set_attn_implementation(register_kernels(kernels))
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and module.weight.dtype == torch.bfloat16:
            model.set_submodule(path, CpuLinear.from_linear(module, kernel=kernel, isa=isa))
    if model.dtype == torch.bfloat16:
        for module in model.modules():
            norm = probe_norm(module, kernels)
            if norm is not None:
                module.forward = norm
            use_rotation(module, kernels)
        for module in routers:
            router = probe_router(module, kernels)
            if router is not None:
                module.forward = router


@torch.no_grad()
def answer_to(module: Callable[[Tensor], Any], probe: Tensor) -> Any:
    """What `module` gives for `probe` and nothing else; None where it raises.

    One that needs more than a hidden state (a gate, positions, a cache) is not one of ours, and
    there are as many ways to say so as there are modules.
    """
    try:
        return module(probe)
    except Exception:
        return None


def find_router(block: nn.Module, width: int) -> nn.Module | None:
    """The router of an MoE block whose hidden states are [T, `width`], or None.

    A router is a direct child that maps them to a tuple with one tensor of integers [T, K] in it:
    transformers' convention, found by trying rather than by name.
    """
    for child in block.children():
        parameter = next(child.parameters(), None)
        if parameter is not None:
            probe = torch.zeros(1, width, dtype=parameter.dtype, device=parameter.device)
            if _chosen(answer_to(child, probe)) is not None:
                return child
    return None


def chosen_experts(router: nn.Module, hidden: Tensor) -> Tensor:
    """The ids int64 [T, K] that a router found here chooses for `hidden` [T, H]."""
    ids = _chosen(router(hidden))
    assert ids is not None  # it gave some for the probe
    return ids.long()


def _chosen(output: object) -> Tensor | None:
    parts = output if isinstance(output, tuple) else ()
    integers = [
        part
        for part in parts
        if isinstance(part, Tensor) and part.dim() == 2 and not part.is_floating_point()
    ]
    return integers[-1] if integers else None


class CpuNorm:
    """The forward of a norm module: y = norm(x) over the last dimension, bf16."""

    def __init__(self, module: nn.Module, form: str, epsilon: float, kernels: CpuKernels) -> None:
        self.own = module.forward
        self._parameters: Any = module._parameters
        self._kernels = kernels
        weight = cast(Tensor, module.weight)
        self._width = weight.numel()
        self._arguments = NormArguments(
            FORMS[form], weight.dtype == torch.bfloat16, epsilon, self._width, weight.data_ptr()
        )

    def arguments(self) -> NormArguments:
        """What the kernels need, always the same object, with the weight's address of now."""
        self._arguments.weight = self._parameters["weight"].data_ptr()
        return self._arguments

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        n = hidden_states.numel()
        unusual = args or kwargs or hidden_states.shape[-1] != self._width
        if n > _MAX_NORM_ELEMENTS or unusual or not is_plain(hidden_states):
            return cast(Tensor, self.own(hidden_states, *args, **kwargs))
        out = torch.empty_like(hidden_states)
        rows = n // self._width
        self._kernels.call("rms_norm", self.arguments(), hidden_states, True, rows, out)
        return out


@torch.no_grad()
def probe_norm(module: nn.Module, kernels: CpuKernels) -> CpuNorm | None:
    """Our forward for an RMSNorm, or None where no form gives what `module` does at all sizes."""
    weight = _only_weight(module)
    settings = [getattr(module, name, None) for name in ("variance_epsilon", "eps", "epsilon")]
    epsilon = next((value for value in settings if isinstance(value, float)), None)
    if weight is None or weight.dim() != 1 or epsilon is None:
        return None
    if weight.dtype not in (torch.bfloat16, torch.float32):
        return None
    probe = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    width = weight.numel()
    x = torch.randn(_PROBE_ROWS, width, generator=generator)
    x = (x * torch.logspace(-4, 4, _PROBE_ROWS)[:, None]).bfloat16()
    cast(Tensor, probe.weight).copy_(torch.randn(width, generator=generator))
    expected = answer_to(probe, x)
    if not isinstance(expected, Tensor) or expected.dtype != x.dtype or expected.shape != x.shape:
        return None
    for form in FORMS:
        found = CpuNorm(probe, form, epsilon, kernels)(x)
        close = torch.allclose(found.float(), expected.float(), rtol=2**-7, atol=0)
        if close and (found == expected).float().mean() >= _NORM_EQUAL_PART:
            return CpuNorm(module, form, epsilon, kernels)
    return None


class CpuRotation:
    """transformers' function of this name: queries and keys [B, heads, S, D], rotated."""

    NAME: Final = "apply_rotary_pos_emb"

    def __init__(self, own: Callable[..., tuple[Tensor, Tensor]], kernels: CpuKernels) -> None:
        self.own = own
        self._kernels = kernels

    def __call__(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        angles = q.shape[0], 1, q.shape[3]  # one token of each sequence
        fits = q.shape[2] == k.shape[2] == 1 and cos.shape == sin.shape == angles
        if args or kwargs or not fits or not all(map(is_plain, (q, k, cos, sin))):
            return self.own(q, k, cos, sin, *args, **kwargs)
        return self._rotate(q, cos, sin), self._rotate(k, cos, sin)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        out = torch.empty_like(x)
        self._kernels.call("rotate", x, cos, sin, x.shape[0], x.shape[1], x.shape[3], out)
        return out


@torch.no_grad()
def use_rotation(module: nn.Module, kernels: CpuKernels) -> None:
    """Rotate by the kernels in a module whose own forward rotates as they do, bit for bit.

    A function has no place in a module, as a norm has: what is replaced is the meaning of its name,
    in this one module's forward, whose code and decorators stay.
    """
    forward = inspect.unwrap(type(module).forward)
    if "forward" in vars(module) or not isinstance(forward, FunctionType):
        return
    if CpuRotation.NAME not in forward.__code__.co_names:
        return
    own = forward.__globals__.get(CpuRotation.NAME)
    if own is None:  # an attribute of the same name
        return
    generator = torch.Generator().manual_seed(0)
    sizes = (2, 4, 1, 16), (2, 2, 1, 16), (2, 1, 16), (2, 1, 16)
    probe = [torch.randn(size, generator=generator).bfloat16() for size in sizes]
    rotation = CpuRotation(own, kernels)
    expected = answer_to(lambda _: [one.float() for one in own(*probe)], probe[0])
    if expected is None or not all(map(torch.equal, expected, map(Tensor.float, rotation(*probe)))):
        return
    changed = _with_name(type(module).forward, CpuRotation.NAME, rotation)
    if changed is not None:
        module.forward = MethodType(changed, module)


def _with_name(function: object, name: str, value: object) -> FunctionType | None:
    """A copy of a function, and of what decorates it, in whose code a global `name` is `value`.

    None where a decorator keeps what it decorates elsewhere than in a variable of its own.
    """
    if not isinstance(function, FunctionType):
        return None
    names, closure = function.__globals__, function.__closure__
    inner, changed = getattr(function, "__wrapped__", None), None
    if inner is None:
        names = names | {name: value}
    else:
        changed = _with_name(inner, name, value)
        decorated = CellType(inner)  # cells are equal where what they hold is; empty ones too
        if changed is None or closure is None or decorated not in closure:
            return None
        closure = tuple(CellType(changed) if cell == decorated else cell for cell in closure)
    copied = FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, closure
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    if changed is not None:
        functools.update_wrapper(copied, changed)  # its signature
    return copied


class CpuRouter:
    """The forward of a router module: hidden [..., H] bf16 -> its tuple, in the module's order."""

    def __init__(
        self,
        module: nn.Module,
        order: tuple[str, ...],
        top_k: int,
        normalise: bool,
        scores_dtype: torch.dtype,
        kernels: CpuKernels,
    ) -> None:
        self.own = module.forward
        self._parameters: Any = module._parameters
        self._order = order
        self._top_k = top_k
        self._scores_dtype = scores_dtype
        self._kernels = kernels
        weight = cast(Tensor, module.weight)
        self._n_experts, self._width = weight.shape
        matrix = MatrixArguments(
            FORMAT_CODES["bf16"], self._n_experts, self._width, weight.data_ptr(), None, None
        )
        self._arguments = RouterArguments(
            matrix, True, scores_dtype == torch.bfloat16, normalise, top_k
        )

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        n_tokens = hidden_states.numel() // self._width
        unusual = args or kwargs or hidden_states.shape[-1] != self._width
        if n_tokens > _MAX_ROUTED_TOKENS or unusual or not is_plain(hidden_states):
            return cast(tuple[Tensor, ...], self.own(hidden_states, *args, **kwargs))
        parts = {
            "logits": torch.empty(n_tokens, self._n_experts, dtype=torch.bfloat16),
            "scores": torch.empty(n_tokens, self._top_k, dtype=self._scores_dtype),
            "index": torch.empty(n_tokens, self._top_k, dtype=torch.int64),
        }
        arguments = self._arguments
        arguments.matrix.w = self._parameters["weight"].data_ptr()  # of now
        self._kernels.call("route", arguments, hidden_states, n_tokens, *parts.values())
        return tuple(parts[part] for part in self._order)


@torch.no_grad()
def probe_router(module: nn.Module, kernels: CpuKernels) -> CpuRouter | None:
    """Our forward for a router, or None where the kernel does not give what `module` gives.

    Known is a linear layer, softmax in fp32, the k most probable experts, their probabilities
    divided by their sum or not; groups, sigmoids and corrected scores are not.
    """
    weight = _only_weight(module)
    if weight is None or weight.dim() != 2 or type(module).forward is nn.Linear.forward:
        return None
    if weight.dtype != torch.bfloat16 or not weight.is_contiguous():
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_PROBE_ROWS, weight.shape[1], generator=generator)
    inputs = [(x * size).bfloat16() for size in (0.25, 1.0, 4.0)]
    expected = [answer_to(module.forward, one) for one in inputs]
    order = _order(expected[0], weight.shape[0])
    if order is None:
        return None
    scores, index = (expected[0][order.index(part)] for part in ("scores", "index"))
    for normalise in (True, False):
        router = CpuRouter(module, order, index.shape[1], normalise, scores.dtype, kernels)
        if all(
            _agree(order, router(one), theirs) for one, theirs in zip(inputs, expected, strict=True)
        ):
            return router
    return None


def _order(output: object, n_experts: int) -> tuple[str, ...] | None:
    """Which part is where in a router's output; None if unclear."""
    index = _chosen(output)
    if index is None or index.shape[1] == n_experts:
        return None
    parts: dict[object, str] = {
        (index.shape, torch.int64): "index",
        (index.shape, torch.float32): "scores",
        (index.shape, torch.bfloat16): "scores",
        ((len(index), n_experts), torch.bfloat16): "logits",
    }
    order = tuple(
        parts.get((getattr(part, "shape", None), getattr(part, "dtype", None)), "unknown")
        for part in cast(tuple[object, ...], output)
    )
    return order if sorted(order) in (["index", "scores"], ["index", "logits", "scores"]) else None


def _agree(order: tuple[str, ...], ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> bool:
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


def _only_weight(module: nn.Module) -> Tensor | None:
    """The one tensor of a module that holds nothing but `weight`; None for any other module."""
    tensors = dict([*module.named_parameters(), *module.named_buffers()])
    return tensors["weight"] if list(tensors) == ["weight"] else None
