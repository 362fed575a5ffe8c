"""The prepared folder is read whole or refused with a sentence that names what is wrong."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from moe_offload.checkpoint.prepared import (
    Manifest,
    iterate_dense,
    read_block,
    read_manifest,
    verify,
    write_manifest,
)
from moe_offload.checkpoint.safetensors_file import (
    DATA_ALIGNMENT,
    DTYPES,
    ShardWriter,
    checksum,
    plan_header,
    read_header,
    read_into,
    read_tensor,
)
from moe_offload.commands import prepare
from moe_offload.errors import UserError


@pytest.fixture
def prepared(tmp_path: Path) -> Manifest:
    model = tiny_models.build_model(tiny_models.qwen2_moe())
    source = tiny_models.write_hub(model, tmp_path / "source")
    output = tmp_path / "out"
    paths = ["--input-path", str(source), "--output-path", str(output), "--hf"]
    assert prepare.main([*paths, "--expert-dtype", "int8", "--dense-dtype", "int4"]) == 0
    return read_manifest(output)


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        verify(read_manifest(folder))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_manifest_survives_its_file(prepared: Manifest) -> None:
    write_manifest(prepared)
    assert read_manifest(prepared.folder) == prepared
    assert prepared.expert_bytes == sum(
        layer.path.stat().st_size - layer.data_offset_bytes for layer in prepared.moe_layers
    )
    assert prepared.dense_bytes == sum(t.nbytes for _, t in iterate_dense(prepared))


def test_infinite_numbers_of_a_config_survive(prepared: Manifest) -> None:
    values = {"limit": [0.0, float("inf")], "low": -float("inf"), "one": 1.5}
    prepared.config.update(values)
    write_manifest(prepared)
    again = read_manifest(prepared.folder)
    assert {key: again.config[key] for key in values} == values
    json.loads((prepared.folder / "manifest.json").read_text(), parse_constant=pytest.fail)


def test_shards_are_plain_safetensors_files(prepared: Manifest) -> None:
    for shard in prepared.dense_files:
        tensors = load_file(shard.path)
        for tensor in shard.tensors:
            assert tensors[tensor.name].dtype == tensor.dtype
            assert checksum(tensors[tensor.name].contiguous()) == tensor.checksum
    for layer in prepared.moe_layers:
        blocks = load_file(layer.path)["blocks"]
        assert blocks.shape == (layer.n_experts, layer.layout.block_bytes)
        out = torch.empty(layer.layout.block_bytes, dtype=torch.uint8)
        for expert in range(layer.n_experts):
            read_block(layer, expert, out)
            assert torch.equal(out, blocks[expert])


def test_folder_that_is_missing_or_not_prepared(prepared: Manifest, tmp_path: Path) -> None:
    assert f"{tmp_path / 'no'}, found nothing" in refused(tmp_path / "no")
    (tmp_path / "file").write_text("")
    assert "found a file" in refused(tmp_path / "file")
    source = tmp_path / "source"
    assert f'--input-path "{source}" --output-path "{source}" --hf' in refused(source)
    (source / "params.json").write_text("{}")
    assert refused(source).endswith(f'--output-path "{source}"')


def test_folder_of_another_format_version(prepared: Manifest) -> None:
    path = prepared.folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 2}))
    message = refused(prepared.folder)
    assert "format version 2" in message and "--force" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is damaged"),
        ('{"format_version": 1', "is damaged"),
        ("[1]", "is not the manifest of a prepared folder"),
        ("{}", "is not the manifest of a prepared folder"),
        ('{"format_version": 1}', "is damaged"),
        ('{"format_version": 1, "moe_layers": 3}', "is damaged"),
        ("[" * 100_000, "is damaged"),
    ],
)
def test_damaged_manifest(text: str, message: str, prepared: Manifest) -> None:
    (prepared.folder / "manifest.json").write_text(text)
    assert message in refused(prepared.folder)


def test_every_shard_must_be_there_at_its_full_size(prepared: Manifest) -> None:
    for shard in prepared.shards:
        whole = shard.path.read_bytes()
        for changed in (whole[:-1], whole + b"\0", b""):
            shard.path.write_bytes(changed)
            assert f"{shard.path} is truncated or altered" in refused(prepared.folder)
        shard.path.unlink()
        assert f"{shard.path} is missing" in refused(prepared.folder)
        shard.path.write_bytes(whole)
    verify(read_manifest(prepared.folder))


def test_a_flipped_bit_is_found_wherever_it_is(prepared: Manifest) -> None:
    """In the header, at the first and last byte of the data, in the padding between fields."""
    for shard in prepared.shards:
        whole = shard.path.read_bytes()
        start = shard.data_offset_bytes
        for position in (0, 9, start - 1, start, start + 700, len(whole) - 1):
            changed = bytearray(whole)
            changed[position] ^= 16
            shard.path.write_bytes(changed)
            assert f"{shard.path} is corrupt" in refused(prepared.folder)
        shard.path.write_bytes(whole)
    verify(read_manifest(prepared.folder))


def test_a_flipped_bit_names_the_expert_when_its_block_is_read(prepared: Manifest) -> None:
    layer = prepared.moe_layers[1]
    data = bytearray(layer.path.read_bytes())
    data[layer.block_offset_bytes(2) + 17] ^= 1
    layer.path.write_bytes(data)
    out = torch.empty(layer.layout.block_bytes, dtype=torch.uint8)
    read_block(layer, 1, out)
    with pytest.raises(UserError, match=r"experts-00001\.safetensors is corrupt.*expert 2"):
        read_block(layer, 2, out)


def test_verify_reports_every_byte(prepared: Manifest) -> None:
    seen: list[int] = []
    verify(prepared, seen.append)
    assert sum(seen) == prepared.expert_bytes + prepared.dense_bytes


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
        assert (entry.name, entry.dtype, entry.shape) == (name, dtype, shape)
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
        found = read_tensor(path, entries[name])
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
    with pytest.raises(UserError, match="contradicts itself"):
        read_header(path)


def test_an_unknown_dtype_is_named(tmp_path: Path) -> None:
    text = b'{"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}'
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(2))
    with pytest.raises(UserError, match=r"tensor a of .* has dtype F4"):
        read_header(path)


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
    with ShardWriter(path, header, size) as writer:
        writer.write(entry.offset_bytes, torch.arange(4.0))
        assert not path.exists()
    assert list(tmp_path.iterdir()) == []
    with ShardWriter(path, header, size) as writer:
        assert writer.write(entry.offset_bytes, torch.arange(4.0)) == checksum(torch.arange(4.0))
        writer.commit()
    assert torch.equal(load_file(path)["a"], torch.arange(4.0))
    assert list(tmp_path.iterdir()) == [path]
