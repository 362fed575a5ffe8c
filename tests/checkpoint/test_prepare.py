"""What the preprocessor stores is the source, bit for bit, whatever the architecture and layout."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import mistral_common
import pytest
import tiny_models
import torch
from prepared_weights import assert_same_experts, blocks, logical_experts
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moe_offload.checkpoint import quantization
from moe_offload.checkpoint.block import BlockLayout
from moe_offload.checkpoint.conversion import ConversionPlan, find_experts
from moe_offload.checkpoint.prepared import (
    Manifest,
    iterate_dense,
    read_manifest,
    verify,
)
from moe_offload.checkpoint.source_files import LazyTensor
from moe_offload.commands import prepare
from moe_offload.errors import UserError
from moe_offload.files import from_json

ROOT = Path(__file__).resolve().parents[2]
WRITERS: dict[str, Callable[[PreTrainedModel, Path], Path]] = {
    "hub": tiny_models.write_hub,
    "hub_sharded": lambda model, folder: tiny_models.write_hub(model, folder, "20KB"),
    "fused": tiny_models.write_fused,
    "bin": tiny_models.write_bin,
    "bin_sharded": lambda model, folder: tiny_models.write_bin(model, folder, n_shards=3),
}
ARCHITECTURES = {**tiny_models.CONFIGS, "nemotron_h": tiny_models.nemotron_h}


def prepare_folder(source: Path, output: Path, *flags: str) -> Manifest:
    assert prepare.main(["--input-path", str(source), "--output-path", str(output), *flags]) == 0
    manifest = read_manifest(output)
    verify(manifest)
    return manifest


def assert_same_dense(manifest: Manifest, model: PreTrainedModel) -> None:
    dense = dict(iterate_dense(manifest.dense))
    experts = tuple(layer.module for layer in manifest.moe_layers)
    tied = getattr(model, "all_tied_weights_keys", {})
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(experts) and name not in tied
    }
    assert dense.keys() == state.keys()
    for name, tensor in state.items():
        assert dense[name].dtype == tensor.dtype, name
        assert torch.equal(dense[name], tensor), name


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fp32_is_the_source_bit_for_bit(architecture: str, layout: str, tmp_path: Path) -> None:
    model = tiny_models.build_model(ARCHITECTURES[architecture]())
    source = WRITERS[layout](model, tmp_path / "source")
    manifest = prepare_folder(source, tmp_path / "out", "--hf", "--expert-dtype", "fp32")
    assert manifest.model_dtype == manifest.dense_format.replace("fp32", "float32") == "float32"
    assert_same_experts(manifest, model)
    assert_same_dense(manifest, model)
    again = CONFIG_MAPPING[model.config.model_type].from_dict(dict(manifest.config))
    model.config.architectures = again.architectures
    assert again.to_dict() == model.config.to_dict()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bf16_is_what_transformers_loads_in_bf16(architecture: str, tmp_path: Path) -> None:
    """Values and dtypes: routers' corrections and state-space parameters may stay in fp32."""
    model = tiny_models.build_model(ARCHITECTURES[architecture]())
    source = tiny_models.write_hub(model, tmp_path / "source")
    manifest = prepare_folder(source, tmp_path / "out", "--hf")
    loaded = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    assert (manifest.model_dtype, manifest.weight_format) == ("bfloat16", "bf16")
    assert_same_dense(manifest, loaded)
    if architecture == "gpt_oss":  # biases keep the precision of the source
        for layer in manifest.moe_layers:
            for found, wanted in zip(blocks(layer), logical_experts(model, layer), strict=True):
                assert torch.equal(found["gate_up_bias"], wanted["gate_up_bias"])
                assert torch.equal(found["gate_up"], wanted["gate_up"].bfloat16().float())
    else:
        assert_same_experts(manifest, loaded)


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss", "nemotron_h"])
def test_integer_blocks_are_the_quantised_source(
    architecture: str, weight_format: str, tmp_path: Path
) -> None:
    model = tiny_models.build_model(ARCHITECTURES[architecture]())
    source = tiny_models.write_hub(model, tmp_path / "source")
    manifest = prepare_folder(source, tmp_path / "out", "--hf", "--expert-dtype", weight_format)
    bits = {"int8": 8, "int4": 4}[weight_format]
    for layer in manifest.moe_layers:
        for found, wanted in zip(blocks(layer), logical_experts(model, layer), strict=True):
            for name in ("gate_up", "down"):
                packed, scale = quantization.quantize(wanted[name], bits)
                rows, columns = wanted[name].shape
                rounded = quantization.dequantize(packed, scale, rows, columns, bits)
                assert torch.equal(found[name], rounded)


