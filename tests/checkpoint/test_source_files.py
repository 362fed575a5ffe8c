"""Where each weight of a checkpoint's files lies, against torch.load and safetensors."""

from __future__ import annotations

import io
import json
import os
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.serialization import config as serialization_config

from moe_offload.checkpoint.source_files import (
    LazyTensor,
    open_hugging_face,
    open_mistral_native,
)
from moe_offload.errors import UserError


@pytest.fixture
def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    base, big = torch.randn(1000).bfloat16(), torch.randn(64, 64)
    return {
        "odd": torch.randn(3).bfloat16(),
        "empty": torch.empty(0),
        "matrix": torch.randn(5, 7),
        "view": base[10:20],
        "rest": base[500:],
        "whole": base,
        "transposed": big.t(),
        "rows": big[3:9],
        "strided": big[::2],
        "columns": big[:, 1:3],
        "scalar": torch.tensor(1.5),
        "counts": torch.arange(9),
        "flags": torch.tensor([True, False]),
        "half": torch.randn(33).half(),
        "double": torch.randn(3).double(),
        "parameter": torch.nn.Parameter(torch.randn(4)),
        "again": base,
    }


def read_bin(path: Path) -> dict[str, LazyTensor]:
    return open_hugging_face(path.parent)


def assert_same(found: dict[str, LazyTensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        read = found[name].read()
        assert read.dtype == tensor.dtype and torch.equal(read, tensor.detach()), name
        if tensor.dim() and len(tensor) > 2:
            assert torch.equal(found[name].read_rows(1, 3), tensor.detach()[1:3]), name


def zipped_again(path: Path, state: dict[str, Tensor], **how: Any) -> None:
    """The file of torch.save as another zip program may write it again."""
    saved = io.BytesIO()
    torch.save(state, saved)
    change: Callable[[str, bytes], bytes | None] = how.get("change", lambda _, data: data)
    with zipfile.ZipFile(saved) as source, path.open("wb") as file:
        file.write(how.get("prefix", b""))
        with zipfile.ZipFile(file, "w", how.get("method", zipfile.ZIP_STORED)) as target:
            for info in sorted(source.infolist(), key=how.get("order", lambda _: 0)):
                data = change(info.filename, source.read(info))
                if data is not None:
                    target.writestr(info.filename, data)
            target.comment = how.get("comment", b"")


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"order": lambda info: info.filename[::-1]},
        {"comment": b"x" * 60_000},
        {"prefix": b"#!/bin/sh" + b" " * 91},
        {"change": lambda name, data: None if name.endswith(".format_version") else data},
        {"change": lambda name, data: None if name.endswith("byteorder") else data},
    ],
    ids=["as it was", "reversed", "comment", "prefix", "no version", "no byte order"],
)
def test_a_file_zipped_again_is_read_where_its_directory_says(
    how: dict[str, Any], state: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "pytorch_model.bin"
    zipped_again(path, state, **how)
    assert_same(read_bin(path), state)
    if "prefix" not in how:  # torch.load does not look behind one
        loaded = torch.load(path, weights_only=True)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize("alignment", [1, 64, 4096])
def test_what_torch_saves(
    alignment: int,
    checksums: bool,
    state: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    path = tmp_path / "pytorch_model.bin"
    extra = {"nested": {"x": torch.ones(3)}, "n": 5}  # left out: not one tensor by its name
    options = {"save.storage_alignment": alignment, "save.compute_crc32": checksums}
    with serialization_config.patch(options):
        torch.save({**state, **extra}, path)
    assert_same(read_bin(path), state)


@pytest.mark.parametrize("step", [101, pytest.param(1, marks=pytest.mark.nightly)])
def test_a_flipped_bit_is_found_or_means_nothing(step: int, tmp_path: Path) -> None:
    """Any bit of the zip, the pickle and the weights; torch.load would find few of them."""
    state = {"norm": torch.randn(9).bfloat16(), "matrix": torch.randn(5, 7)}
    path = tmp_path / "pytorch_model.bin"
    torch.save(state, path)
    whole = path.read_bytes()
    n_found = 0
    for bit in range(0, len(whole) * 8, step):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            assert_same(read_bin(path), state)
        except UserError:
            n_found += 1
    assert n_found > len(whole) * 8 // step // 5


def cut(end: str, keep: slice) -> Callable[[str, bytes], bytes]:
    return lambda name, data: data[keep] if name.endswith(end) else data


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"method": zipfile.ZIP_DEFLATED}, "is compressed or not"),
        ({"change": cut("/data/0", slice(2))}, "is compressed or not"),
        ({"change": lambda n, d: None if n.endswith("/data/0") else d}, "data/0"),
        ({"change": lambda n, d: b"big" if n.endswith("byteorder") else d}, "byte order is b'big'"),
        ({"change": lambda n, d: None if n.endswith("data.pkl") else d}, "expected one data.pkl"),
        ({"change": lambda n, d: d[:-9] if n.endswith("data.pkl") else d}, "is damaged or holds"),
    ],
)
def test_a_zip_that_contradicts_itself(
    how: dict[str, Any], message: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "pytorch_model.bin"
    zipped_again(path, state, **how)
    with pytest.raises(UserError) as refused:
        read_bin(path)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_record_that_is_not_where_the_directory_says(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(state, path)
    with zipfile.ZipFile(path) as archive:
        place = next(i.header_offset for i in archive.infolist() if i.filename.endswith("data/0"))
    data = bytearray(path.read_bytes())
    data[place + 31] ^= 1  # its name
    path.write_bytes(data)
    with pytest.raises(UserError, match="does not lie where"):
        read_bin(path)


def test_a_tensor_larger_than_its_record(tmp_path: Path) -> None:
    """The pickle says how many elements; the record's length says how many there are."""
    path = tmp_path / "pytorch_model.bin"
    grown = lambda n, d: d.replace(b"K\x04", b"K\x40") if n.endswith("data.pkl") else d  # noqa: E731
    zipped_again(path, {"a": torch.ones(4)}, change=grown)
    with pytest.raises(UserError, match=r"is damaged or holds|larger than its record"):
        read_bin(path)


def test_a_zip_bomb_takes_no_memory(tmp_path: Path) -> None:
    """300 MB of zeros are 300 kB in a zip; as many GB would be a few MB."""
    path = tmp_path / "pytorch_model.bin"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("archive/data.pkl", "w", force_zip64=True) as record,
    ):
        for _ in range(300):
            record.write(bytes(1 << 20))
    tracemalloc.start()
    with pytest.raises(UserError, match=r"data\.pkl has 314572800 bytes, expected at most"):
        read_bin(path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 50e6


class Harmful:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_runs_nothing(name: str, zipped: bool, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    saved = {"a": Harmful(marker)}
    torch.save(saved, tmp_path / name, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError):
        (open_hugging_face if name.startswith("py") else open_mistral_native)(tmp_path)
    assert not marker.exists()


def write_sharded(folder: Path, shards: dict[str, dict[str, Tensor]], **places: str) -> None:
    """Shards with an index, in which `places` are named otherwise than where they are."""
    weight_map = {name: file for file, part in shards.items() for name in part}
    for file, part in shards.items():
        save_file({name: tensor.clone() for name, tensor in part.items()}, folder / file)
    weight_map = {name: file for name, file in (weight_map | places).items() if file}
    index = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)


def values(tensors: dict[str, LazyTensor]) -> dict[str, list[float]]:
    return {name: tensor.read().tolist() for name, tensor in tensors.items()}


OLD, NEW = torch.zeros(2), torch.ones(2)


def test_a_merged_file_goes_before_an_index_that_was_left_behind(tmp_path: Path) -> None:
    """transformers' order; the other one would prepare the old weights without a word."""
    write_sharded(tmp_path, {"model-1.safetensors": {"a": OLD}})
    save_file({"a": NEW}, tmp_path / "model.safetensors")
    torch.save({"a": OLD}, tmp_path / "pytorch_model.bin")
    assert values(open_hugging_face(tmp_path)) == {"a": [1, 1]}
    (tmp_path / "model-1.safetensors").unlink()
    assert values(open_hugging_face(tmp_path)) == {"a": [1, 1]}


def test_a_tensor_in_two_files_is_the_one_that_the_index_names(tmp_path: Path) -> None:
    one, two = "model-1.safetensors", "model-2.safetensors"
    shards = {one: {"a": NEW}, two: {"a": OLD, "b": NEW}}
    write_sharded(tmp_path, shards, a=one)
    assert values(open_hugging_face(tmp_path)) == {"a": [1, 1], "b": [1, 1]}
    write_sharded(tmp_path, shards, a=two)
    assert values(open_hugging_face(tmp_path)) == {"a": [0, 0], "b": [1, 1]}
    write_sharded(tmp_path, {**shards, one: {"a": NEW, "c": NEW}}, a="")
    with pytest.raises(UserError, match="tensor a is in both"):
        open_hugging_face(tmp_path)


def test_an_index_may_lack_what_a_file_holds(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"model-1.safetensors": {"a": NEW, "b": OLD}}, b="")
    assert values(open_hugging_face(tmp_path)) == {"a": [1, 1], "b": [0, 0]}


@pytest.mark.parametrize("place", ["../other/model.safetensors", "/dev/zero", "a/../../b"])
def test_an_index_does_not_lead_out_of_its_folder(place: str, tmp_path: Path) -> None:
    write_sharded(tmp_path, {"model-1.safetensors": {"a": NEW}}, a=place)
    with pytest.raises(UserError, match="expected the name of a file in its folder"):
        open_hugging_face(tmp_path)


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 3}, {"a": []}, {"a": ""}, {"a": "."}])
def test_an_index_that_makes_no_sense(weight_map: object, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError):
        open_hugging_face(tmp_path)


