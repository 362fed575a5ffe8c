"""Runs the combining kernel in Triton's interpreter and prints its errors as JSON.

A program of its own: the interpreter is chosen by TRITON_INTERPRET when Triton is first imported.
"""

from __future__ import annotations

import json

import torch

from moe_offload.kernels.triton_combine import add_from_host, add_present

CASES = [
    (shape, dtype, has_device, has_host)
    for shape in ((1, 1), (1, 1024), (3, 1365), (2, 2880))
    for dtype in (torch.float32, torch.bfloat16)
    for has_device in (False, True)
    for has_host in (True, False)
]


def error(shape: tuple[int, int], dtype: torch.dtype, has_device: bool, has_host: bool) -> float:
    """The largest, in units of the last place of the exact sum in `dtype`.

    A graph's sum is told of the parts when it runs; what is none of them may be anything.
    """
    torch.manual_seed(0)
    parts = [torch.randn(shape) if there else None for there in (has_device, has_host)]
    like, anything = torch.empty(shape, dtype=dtype), torch.full(shape, float("nan"))
    present = torch.tensor([has_device, has_host], dtype=torch.int32)
    on_device, on_host = (anything if part is None else part for part in parts)
    out = add_present(on_device, on_host, present, like)
    assert out.dtype == dtype and out.shape == shape
    if has_host:
        assert torch.equal(out, add_from_host(parts[0], on_host, like))
    exact = sum(part for part in parts if part is not None) + torch.zeros(shape)
    unit = torch.finfo(dtype).eps * 2.0 ** exact.abs().clamp(min=1e-30).log2().floor()
    return float(((out.float() - exact).abs() / unit).max())


if __name__ == "__main__":
    print(json.dumps({str(case): error(*case) for case in CASES}))