@pytest.mark.parametrize("dense_format", ["int8", "int4"])
@pytest.mark.parametrize("architecture", ["qwen2_moe", "deepseek_v3", "granitemoe", "nemotron_h"])
def test_packed_dense_covers_attention_mlp_and_head_only(
    architecture: str, dense_format: str, tmp_path: Path
) -> None:
    model = tiny_models.build_model(ARCHITECTURES[architecture]())
    source = tiny_models.write_hub(model, tmp_path / "source")
    manifest = prepare_folder(source, tmp_path / "out", "--hf", "--dense-dtype", dense_format)
    state, dense = model.state_dict(), dict(iterate_dense(manifest.dense))
    packed = {weight.name for weight in manifest.packed_weights}
    expected = {
        "qwen2_moe": {"self_attn.q_proj", "mlp.shared_expert.up_proj", "mlp.down_proj", "lm_head"},
        "deepseek_v3": {"self_attn.kv_b_proj", "mlp.shared_experts.gate_proj", "lm_head"},
        "granitemoe": {"self_attn.o_proj"},
        "nemotron_h": {"mixer.q_proj", "mixer.shared_experts.up_proj", "lm_head"},
    }[architecture]
    for part in expected:
        assert any(name.endswith(f"{part}.weight") for name in packed), (part, packed)
    for word in ("embed", "norm", ".gate.", "router", "shared_expert_gate", "in_proj", "conv1d"):
        assert not any(word in name for name in packed), (word, packed)
    for weight in manifest.packed_weights:
        bits = {"int8": 8, "int4": 4}[dense_format]
        assert (weight.bits, (weight.n_rows, weight.n_columns)) == (bits, state[weight.name].shape)
        wanted, scale = quantization.quantize(state[weight.name], bits)
        assert torch.equal(dense[f"{weight.name}.packed"], wanted)
        assert torch.equal(dense[f"{weight.name}.scale"], scale)
        assert weight.name not in dense
    stored = {name for name in dense if not name.endswith((".packed", ".scale"))}
    rest = {
        name
        for name in state
        if ".experts." not in name
        and name not in packed
        and name not in getattr(model, "all_tied_weights_keys", {})
    }
    assert stored == rest


def test_half_precision_source(tmp_path: Path) -> None:
    model = tiny_models.build_model(tiny_models.olmoe(), dtype=torch.float16)
    source = tiny_models.write_hub(model, tmp_path / "source")
    manifest = prepare_folder(source, tmp_path / "out", "--hf")
    rounded = model.to(torch.bfloat16)
    assert_same_experts(manifest, rounded)
    assert_same_dense(manifest, rounded)


