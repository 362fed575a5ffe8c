"""Headers, reads and writes of one safetensors file, compared with the safetensors package."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from moe_offload.checkpoint.safetensors_file import (
    DATA_ALIGNMENT,
    DTYPES,
    checksum,
    plan_header,
    read_header,
    read_into,
    write_file,
)
from moe_offload.errors import UserError


@given(st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5)))))
def test_headers_lie_where_the_data_starts_aligned(tensors: list[tuple[str, list[int]]]) -> None:
    planned = [
        (f"tensor {i}", DTYPES[code], tuple(shape[:3])) for i, (code, shape) in enumerate(tensors)
    ]
    header, entries = plan_header(planned, {"format": "pt"})
    assert len(header) % DATA_ALIGNMENT == 0
    assert struct.unpack("<Q", header[:8])[0] == len(header) - 8
    fields = json.loads(header[8:])
    position = 0
    for entry, (name, dtype, shape) in zip(entries, planned, strict=True):
        assert (entry.name, entry.torch_dtype, entry.shape) == (name, dtype, shape)
        assert fields[name]["data_offsets"] == [position, position + entry.n_bytes]
        assert entry.offset_bytes == len(header) + position
        position += entry.n_bytes


def test_reads_what_the_safetensors_library_writes(tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.randn(3, 5).bfloat16(),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(7),
        "flags": torch.tensor([True, False]),
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    entries = {entry.name: entry for entry in read_header(path)}
    assert entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        found = torch.empty(entries[name].shape, dtype=entries[name].torch_dtype)
        read_into(path, entries[name].offset_bytes, found)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor)


@pytest.mark.parametrize(
    "fields",
    [
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}},
        {"a": {"dtype": "F32", "shape": [4]}},
        {"a": {"dtype": "F32", "shape": "many", "data_offsets": [0, 16]}},
        {"a": 3},
        [],
    ],
)
def test_a_header_that_contradicts_itself(fields: object, tmp_path: Path) -> None:
    text = json.dumps(fields).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    with pytest.raises(UserError, match="damaged or no safetensors file"):
        read_header(path)


def test_a_dtype_that_torch_lacks_is_its_bytes(tmp_path: Path) -> None:
    text = b'{"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}'
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(2))
    (entry,) = read_header(path)
    assert (entry.dtype, entry.shape, entry.n_bytes) == ("uint8", (2,), 2)


def test_reading_past_the_end_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(10))
    with pytest.raises(UserError, match="ends 4 bytes early"):
        read_into(path, 6, torch.empty(8, dtype=torch.uint8))
    with pytest.raises(UserError, match="cannot read"):
        read_into(tmp_path / "none", 0, torch.empty(8, dtype=torch.uint8))


def test_a_shard_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header, (entry,) = plan_header([("a", torch.float32, (4,))], {})
    size = entry.offset_bytes + entry.n_bytes

    def failing() -> Iterator[bytes]:
        yield header
        assert not path.exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(path, size, failing())
    assert list(tmp_path.iterdir()) == []
    parts = [header, torch.arange(4.0)]
    assert write_file(path, size, parts) == [checksum(part) for part in parts]
    assert torch.equal(load_file(path)["a"], torch.arange(4.0))
    assert list(tmp_path.iterdir()) == [path]
