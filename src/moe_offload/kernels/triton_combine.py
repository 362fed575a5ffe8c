"""A layer's output from both sides' sums: the CPU's is read where it lies, in pinned host memory.

A copy to the device would queue in the card's one copy engine for that direction, behind whole
experts (Mixtral's: 352 MB, 14 ms at 25 GB/s each). A kernel that reads mapped memory passes it by:
a token's sum is 16 KB.

Import this only where Triton is installed. Without a GPU it runs in Triton's interpreter, which is
what the tests of every run use; docs/PERFORMANCE.md has what a GPU gave.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK: Final = 1024  # elements of a program: 4 KiB over the bus, in requests of 128 bytes


@triton.jit
def combine_kernel(
    on_device,  # fp32 [n], read if HAS_DEVICE
    on_host,  # fp32 [n], pinned: the device reads it over the bus, once
    out,  # [n]
    n,
    HAS_DEVICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    # .cv: never from a cache, which may hold what lay there in the layer before.
    total = tl.load(on_host + at, mask=inside, other=0.0, cache_modifier=".cv")
    if HAS_DEVICE:
        total += tl.load(on_device + at, mask=inside, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def present_kernel(
    on_device,  # fp32 [n]
    on_host,  # fp32 [n], pinned, as is
    present,  # int32 [2], pinned: 1 where there is a part in each of them, else 0
    out,  # [n]
    n,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    n_device = n * tl.load(present, cache_modifier=".cv")
    n_host = n * tl.load(present + 1, cache_modifier=".cv")
    total = tl.load(on_host + at, mask=at < n_host, other=0.0, cache_modifier=".cv")
    total += tl.load(on_device + at, mask=at < n_device, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def add_from_host(on_device: Tensor | None, on_host: Tensor, like: Tensor) -> Tensor:
    """`on_device` + `on_host` in the dtype and on the device of `like`, all [T, H].

    `on_device` is fp32 there, or None for none; `on_host` fp32, contiguous, in pinned memory, not
    to be written before the current stream has come past this. That stream's device is current.
    """
    out = torch.empty(on_host.shape, dtype=like.dtype, device=like.device)
    n = on_host.numel()
    combine_kernel[(triton.cdiv(n, _BLOCK),)](
        out if on_device is None else on_device.contiguous(),
        on_host,
        out,
        n,
        HAS_DEVICE=on_device is not None,
        BLOCK=_BLOCK,
    )
    return out


def add_present(on_device: Tensor, on_host: Tensor, present: Tensor, like: Tensor) -> Tensor:
    """The same of those parts alone that `present`, int32 [2] in pinned memory, names.

    It is read when the GPU comes to it, so one recorded call serves every step.
    """
    out = torch.empty(on_host.shape, dtype=like.dtype, device=like.device)
    n = on_host.numel()
    present_kernel[(triton.cdiv(n, _BLOCK),)](on_device, on_host, present, out, n, BLOCK=_BLOCK)
    return out