@pytest.mark.parametrize(
    "model_type",
    [
        *("aria_text", "glm4_moe", "granitemoehybrid", "jamba", "zaya"),
        *(pytest.param(name, marks=pytest.mark.nightly) for name in ("minimax_m2", "qwen3_next")),
    ],
)
def test_architectures_nobody_listed_can_be_planned(model_type: str) -> None:
    """From the hub's names at full size, on the meta device: nothing is missing or left over."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type))
    tensors = {
        name: LazyTensor(tuple(tensor.shape), tensor.dtype, Path(), lambda *_: pytest.fail("read"))
        for name, tensor in tiny_models.hub_state_dict(model).items()
    }
    plan = ConversionPlan(model, tensors)
    assert plan.unused == []
    experts = {name for module in find_experts(model) for name in module.parameters.values()}
    assert experts < set(plan.targets)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_for_terminals_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.build_model(tiny_models.mixtral())
    source = tiny_models.write_hub(model, tmp_path / "source")
    terminal, pipe = Terminal(), io.StringIO()
    for name, stream in (("terminal", terminal), ("pipe", pipe)):
        monkeypatch.setattr(sys, "stderr", stream)
        prepare_folder(source, tmp_path / name, "--hf")
    assert pipe.getvalue() == ""
    assert "preparing: 100%" in terminal.getvalue() and "B/s" in terminal.getvalue()


def test_conversions_that_mix_experts_read_the_whole_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_offload.checkpoint.conversion._keeps_experts_apart", lambda _: False)
    model = tiny_models.build_model(tiny_models.qwen3_moe())
    source = tiny_models.write_hub(model, tmp_path / "source")
    manifest = prepare_folder(source, tmp_path / "out", "--hf", "--expert-dtype", "fp32")
    assert_same_experts(manifest, model)


def test_names_without_the_base_model_prefix(tmp_path: Path) -> None:
    """As a checkpoint of the bare model has them; transformers adds the prefix."""
    model = tiny_models.build_model(tiny_models.mixtral())
    source = tiny_models.write_bin(model, tmp_path / "source")
    state = tiny_models.hub_state_dict(model)
    bare = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    torch.save(bare, source / "pytorch_model.bin")
    manifest = prepare_folder(source, tmp_path / "out", "--hf", "--expert-dtype", "fp32")
    assert_same_experts(manifest, model)
    assert_same_dense(manifest, model)


def test_files_of_older_torch_versions(tmp_path: Path) -> None:
    """Without the zip's `.format_version` record, offsets come from the zip's directory."""
    model = tiny_models.build_model(tiny_models.mixtral())
    source = tiny_models.write_bin(model, tmp_path / "source")
    path = source / "pytorch_model.bin"
    with zipfile.ZipFile(path) as whole:
        records = {name: whole.read(name) for name in whole.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as older:
        for name, data in records.items():
            if name.rpartition("/")[2] not in (".format_version", ".storage_alignment"):
                older.writestr(name, data)
    manifest = prepare_folder(source, tmp_path / "out", "--hf", "--expert-dtype", "fp32")
    assert_same_dense(manifest, model)


def test_non_contiguous_and_shared_tensors_of_a_bin_file(tmp_path: Path) -> None:
    model = tiny_models.build_model(tiny_models.mixtral())
    source = tiny_models.write_bin(model, tmp_path / "source")
    state = tiny_models.hub_state_dict(model)
    name = "model.layers.0.self_attn.q_proj.weight"
    state[name] = state[name].t().contiguous().t()
    both = torch.stack([state["model.norm.weight"], state["model.norm.weight"]])
    state["model.norm.weight"] = both[1]
    torch.save(state, source / "pytorch_model.bin")
    manifest = prepare_folder(source, tmp_path / "out", "--hf", "--expert-dtype", "fp32")
    assert_same_dense(manifest, model)


def test_a_tied_head_may_be_stored_under_either_name(tmp_path: Path) -> None:
    model = tiny_models.build_model(tiny_models.granitemoe())
    source = tiny_models.write_bin(model, tmp_path / "source")
    state = tiny_models.hub_state_dict(model)
    embedding = state.pop("model.embed_tokens.weight")
    torch.save({**state, "lm_head.weight": embedding}, source / "pytorch_model.bin")
    manifest = prepare_folder(source, tmp_path / "out", "--hf", "--expert-dtype", "fp32")
    assert_same_dense(manifest, model)


def test_blocks_and_dense_tensors_are_aligned(tmp_path: Path) -> None:
    model = tiny_models.build_model(tiny_models.deepseek_v3())
    source = tiny_models.write_hub(model, tmp_path / "source")
    manifest = prepare_folder(source, tmp_path / "out", "--hf")
    for layer in manifest.moe_layers:
        assert [layer.block_offset_bytes(e) % 4096 for e in range(layer.n_experts)] == [0] * 8
    dtypes = set()
    for shard in manifest.dense:
        for tensor in shard.tensors:
            assert tensor.offset_bytes % tensor.torch_dtype.itemsize == 0
            dtypes.add(tensor.torch_dtype)
    assert dtypes == {torch.bfloat16, torch.float32}  # the router's correction stays in fp32


def test_dense_shards_split_by_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_offload.checkpoint.writer.SHARD_BYTES", 8192)
    model = tiny_models.build_model(tiny_models.mixtral())
    source = tiny_models.write_hub(model, tmp_path / "source")
    manifest = prepare_folder(source, tmp_path / "out", "--hf", "--expert-dtype", "fp32")
    names = [shard.file.name for shard in manifest.dense]
    assert names[0] == f"dense-00001-of-{len(names):05d}.safetensors" and len(names) > 3
    assert_same_dense(manifest, model)


def test_output_in_the_input_folder_leaves_the_source_alone(tmp_path: Path) -> None:
    model = tiny_models.build_model(tiny_models.mixtral())
    folder = tiny_models.write_hub(model, tmp_path / "model", "20KB")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    manifest = prepare_folder(folder, folder, "--hf", "--expert-dtype", "fp32")
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before
    assert_same_experts(manifest, model)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_companion_files_travel(tmp_path: Path) -> None:
    model = tiny_models.build_model(tiny_models.mixtral())
    source = tiny_models.write_hub(model, tmp_path / "source")
    names = [
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer.model.v3",
        "tekken.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "chat_template.json",
        "tiktoken.model",
    ]
    for name in names:
        (source / name).write_text(json.dumps({"contents of": name}))
    tekken = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
    (source / "tekken.json").write_bytes(tekken.read_bytes())  # the one that a run would read
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    output = tmp_path / "out"
    manifest = prepare_folder(source, output, "--hf")
    for name in [*names, "config.json", "generation_config.json"]:
        assert (output / name).read_bytes() == (source / name).read_bytes()
    assert manifest.generation_config == {"eos_token_id": [2, 7]}
    assert not (output / "model.safetensors").exists()


def test_the_documented_command(tmp_path: Path) -> None:
    model = tiny_models.build_model(tiny_models.mixtral())
    folder = tiny_models.write_hub(model, tmp_path / "model")
    command = [sys.executable, str(ROOT / "weights_preprocessor.py")]
    paths = ["--input-path", str(folder), "--output-path", str(folder)]
    done = subprocess.run(
        [*command, *paths, "--hf"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"prepared {folder}") and done.stderr == ""
    assert "2 MoE layers of 4 experts in bf16" in done.stdout
    data = json.loads((folder / "manifest.json").read_text())
    assert data["format_version"] == 1 and data["source"] == str(folder)
    assert set(data["created_with"]) == {"tool", "torch", "transformers"}


def test_every_layout_gives_the_same_bytes(tmp_path: Path) -> None:
    model = tiny_models.build_model(tiny_models.qwen3_moe())
    contents = set()
    for layout, write in WRITERS.items():
        source = write(model, tmp_path / layout)
        manifest = prepare_folder(source, tmp_path / f"{layout}-out", "--hf")
        contents.add(tuple(shard.file.read_bytes() for shard in manifest.shards))
    assert len(contents) == 1


def test_layout_in_the_manifest_is_complete(tmp_path: Path) -> None:
    model = tiny_models.build_model(tiny_models.gpt_oss())
    source = tiny_models.write_hub(model, tmp_path / "source")
    prepare_folder(source, tmp_path / "out", "--hf", "--expert-dtype", "int4")
    data = json.loads((tmp_path / "out" / "manifest.json").read_text())
    layout = from_json(BlockLayout, data["moe_layers"][0]["layout"])
    assert [field.name for field in layout.fields] == [
        "gate_up",
        "gate_up_scale",
        "gate_up_bias",
        "down",
        "down_scale",
        "down_bias",
    ]


@pytest.mark.parametrize("flags", [("--expert-dtype", "int8"), ("--dense-dtype", "int4")])
def test_without_a_compiler_the_bytes_are_the_same(
    flags: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tiny_models.write_hub(tiny_models.build_model(tiny_models.mixtral()), tmp_path / "in")
    expected = prepare_folder(source, tmp_path / "kernels", "--hf", *flags)
    capsys.readouterr()

    def no_compiler(*_: object) -> NoReturn:
        raise UserError("expected a compiler, found none")

    monkeypatch.setattr("moe_offload.commands.prepare_model.load_kernels", no_compiler)
    found = prepare_folder(source, tmp_path / "torch", "--hf", *flags)
    assert "several times as long: expected a compiler, found none" in capsys.readouterr().err
    for one, other in zip(expected.shards, found.shards, strict=True):
        assert one.file.read_bytes() == other.file.read_bytes()
