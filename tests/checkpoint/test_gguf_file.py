"""GGUF files: every type decoded as its format says, split ones joined, damaged ones refused."""

from __future__ import annotations

import random
import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_models
import torch
from gguf import GGMLQuantizationType as Type
from gguf_models import write_gguf
from plain_gguf import PLAIN, random_blocks
from refusals import refusal

from moe_offload.checkpoint.folders import gguf_parts
from moe_offload.checkpoint.gguf_file import open_gguf
from moe_offload.checkpoint.source import open_source
from moe_offload.commands import prepare
from moe_offload.errors import UserError


@pytest.mark.parametrize("kind", PLAIN, ids=lambda kind: kind.name)
def test_every_type_is_read_as_its_format_says(kind: Type, tmp_path: Path) -> None:
    n_experts, n_rows, n_columns = 3, 2, 512
    size, _ = gguf.GGML_QUANT_SIZES[kind]
    blocks = random_blocks(kind, n_experts * n_rows * n_columns // size)
    expected = [PLAIN[kind][0](block.tobytes(), kind) for block in blocks]
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("w", blocks.reshape(n_experts, n_rows, -1), raw_dtype=kind)
    writer.add_tensor("plain", np.arange(6, dtype=np.float16).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = open_gguf((path,)).tensors
    found = torch.cat([tensors["w"].read_rows(expert, expert + 1) for expert in range(n_experts)])
    assert found.shape == tensors["w"].shape == (n_experts, n_rows, n_columns)
    assert torch.equal(found, tensors["w"].read())
    wanted = torch.tensor(expected, dtype=torch.float64).view(found.shape).float()
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert tensors["plain"].dtype == torch.float16
    assert tensors["plain"].read().tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    model = tiny_models.build_model(tiny_models.mixtral(intermediate_size=64))
    write_gguf(model, tmp_path / "in" / "m.gguf", Type.Q8_0)
    return tmp_path / "in" / "m.gguf"


def contents(folder: Path) -> dict[str, bytes]:
    skipped = "manifest.json"  # it names its source
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != skipped}


def run(source: Path, output: Path) -> dict[str, bytes]:
    assert prepare.main(["--input-path", str(source), "--output-path", str(output)]) == 0
    return contents(output)


def test_a_split_model_is_the_same_model(
    model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(model_file, tmp_path / "whole")
    split = tmp_path / "split"
    model = tiny_models.build_model(tiny_models.mixtral(intermediate_size=64))
    write_gguf(model, split / "m-00001-of-00003.gguf", Type.Q8_0, n_parts=3)
    names = [f"m-0000{part}-of-00003.gguf" for part in (1, 2, 3)]
    assert [path.name for path in gguf_parts(split / names[1])] == names
    assert run(split, tmp_path / "from_folder") == whole
    assert run(split / names[2], tmp_path / "from_a_part") == whole

    (split / "other.gguf").write_bytes(b"GGUF")
    assert "holds 2 GGUF models, such as" in refusal(capsys, split, output=tmp_path / "out")
    (split / "other.gguf").unlink()
    second = (split / names[1]).rename(tmp_path / "second")
    assert f"{names[1]} is missing: expected 3 parts" in refusal(capsys, split)
    (split / names[1]).write_bytes((split / names[2]).read_bytes())
    assert "says it is part 2 of 3, expected part 1 of 3" in refusal(capsys, split)
    second.rename(split / names[1])
    assert run(split, tmp_path / "again") == whole


def test_beside_its_prepared_folder(model_file: Path) -> None:
    """Input and output in one folder: nothing that was there changes."""
    before = contents(model_file.parent)
    (model_file.parent / "tokenizer_config.json").write_text("{}")
    after = run(model_file, model_file.parent)
    assert {name: after[name] for name in before} == before
    assert after["tokenizer_config.json"] == b"{}" and "tokenizer.json" in after


def header(n_tensors: int, n_fields: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_fields) + rest


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


HUGE = 1 << 60
DAMAGED = {
    "no GGUF": (b"PK\3\4" + bytes(100), "it begins with b'PK"),
    "empty": (b"", "it begins with b''"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "it has version 1"),
    "2^60 tensors": (header(HUGE, 0), f"it claims {HUGE} tensors"),
    "2^60 fields": (header(0, HUGE), f"it claims {HUGE} fields"),
    "a text of 2^60 bytes": (header(0, 1, struct.pack("<Q", HUGE)), "its header goes on after"),
    "2^60 entries": (
        header(0, 1, text("a") + struct.pack("<IIQ", 9, 0, HUGE)),
        f"it claims {HUGE} entries in an array",
    ),
    "arrays in arrays": (
        header(0, 1, text("a") + struct.pack("<IIQ", 9, 9, 1) * 100),
        "an array of the unknown type 9",
    ),
    "an unknown field": (header(0, 1, text("a") + struct.pack("<I", 77)), "the unknown type 77"),
    "a field twice": (header(0, 2, (text("a") + struct.pack("<IB", 0, 1)) * 2), "field a twice"),
    "2^31 dimensions": (
        header(1, 0, text("t") + struct.pack("<I", 1 << 31)),
        f"it claims {1 << 31} dimensions in t",
    ),
    "2^120 elements": (
        header(1, 0, text("t") + struct.pack("<IQQIQ", 2, HUGE, HUGE, 0, 0)),
        "its tensor t ends at byte",
    ),
    "no elements": (
        header(1, 0, text("t") + struct.pack("<IQIQ", 1, 0, 0, 0)),
        "its tensor t of type F32 has shape (0,)",
    ),
    "half a block": (
        header(1, 0, text("t") + struct.pack("<IQIQ", 1, 48, 8, 0) + bytes(999)),
        "its tensor t of type Q8_0 has shape (48,)",
    ),
    "a tensor twice": (
        header(2, 0, (text("t") + struct.pack("<IQIQ", 1, 1, 0, 0)) * 2 + bytes(999)),
        "it has the tensor t twice",
    ),
    "an unknown type": (
        header(1, 0, text("t") + struct.pack("<IQIQ", 1, 32, 250, 0) + bytes(999)),
        "tensor t in {path} is of type 250, which is not known here",
    ),
    "a type without numbers": (
        header(1, 0, text("t") + struct.pack("<IQIQ", 1, 32, 27, 0) + bytes(999)),
        "is of type I64, which is not known here",
    ),
    "an alignment of nothing": (
        header(0, 1, text("general.alignment") + struct.pack("<II", 4, 0)),
        "its alignment is 0",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_header_is_one_sentence(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, said = DAMAGED[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    assert said.format(path=path) in refusal(capsys, path)
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


def test_a_truncated_file(model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = model_file.read_bytes()
    for n_bytes in (len(whole) - 40, len(whole) // 2, 3000, 30):
        model_file.write_bytes(whole[:n_bytes])
        assert "m.gguf is truncated, damaged or no GGUF file" in refusal(capsys, model_file)


def test_a_tensor_in_two_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_models.build_model(tiny_models.mixtral())
    first = tmp_path / "in" / "m-00001-of-00002.gguf"
    write_gguf(model, first, n_parts=2)
    for part in (0, 1):
        path = tmp_path / "in" / f"m-0000{part + 1}-of-00002.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_uint16("split.no", part)
        writer.add_uint16("split.count", 2)
        writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    assert "tensor token_embd.weight is in both" in refusal(capsys, first)


@pytest.mark.parametrize("n_cases", [40, pytest.param(4000, marks=pytest.mark.nightly)])
def test_any_damage_is_a_sentence_or_harmless(n_cases: int, model_file: Path) -> None:
    """A header with bytes changed, cut out or repeated is refused, or is another valid one."""
    whole = model_file.read_bytes()
    reader = gguf.GGUFReader(model_file)
    end = min(tensor.data_offset for tensor in reader.tensors)
    del reader
    chance = random.Random(19)
    n_refused = 0
    for _ in range(n_cases):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 1, 2, 4, 16))):
            at = chance.randrange(end)
            length = chance.choice((1, 1, 1, 4, 8))
            change = chance.randrange(4)
            if change == 0:
                del data[at : at + length]
            elif change == 1:
                data[at:at] = data[at : at + length]
            else:
                data[at : at + length] = chance.randbytes(length)
        model_file.write_bytes(data)
        try:
            open_source(model_file, False, torch.bfloat16)
        except UserError as error:
            n_refused += 1
            assert "\n" not in str(error)
    assert n_refused > n_cases // 4
