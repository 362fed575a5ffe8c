"""The kernels' CRC-32 is zlib's, whatever the size."""

from __future__ import annotations

import random
import zlib

import pytest
import torch

from moe_offload.kernels.bindings import load_kernels


@pytest.mark.parametrize("n_bytes", [1, 63, 64, 65, 128, 192, 1000, 4096, 4096 * 33])
def test_it_is_zlibs(n_bytes: int) -> None:
    kernels = load_kernels("native")
    assert kernels is not None
    for data in (random.Random(n_bytes).randbytes(n_bytes), bytes(n_bytes), b"\xff" * n_bytes):
        tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        assert kernels.crc32(tensor) == zlib.crc32(data)