def test_links_into_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    """As huggingface_hub lays out a download: names in snapshots/, contents in blobs/."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    write_sharded(snapshot, {"model-1.safetensors": {"a": NEW}})
    for path in list(snapshot.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(Path("..", "..", "blobs", path.name))
    assert values(open_hugging_face(snapshot)) == {"a": [1, 1]}


def test_tensors_of_a_dtype_that_nobody_needs(tmp_path: Path) -> None:
    extra = {"counter": torch.zeros(3, dtype=torch.uint32), "c": torch.zeros(3, dtype=torch.cfloat)}
    save_file({"a": NEW, **extra}, tmp_path / "model.safetensors")
    assert open_hugging_face(tmp_path)["a"].read().tolist() == [1, 1]


F32 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("header", "n_bytes"),
    [
        ({"a": F32, "b": F32}, 16),
        ({"a": F32, "b": {**F32, "data_offsets": [8, 24]}}, 24),
        ({"a": F32, "b": {**F32, "data_offsets": [32, 48]}}, 48),
        ({"a": F32}, 20),
        ({"a": F32}, 12),
        ({"a": {**F32, "shape": [4.0]}}, 16),
        ({"a": {**F32, "shape": ["4"]}}, 16),
        ({"a": {**F32, "data_offsets": ["0", "16"]}}, 16),
        ({"a": {**F32, "dtype": "X8"}}, 16),
        ({"a": F32, "__metadata__": 5}, 16),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 16),
        (b"{\xff}", 0),
    ],
)
def test_headers_that_the_safetensors_package_refuses(
    header: object, n_bytes: int, tmp_path: Path
) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    data = struct.pack("<Q", len(text)) + text + bytes(n_bytes)
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="truncated, damaged or no safetensors file"):
        open_hugging_face(tmp_path)
