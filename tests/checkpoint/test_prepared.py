"""The prepared folder is read whole or refused with a sentence that names what is wrong."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file

from moe_offload.checkpoint.folders import require_prepared
from moe_offload.checkpoint.prepared import (
    Manifest,
    iterate_dense,
    read_block,
    read_manifest,
    verify,
    write_manifest,
)
from moe_offload.checkpoint.safetensors_file import checksum
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
        layer.file.stat().st_size - layer.data_offset_bytes for layer in prepared.moe_layers
    )
    assert prepared.dense_bytes == sum(t.nbytes for _, t in iterate_dense(prepared.dense))


def test_the_file_is_what_earlier_versions_wrote_and_read(prepared: Manifest) -> None:
    """Its keys are a promise: a folder of 90 GB is not prepared again for a new name."""
    data = json.loads((prepared.folder / "manifest.json").read_text())
    assert data["format_version"] == 1
    assert list(data["dense"][0]) == ["file", "bytes", "header_checksum", "tensors"]
    tensor = data["dense"][0]["tensors"][0]
    assert list(tensor) == ["name", "dtype", "shape", "offset_bytes", "checksum"]
    assert tensor["dtype"] == "bfloat16" and data["dense"][0]["file"] == "dense.safetensors"
    layer = data["moe_layers"][1]
    assert layer["file"] == "experts-00001.safetensors"
    assert set(layer) == {
        *("module", "file", "bytes", "data_offset_bytes", "n_experts", "layout"),
        *("header_checksum", "block_checksums"),
    }


def test_a_folder_of_a_version_with_fewer_fields_is_read(prepared: Manifest) -> None:
    """Its checksum is of what its manifest says: a field that came later is not damage."""
    path = prepared.folder / "manifest.json"
    data = json.loads(path.read_text())
    for layer in data["moe_layers"]:
        del layer["layout"]["scales"]
    said = {key: data[key] for key in data if key not in ("format_version", "checksum")}
    data["checksum"] = zlib.crc32(json.dumps(said, sort_keys=True).encode())
    path.write_text(json.dumps(data))
    assert read_manifest(prepared.folder).moe_layers == prepared.moe_layers
    path.write_text(json.dumps(data | {"source": "another"}))
    with pytest.raises(UserError, match="its checksum does not match"):
        read_manifest(prepared.folder)


def test_numbers_as_keys_of_a_config_survive(prepared: Manifest) -> None:
    prepared.config["id2label"] = {number: f"label {number}" for number in range(12)}
    write_manifest(prepared)
    assert len(read_manifest(prepared.folder).config["id2label"]) == 12


def test_infinite_numbers_of_a_config_survive(prepared: Manifest) -> None:
    values = {"limit": [0.0, float("inf")], "low": -float("inf"), "one": 1.5}
    prepared.config.update(values)
    write_manifest(prepared)
    again = read_manifest(prepared.folder)
    assert {key: again.config[key] for key in values} == values
    json.loads((prepared.folder / "manifest.json").read_text(), parse_constant=pytest.fail)


def test_shards_are_plain_safetensors_files(prepared: Manifest) -> None:
    for shard in prepared.dense:
        tensors = load_file(shard.file)
        for tensor in shard.tensors:
            assert tensors[tensor.name].dtype == tensor.torch_dtype
            assert checksum(tensors[tensor.name].contiguous()) == tensor.checksum
    for layer in prepared.moe_layers:
        blocks = load_file(layer.file)["blocks"]
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
        ("[1]", "found list"),
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
        whole = shard.file.read_bytes()
        for changed in (whole[:-1], whole + b"\0", b""):
            shard.file.write_bytes(changed)
            assert f"{shard.file} is truncated or altered" in refused(prepared.folder)
        shard.file.unlink()
        assert f"{shard.file} is missing" in refused(prepared.folder)
        shard.file.write_bytes(whole)
    verify(read_manifest(prepared.folder))


def test_a_flipped_bit_is_found_wherever_it_is(prepared: Manifest) -> None:
    """In the header, at the first and last byte of the data, in the padding between fields."""
    for shard in prepared.shards:
        whole = shard.file.read_bytes()
        start = shard.data_offset_bytes
        for position in (0, 9, start - 1, start, start + 700, len(whole) - 1):
            changed = bytearray(whole)
            changed[position] ^= 16
            shard.file.write_bytes(changed)
            assert f"{shard.file} is corrupt" in refused(prepared.folder)
            if position < start:  # told without reading any weight
                with pytest.raises(UserError, match="the checksum of its header"):
                    read_manifest(prepared.folder)
        shard.file.write_bytes(whole)
    verify(read_manifest(prepared.folder))


def test_a_flipped_bit_names_the_expert_when_its_block_is_read(prepared: Manifest) -> None:
    layer = prepared.moe_layers[1]
    data = bytearray(layer.file.read_bytes())
    data[layer.block_offset_bytes(2) + 17] ^= 1
    layer.file.write_bytes(data)
    out = torch.empty(layer.layout.block_bytes, dtype=torch.uint8)
    read_block(layer, 1, out)
    with pytest.raises(UserError, match=r"experts-00001\.safetensors is corrupt.*expert 2"):
        read_block(layer, 2, out)


def test_verify_reports_every_byte(prepared: Manifest) -> None:
    seen: list[int] = []
    verify(prepared, seen.append)
    assert sum(seen) == prepared.expert_bytes + prepared.dense_bytes


def test_verify_covers_every_file_of_the_folder(prepared: Manifest) -> None:
    """Configuration and tokenizer change answers as surely as weights do."""
    names = {path.name for path in prepared.folder.iterdir()}
    shards = {shard.file.name for shard in prepared.shards}
    assert prepared.files is not None and names == {*prepared.files, *shards, "manifest.json"}
    for name in prepared.files:
        path = prepared.folder / name
        whole = path.read_bytes()
        for position in (0, len(whole) // 2, len(whole) - 1):
            flipped = bytearray(whole)
            flipped[position] ^= 1
            path.write_bytes(flipped)
            assert f"{path} is corrupt" in refused(prepared.folder)
        path.unlink()
        assert f"{path} is missing" in refused(prepared.folder)
        path.write_bytes(whole)
    verify(read_manifest(prepared.folder))


def test_a_folder_of_an_earlier_version_is_verified_as_far_as_it_can_be(
    prepared: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    path = prepared.folder / "manifest.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in data.items() if k not in ("files", "checksum")}))
    capsys.readouterr()
    seen: list[int] = []
    verify(read_manifest(prepared.folder), seen.append)
    assert sum(seen) == prepared.expert_bytes + prepared.dense_bytes
    assert "only its weights are verified" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "endless"])
def test_only_regular_files_are_read(kind: str, prepared: Manifest) -> None:
    """A pipe would never end, a device may not, and a sparse file takes all memory."""
    for path in (prepared.folder / "manifest.json", prepared.shards[0].file):
        whole = path.read_bytes()
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "device":
            path.symlink_to("/dev/zero")
        else:
            path.touch()
            os.truncate(path, 1 << 40)
        message = refused(prepared.folder)
        assert str(path) in message
        if path.name == "manifest.json":  # before anything else opens it
            with pytest.raises(UserError, match="expected"):
                require_prepared(prepared.folder)
        path.rmdir() if kind == "folder" else path.unlink()
        path.write_bytes(whole)
