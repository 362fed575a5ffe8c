"""Blocks read in pieces: the checksums of the pieces are the whole block's."""

from __future__ import annotations

import random
import zlib
from pathlib import Path

import pytest
import torch

from moe_offload.checkpoint import block_file
from moe_offload.checkpoint.block import block_layout
from moe_offload.checkpoint.block_file import BlockFile
from moe_offload.checkpoint.prepared import MoeLayer
from moe_offload.errors import UserError


@pytest.mark.parametrize("least_bytes", [1, 3 * 4096, 1 << 20])
def test_the_checksums_of_all_pieces_make_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least_bytes: int
) -> None:
    monkeypatch.setattr(block_file, "_LEAST_BYTES", least_bytes)
    layout = block_layout("fp32", 64, 40)
    block = random.Random(0).randbytes(layout.block_bytes)
    path = tmp_path / "blocks"
    path.write_bytes(block)
    layer = MoeLayer("m", path, len(block), 0, 1, layout, 0, (zlib.crc32(block),))
    file = BlockFile(layer)
    out = torch.frombuffer(bytearray(len(block) + 4096), dtype=torch.uint8)
    start = -out.data_ptr() % 4096
    out = out[start : start + len(block)]
    for piece in reversed(file.pieces):
        file.read(0, out, piece)
    assert out.numpy().tobytes() == block
    checksums = [zlib.crc32(block[piece]) for piece in file.pieces]
    assert len(checksums) == {1: 4, 3 * 4096: 3, 1 << 20: 1}[least_bytes]
    file.check(0, checksums)
    for place in range(len(checksums)):
        wrong = [checksum ^ (place == other) for other, checksum in enumerate(checksums)]
        with pytest.raises(UserError, match="is corrupt: the checksum of expert 0"):
            file.check(0, wrong)
    file.close()
