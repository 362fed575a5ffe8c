"""A router's choice for a few tokens on the CPU in one call, where a module is found to make it.

Recognised by what it computes, as norms are: a linear layer, softmax in fp32, the k most probable
experts, their probabilities divided by their sum or not. Other routers (groups, sigmoids, corrected
scores) stay the model's own.
"""

from __future__ import annotations

from typing import Any, Final, Literal, cast

import torch
from torch import Tensor, nn

from moe_offload.kernels.decode_kernels import DecodeKernels, RouterArguments, is_plain
from moe_offload.kernels.kernel_library import FORMAT_CODES, MatrixArguments

Part = Literal["logits", "scores", "index"]

_MAX_TOKENS: Final = 16
_PROBE_TOKENS: Final = 16  # of each size
_PROBE_SIZES: Final = (0.25, 1.0, 4.0)
# Rounding a logit to bf16 the other way may change a close choice; a different rule changes most.
_EQUAL_PART: Final = 0.75


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
    x = torch.randn(_PROBE_TOKENS, weight.shape[1], generator=generator)
    inputs = [(x * size).bfloat16() for size in _PROBE_SIZES]
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
    if same.float().mean() < _EQUAL_PART:
        return False
    pairs = [(found["scores"][same], expected["scores"][same])]
    if "logits" in order:
        pairs.append((found["logits"], expected["logits"]))
    # one unit of bf16 in a logit is 2^-8 of it, and e to that in a probability
    return all(
        bool(((a.double() - b.double()).norm() <= 2**-8 * b.double().norm()).item())
        for a, b in pairs
    )
