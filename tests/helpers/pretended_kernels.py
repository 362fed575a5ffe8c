"""The Triton kernels of decode steps, acted out on a pretended GPU, where graphs record them too.

As on a card, a recorded launch reads its slots when it is replayed, from the host's pinned memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from pretended_gpu import GpuTensor, Seen
from torch import Tensor

from moe_offload.experts.slots import GpuExperts
from moe_offload.kernels import triton_combine
from moe_offload.kernels.oracle import expert_ffn


def _launch(work: Callable[[], object]) -> None:
    """Do `work` as a GPU would, or let the graph that is being recorded do it."""
    graph = GpuTensor.seen.graph
    if graph is not None:
        graph.add(work)
        return
    with torch._C.DisableTorchFunctionSubclass():
        work()


def _require_pinned(host: Tensor) -> None:
    assert not isinstance(host, GpuTensor) and GpuTensor.seen.is_pinned(host), "no GPU reads that"


class PretendedKernels:
    """Stands for `TritonExperts`."""

    def __init__(self, gpu: GpuExperts) -> None:
        self.gpu = gpu

    def warm_up(self, dtype: torch.dtype) -> None: ...

    def grouped(self, hidden: Tensor, slot_of_pair: Sequence[int], weights: Tensor) -> Tensor:
        return self._started(hidden, lambda: slot_of_pair, weights)

    def grouped_by(self, hidden: Tensor, slot_of_pair: Tensor, weights: Tensor) -> Tensor:
        _require_pinned(slot_of_pair)
        assert slot_of_pair.dtype == torch.int32
        return self._started(hidden, slot_of_pair.tolist, weights)

    def expert(self, slot: int, x: Tensor) -> Tensor:
        gpu = self.gpu
        return expert_ffn(gpu.layout, gpu.slots[slot], x, gpu.activation, gpu.act_module)

    def _started(
        self, hidden: Tensor, slots: Callable[[], Sequence[int]], weights: Tensor
    ) -> Tensor:
        out = torch.full(hidden.shape, float("nan"), device=hidden.device)

        def work() -> None:
            out.zero_()
            top_k = weights.shape[1]
            for pair, slot in enumerate(slots()):
                token = pair // top_k
                if slot >= 0:
                    y = self.expert(slot, hidden[token : token + 1])
                    out[token] += y[0].float() * weights[token, pair % top_k]

        _launch(work)
        return out


def _add_present(on_device: Tensor, on_host: Tensor, present: Tensor, like: Tensor) -> Tensor:
    _require_pinned(on_host)
    _require_pinned(present)
    out = torch.full(like.shape, float("nan"), dtype=like.dtype, device=like.device)

    def work() -> None:
        out.zero_()
        for part, is_there in zip((on_device, on_host), present.tolist(), strict=True):
            if is_there:
                out.add_(part.to(out.dtype))

    _launch(work)
    return out


def _add_from_host(on_device: Tensor | None, on_host: Tensor, like: Tensor) -> Tensor:
    _require_pinned(on_host)
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)

    def work() -> None:
        out.copy_(on_host if on_device is None else on_host + on_device)

    _launch(work)
    return out


def pretend_kernels(patch: pytest.MonkeyPatch, seen: Seen) -> None:
    """Let the pretended GPU's hits and sums be computed by kernels."""

    def use(gpu: Any) -> None:
        gpu._kernels = PretendedKernels(gpu)

    patch.setattr(GpuExperts, "_use_triton", use)
    patch.setattr(GpuExperts, "_use_tiles", lambda _: None)
    patch.setattr(triton_combine, "add_present", _add_present)
    patch.setattr(triton_combine, "add_from_host", _add_from_host)
