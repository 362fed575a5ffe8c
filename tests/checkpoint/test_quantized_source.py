"""A quantised checkpoint is read as the numbers that its bytes mean, and kept exact if it can."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantised_checkpoints
import tiny_models
import torch
from against_transformers import eager, greedy, prepared, prompt_ids
from cpu_oracle import unpack_block
from quantised_checkpoints import SOURCES, gptq
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moe_offload.checkpoint.prepared import read_block, read_manifest
from moe_offload.checkpoint.quantized_settings import read_settings
from moe_offload.checkpoint.quantized_source import dequantised
from moe_offload.checkpoint.source_files import LazyTensor, open_hugging_face
from moe_offload.commands import prepare
from moe_offload.config import Scales
from moe_offload.engine.loading import load_model


def experts_of(folder: Path) -> list[dict[str, Tensor]]:
    """Every expert's matrices in fp32, layer by layer."""
    found = []
    for layer in read_manifest(folder).moe_layers:
        for expert in range(layer.n_experts):
            block = torch.empty(layer.layout.block_bytes, dtype=torch.uint8)
            read_block(layer, expert, block)
            found.append(unpack_block(layer.layout, block))
    return found


@pytest.mark.parametrize("name", SOURCES)
def test_source(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """fp32: logits and greedy tokens of transformers' model of the dequantised weights.

    The format that is chosen holds the same numbers bit for bit, or is bf16.
    """
    source, plain = quantised_checkpoints.write(name, tmp_path)
    exact = prepared(source, tmp_path / "fp32", "--hf", "--expert-dtype", "fp32")
    theirs, ours = eager(plain, torch.float32), load_model(exact, device="cpu")
    ids = prompt_ids(theirs.config.vocab_size, 24)
    with torch.inference_mode():
        logits, found = theirs(ids).logits, ours(ids).logits
    assert (found - logits).abs().max() <= 1e-5 * logits.abs().max()
    tokens = theirs.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert greedy(ours, ids.tolist(), 8) == tokens[:, 24:].tolist()
    ours.engine.close()

    capsys.readouterr()
    chosen = prepared(source, tmp_path / "auto", "--hf")
    assert read_manifest(chosen).weight_format == SOURCES[name].becomes
    rounded = "rounded to bf16" in capsys.readouterr().err
    for kept, wanted in zip(experts_of(chosen), experts_of(exact), strict=True):
        for field, numbers in wanted.items():
            expected = numbers.bfloat16().float() if rounded and "bias" not in field else numbers
            assert torch.equal(kept[field], expected), field
    assert not rounded or SOURCES[name].becomes == "bf16"
    small = load_model(chosen, device="cpu")
    with torch.inference_mode():
        errors = (small(ids).logits - logits).norm(dim=-1) / logits.norm(dim=-1)
    assert errors.median() < 0.1  # bf16 and rounded activations; a wrong scale gives 0.5 or more
    small.engine.close()


@pytest.mark.parametrize("name", ["fp8-transposed", "gptq-act-order", "nvfp4-modelopt"])
def test_what_a_format_cannot_keep_is_rounded_as_its_plain_twin(name: str, tmp_path: Path) -> None:
    found = [
        experts_of(prepared(source, tmp_path / f"{kind}-int8", "--hf", "--expert-dtype", "int8"))
        for kind, source in zip("qp", quantised_checkpoints.write(name, tmp_path), strict=True)
    ]
    for ours, expected in zip(*found, strict=True):
        assert all(torch.equal(ours[field], expected[field]) for field in expected)


def lazy(tensor: Tensor) -> LazyTensor:
    def read_rows(start: int, stop: int) -> Tensor:
        return tensor[start:stop] if tensor.dim() else tensor

    return LazyTensor(tuple(tensor.shape), tensor.dtype, Path("model.safetensors"), read_rows)


def read(tensors: dict[str, Tensor], config: dict[str, Any], name: str) -> LazyTensor:
    found = {key: lazy(tensor) for key, tensor in tensors.items()}
    return dequantised(found, read_settings(config, "here"))[name]


@pytest.mark.parametrize("rows", [576, 160, 100])
def test_fp8_blocks_that_are_cut_off(rows: int, columns: int = 200) -> None:
    """Five scales for 576 rows and two for 160: the last blocks of 128 have 64 and 32 rows."""
    stored, numbers = quantised_checkpoints.fp8((128, 128), torch.float32, "weight_scale_inv")(
        torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    )
    assert stored["weight_scale_inv"].shape == (-(-rows // 128), -(-columns // 128))
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    found = read({f"x.{end}": part for end, part in stored.items()}, config, "x.weight")
    assert torch.equal(found.read(), numbers)
    assert torch.equal(found.read_rows(70, 90), numbers[70:90])


def test_as_transformers_dequantises() -> None:
    """Where its functions are right: MXFP4 blocks, and FP8 whose blocks divide the matrix."""
    weight = torch.randn(3, 64, 96, generator=torch.Generator().manual_seed(0))
    stored, _ = quantised_checkpoints.gpt_oss_experts(weight)
    found = read({f"x{end}": part for end, part in stored.items()}, {"quant_method": "mxfp4"}, "x")
    expected = convert_moe_packed_tensors(stored["_blocks"], stored["_scales"])
    assert found.dtype == torch.bfloat16 and found.shape == (3, 64, 96)
    assert torch.equal(found.read(), expected)
    assert torch.equal(found.read_rows(1, 2), expected[1:2])

    fp8 = quantised_checkpoints.fp8((128, 128), torch.float32, "weight_scale_inv")
    stored, _ = fp8(torch.randn(256, 384, generator=torch.Generator().manual_seed(0)))
    theirs = Fp8Dequantize(None)._dequantize_one(stored["weight"], stored["weight_scale_inv"])
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    found = read({f"x.{end}": part for end, part in stored.items()}, config, "x.weight")
    assert torch.equal(found.read(), theirs)


def test_stacked_fp8_experts() -> None:
    """Experts in one tensor, with scales for blocks, for channels, for each expert or for all."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(3, 32, 48, generator=generator).to(torch.float8_e4m3fn)
    config = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    for shape in ((3, 2, 3), (3, 32, 1), (3, 1, 48), (3,), (1,), ()):
        scale = torch.rand(shape, generator=generator)
        spread = scale.reshape(*shape, *(1,) * (3 - len(shape)))
        if shape == (3, 2, 3):
            spread = scale.repeat_interleave(16, 1).repeat_interleave(16, 2)
        names = {"e.gate_up_proj": codes, "e.gate_up_proj_scale_inv": scale}
        found = read(names, config, "e.gate_up_proj")
        assert torch.equal(found.read(), codes.float() * spread), shape
        assert torch.equal(found.read_rows(2, 3), (codes.float() * spread)[2:]), shape


def test_columns_in_the_order_of_another_matrix() -> None:
    """Groups that a `g_idx` names: GPTQ's second format, and compressed-tensors with zeros."""
    weight = torch.randn(16, 96, generator=torch.Generator().manual_seed(9))
    for version in (1, 2):
        stored, numbers = gptq(version, False, True)(weight)
        form = {"checkpoint_format": "gptq" if version == 1 else "gptq_v2"}
        config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, **form}
        found = read({f"x.{end}": part for end, part in stored.items()}, config, "x.weight")
        assert torch.equal(found.read(), numbers)
    arguments = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    config, write = quantised_checkpoints.by_compressed_tensors(
        "pack-quantized", **arguments, symmetric=False
    )
    config["config_groups"]["group_0"]["weights"]["actorder"] = "group"  # as older ones say
    order = torch.randperm(96, generator=torch.Generator().manual_seed(10))
    stored, numbers = write(weight[:, order].contiguous())
    back = order.argsort()  # columns as they were, each with its group's number
    codes = torch.stack([stored["weight_packed"] >> (4 * n) & 15 for n in range(8)], -1).flatten(1)
    packed = sum(codes[:, back].long()[:, n::8] << (4 * n) for n in range(8))
    stored |= {
        "weight_packed": torch.as_tensor(packed).to(torch.int32),
        "weight_g_idx": (torch.arange(96) // 32)[back].int(),
    }
    found = read({f"x.{end}": part for end, part in stored.items()}, config, "x.weight")
    assert torch.equal(found.read(), numbers[:, back])


@pytest.mark.parametrize("packing", ["auto_round", "auto_round:auto_gptq", "auto_round:auto_awq"])
def test_auto_round_packs_as_others_do(packing: str) -> None:
    """With 8 bits in a layer of a model of 4: `extra_config` would say so, its tensors do."""
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(5))
    writers = {"auto_round": gptq(2, False, False), "auto_round:auto_gptq": gptq(1, False, False)}
    stored, numbers = writers.get(packing, quantised_checkpoints.awq)(weight)
    config = {"quant_method": "intel/auto-round", "bits": 4, "group_size": 32, "backend": packing}
    found = read({f"x.{end}": part for end, part in stored.items()}, config, "x.weight")
    assert torch.equal(found.read(), numbers)
    if "awq" in packing:
        return
    codes = torch.randint(0, 256, (32, 64), generator=torch.Generator().manual_seed(6))
    zeros = torch.randint(1, 256, (32, 2), generator=torch.Generator().manual_seed(7))
    by_column = codes.byte().t().reshape(16, 4, 32).transpose(1, 2).contiguous()
    less = int("gptq" in packing)
    stored = {
        "x.qweight": by_column.view(torch.int32)[..., 0],
        "x.qzeros": (zeros.t() - less).byte().contiguous().view(torch.int32),
        "x.scales": torch.ones(2, 32, dtype=torch.float16),
    }
    found = read(stored, config, "x.weight")
    assert torch.equal(found.read(), (codes - zeros.repeat_interleave(32, 1)).float())


@pytest.mark.parametrize(("write", "ends"), [("mxfp4", 1), ("nvfp4", 2)])
def test_four_bit_floats_of_safetensors(write: str, ends: int, tmp_path: Path) -> None:
    """Its dtype F4 counts numbers, two to a byte, where others count bytes."""
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(8))
    if write == "nvfp4":
        stored, numbers = quantised_checkpoints.modelopt_nvfp4(weight)
    else:
        stored, numbers = quantised_checkpoints.deepseek_v4(weight, is_expert=True)
    codes = stored.pop("weight").view(torch.uint8)
    path = tmp_path / "model.safetensors"
    save_file({"x.weight": codes, **{f"x.{end}": one for end, one in stored.items()}}, path)
    size = int.from_bytes(path.read_bytes()[:8], "little")
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + size])
    header["x.weight"] |= {"dtype": "F4", "shape": [16, 64]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    settings = read_settings({"quant_method": "modelopt" if ends == 2 else "fp8"}, "here")
    found = dequantised(open_hugging_face(tmp_path), settings)["x.weight"]
    assert torch.equal(found.read().float(), numbers)


def test_scales_that_float16_does_not_hold(tmp_path: Path) -> None:
    """Of a group of zeros any scale is right; another makes all of them bf16."""
    source, _ = quantised_checkpoints.write("int4", tmp_path)
    state = load_file(source / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.3.w2"
    state[f"{name}.weight_scale"][5, 1] = 1e-9
    state[f"{name}.weight_packed"][5, 4:8] = -2004318072  # eight times 8, which is zero
    save_file(state, source / "model.safetensors")
    chosen = prepared(source, tmp_path / "zeros", "--hf")
    assert read_manifest(chosen).moe_layers[1].layout.scales is None
    state[f"{name}.weight_packed"][5, 4] += 1
    save_file(state, source / "model.safetensors")
    chosen = prepared(source, tmp_path / "tiny", "--hf")
    assert read_manifest(chosen).moe_layers[1].layout.scales == Scales("bfloat16")


def test_other_scales_are_another_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """int4 of our own rounding is not the source's int4 with zero points, nor the other way."""
    source, _ = quantised_checkpoints.write("awq", tmp_path)
    flags = ["--input-path", str(source), "--output-path", str(tmp_path / "out"), "--hf"]
    assert prepare.main([*flags, "--expert-dtype", "int4"]) == 0
    assert prepare.main(flags) == 2
    assert "is prepared in int4 with other scales" in capsys.readouterr().err
    assert prepare.main([*flags, "--force"]) == 0
    assert prepare.main([*flags, "--expert-dtype", "int4"]) == 2


def refusal(source: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    capsys.readouterr()
    paths = ["--input-path", str(source), "--output-path", str(source.parent / "out")]
    assert prepare.main([*paths, "--hf", *flags]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1, message
    return message


@pytest.mark.parametrize(
    ("name", "end", "change", "words"),
    [
        ("fp8-blocks", "_scale_inv", None, "and its scales are missing: expected"),
        ("fp8-blocks", "_scale_inv", lambda one: one[:, :1].contiguous(), "a scale for each (16"),
        (
            "fp8-blocks",
            "_scale_inv",
            lambda one: one * torch.nan,
            "scales that are infinite or not",
        ),
        ("mxfp4", "_scales", lambda one: one | 255, "scales that are infinite or not"),
        ("mxfp4", "_scales", lambda one: one[:, 1:].contiguous(), "has the wrong shape or dtype"),
        ("mxfp4", "_scales", lambda one: one[1:].contiguous(), "expected 4 experts"),
        ("awq", ".scales", lambda one: one.int(), "expected floating point"),
        ("awq", ".qzeros", lambda one: one[None], "int32 of 2 dimensions"),
        ("nvfp4", "_global_scale", None, "weight_global_scale is missing"),
        ("nvfp4-modelopt", "_scale_2", None, "weight_scale_2 is missing"),
        ("awq", ".qzeros", None, ".qzeros is missing"),
        ("awq", ".qzeros", lambda one: one[1:].contiguous(), "expected a zero for each of"),
        ("gptq", ".qweight", lambda one: one[:, 1:].contiguous(), "has the wrong shape"),
        ("gptq-act-order", "g_idx", lambda one: one + 1, "numbers of groups below"),
        ("int4", "_packed", lambda one: one[1:].contiguous(), "has the wrong shape"),
    ],
)
def test_damaged(
    name: str,
    end: str,
    change: Callable[[Tensor], Tensor] | None,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, _ = quantised_checkpoints.write(name, tmp_path)
    for path in source.glob("*.safetensors"):
        state = load_file(path)
        for key in [key for key in state if key.endswith(end)]:
            part = state.pop(key)
            if change is not None:
                state[key] = change(part)
        save_file(state, path)
    index = source / "model.safetensors.index.json"
    if change is None and index.exists():
        index.unlink()
    assert words in refusal(source, capsys)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "bitsandbytes"}, "is quantised with bitsandbytes, which is not read"),
        ({"quant_method": ["a"]}, "which is not read"),
        ("fp8", "is quantised with an unknown method"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "3 bits, format gptq"),
        ({"quant_method": "gptq", "bits": "four", "group_size": 1}, "not as gptq writes it"),
        ({"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemv"}, "version gemv"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "not as fp8 writes it"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "not as fp8 writes it"),
        ({"quant_method": "auto-round", "data_type": "mx_fp", "bits": 4}, "mx_fp, auto_round"),
        ({"quant_method": "auto-round", "packing_format": "mlx"}, "int, mlx"),
        ({"quant_method": "auto-round", "bits": 2, "group_size": 32}, "2 bits, format gptq_v2"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "format marlin-24"),
        (
            {"quant_method": "compressed-tensors", "transform_config": {"a": 1}},
            "transform_config: its activations are rotated",
        ),
        ({"quant_method": "compressed-tensors", "config_groups": [1]}, "not as compressed-tens"),
    ],
)
def test_methods_that_are_not_read(
    config: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each names what it is, and what to download instead."""
    model = tiny_models.build_model(tiny_models.mixtral())
    source = tiny_models.write_hub(model, tmp_path / "source")
    found = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**found, "quantization_config": config}))
    message = refusal(source, capsys)
    assert words in message and "download" in message


def _damaged(tensor: Tensor, rng: random.Random) -> Tensor:
    """Rows or columns less, another dimension or dtype, other bytes."""
    flat = tensor.contiguous().flatten()
    kinds = (torch.int32, torch.float32, torch.uint8, torch.int8, torch.float16)
    other = torch.randint(0, 256, (flat.nbytes,), dtype=torch.uint8)
    found: list[Callable[[], Tensor]] = [
        lambda: tensor[1:] if tensor.dim() else flat,
        lambda: tensor[:, 1:] if tensor.dim() > 1 else flat[:0],
        lambda: flat[0],
        lambda: tensor[None],
        lambda: torch.cat((tensor, tensor)) if tensor.dim() else flat,
        lambda: torch.zeros(tensor.shape, dtype=rng.choice(kinds)),
        lambda: other.view(tensor.dtype).view(tensor.shape),
    ]
    return rng.choice(found)().contiguous().clone()


@pytest.mark.nightly
@pytest.mark.parametrize("name", SOURCES)
def test_random_damage(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """40 damaged tensors of each source: prepared, or refused in a sentence (seed 1)."""
    rng = random.Random(1)
    torch.manual_seed(1)
    source, _ = quantised_checkpoints.write(name, tmp_path)
    path = sorted(source.glob("*.safetensors"))[0]
    whole = load_file(path)
    of_codes = [key for key, one in whole.items() if one.dtype != torch.float32]
    for _ in range(40):
        key = rng.choice(of_codes)
        save_file({**whole, key: _damaged(whole[key], rng)}, path)
        paths = ["--input-path", str(source), "--output-path", str(tmp_path / "out")]
        code = prepare.main([*paths, "--hf", "--force"])
        errors = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error: ")]
        assert code == (2 if errors else 0) and len(errors) <= 1
