"""Runs the combining kernel in Triton's interpreter and prints its errors as JSON.

A program of its own: the interpreter is chosen by TRITON_INTERPRET when Triton is first imported.
"""

from __future__ import annotations

import json

import torch

from moe_offload.kernels.triton_combine import add_from_host

CASES = [
    (shape, dtype, has_device)
    for shape in ((1, 1), (1, 1024), (3, 1365), (2, 2880))
    for dtype in (torch.float32, torch.bfloat16)
    for has_device in (False, True)
]


def error(shape: tuple[int, int], dtype: torch.dtype, has_device: bool) -> float:
    """The largest, in units of the last place of the exact sum in `dtype`."""
    torch.manual_seed(0)
    on_host, on_device = torch.randn(shape), torch.randn(shape)
    out = add_from_host(on_device if has_device else None, on_host, torch.empty(shape, dtype=dtype))
    assert out.dtype == dtype and out.shape == shape
    exact = on_host + on_device if has_device else on_host
    unit = torch.finfo(dtype).eps * 2.0 ** exact.abs().log2().floor()
    return float(((out.float() - exact).abs() / unit).max())


if __name__ == "__main__":
    print(json.dumps({str(case): error(*case) for case in CASES}))
