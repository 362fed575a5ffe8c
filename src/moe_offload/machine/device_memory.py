"""Tells a device that is out of memory from any other failure."""

from __future__ import annotations

import torch

# torch's allocator has an exception of its own. What allocates for itself has not: cuBLAS, whose
# handle on a full GPU fails with either status; cuDNN, which attention may use; CUDA, which loads a
# kernel's code at its first launch; Triton, likewise; and the CPU's allocator.
_SIGNS = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "allocate memory",
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether `error` says that there was no room, on whatever device."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
