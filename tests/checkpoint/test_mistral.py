"""Mistral's native folder gives the same prepared model as its Hugging Face twin."""

from __future__ import annotations

import json
from pathlib import Path

import mistral_common
import pytest
import tiny_models
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import (
    MixtralRotaryEmbedding,
    apply_rotary_pos_emb,
)

from moe_offload.checkpoint.prepared import Manifest, iterate_dense, read_manifest, verify
from moe_offload.commands import prepare

LAYOUTS = {
    "pth": {},
    "pth_sharded": {"n_files": 3},
    "safetensors": {"safetensors": True},
    "safetensors_sharded": {"safetensors": True, "n_files": 2},
    "stacked": {"stacked": True},
    "stacked_sharded": {"stacked": True, "n_files": 2},
}


def prepare_folder(source: Path, output: Path, *flags: str) -> Manifest:
    assert prepare.main(["--input-path", str(source), "--output-path", str(output), *flags]) == 0
    manifest = read_manifest(output)
    verify(manifest)
    return manifest


@pytest.mark.parametrize("layout", LAYOUTS)
def test_native_is_the_twin_of_the_hub_folder(layout: str, tmp_path: Path) -> None:
    model = tiny_models.build_model(tiny_models.mixtral(head_dim=16))
    native = tiny_models.write_native(model, tmp_path / "native", **LAYOUTS[layout])
    hub = tiny_models.write_hub(model, tmp_path / "hub")
    found = prepare_folder(native, tmp_path / "out", "--expert-dtype", "fp32")
    twin = prepare_folder(hub, tmp_path / "hub-out", "--hf", "--expert-dtype", "fp32")
    for mine, theirs in zip(found.shards, twin.shards, strict=True):
        assert mine.file.read_bytes() == theirs.file.read_bytes(), mine.file.name
    ignored = {"transformers_version", "pad_token_id", "architectures"}
    assert {key: value for key, value in found.config.items() if key not in ignored} == {
        key: value for key, value in twin.config.items() if key not in ignored
    }


def rotate_neighbours(states: Tensor, theta: float) -> Tensor:
    """Mistral's rotary embedding of [T, heads, head_dim]: complex numbers from neighbours."""
    n_tokens, _, head_dim = states.shape
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(n_tokens, dtype=torch.float32), frequencies)
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]
    pairs = torch.view_as_complex(states.reshape(*states.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * turns).flatten(2)


def test_rotary_layout_gives_the_attention_scores_of_the_native_model(tmp_path: Path) -> None:
    """wq and wk under Mistral's rotation against the prepared q_proj and k_proj under ours."""
    model = tiny_models.build_model(tiny_models.mixtral())
    native = tiny_models.native_state_dict(model)
    source = tiny_models.write_native(model, tmp_path / "native")
    dense = dict(
        iterate_dense(prepare_folder(source, tmp_path / "out", "--expert-dtype", "fp32").dense)
    )
    config = model.config
    hidden = torch.randn(11, config.hidden_size, generator=torch.Generator().manual_seed(3))
    theta = config.rope_parameters["rope_theta"]

    def heads(weight: Tensor) -> Tensor:
        return (hidden @ weight.t()).view(11, -1, 8)

    q, k = (
        rotate_neighbours(heads(native[f"layers.0.attention.{name}.weight"]), theta)
        for name in ("wq", "wk")
    )
    expected = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, dim=1))
    positions = torch.arange(11)[None]
    cos, sin = MixtralRotaryEmbedding(config)(hidden[None], positions)
    q, k = (
        heads(dense[f"model.layers.0.self_attn.{name}.weight"]).transpose(0, 1)[None]
        for name in ("q_proj", "k_proj")
    )
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    found = (q @ k.repeat_interleave(2, dim=1).transpose(2, 3))[0]
    # fp32 sums of 8 products of magnitude ~1, cos and sin computed by two routes
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_native_folder_gets_a_config_beside_the_weights(tmp_path: Path) -> None:
    model = tiny_models.build_model(tiny_models.mixtral())
    source = tiny_models.write_native(model, tmp_path / "native")
    tokenizer = (Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1").read_bytes()
    (source / "tokenizer.model.v1").write_bytes(tokenizer)
    prepare_folder(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "mixtral" and config["architectures"] == ["MixtralForCausalLM"]
    assert (tmp_path / "out" / "params.json").read_bytes() == (source / "params.json").read_bytes()
    assert (tmp_path / "out" / "tokenizer.model.v1").read_bytes() == tokenizer


def test_native_in_place(tmp_path: Path) -> None:
    model = tiny_models.build_model(tiny_models.mixtral())
    folder = tiny_models.write_native(model, tmp_path / "native")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    prepare_folder(folder, folder)
    assert {path: path.read_bytes() for path in before} == before
    assert prepare.main(["--input-path", str(folder), "--output-path", str(folder)]) == 0


def error_of(folder: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    output = folder.parent / "refused"
    assert prepare.main(["--input-path", str(folder), "--output-path", str(output), *flags]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert not (output / "manifest.json").exists()
    return message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moe": None}, "not a Mixture-of-Experts model"),
        ({"moe": {"num_experts": 4, "num_shared_experts": 1}}, "with --hf"),
        ({"q_lora_rank": 8}, "with --hf"),
        ({"dim": None}, "it finds no 'dim'"),
    ],
)
def test_params_that_cannot_be_served(
    change: dict[str, object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_models.build_model(tiny_models.mixtral())
    folder = tiny_models.write_native(model, tmp_path / "native")
    params = {**json.loads((folder / "params.json").read_text()), **change}
    params = {key: value for key, value in params.items() if value is not None}
    (folder / "params.json").write_text(json.dumps(params))
    assert message in error_of(folder, capsys)


def test_broken_native_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_models.build_model(tiny_models.mixtral())
    folder = tiny_models.write_native(model, tmp_path / "native")
    weights = folder / "consolidated.00.pth"
    whole = weights.read_bytes()
    (folder / "consolidated.01.pth").write_bytes(whole)
    assert "is in both" in error_of(folder, capsys)
    (folder / "consolidated.01.pth").unlink()
    weights.write_bytes(whole[: len(whole) // 2])
    assert f"{weights} is truncated" in error_of(folder, capsys)
    torch.save({"norm.weight": torch.ones(3)}, weights, _use_new_zipfile_serialization=False)
    assert "PyTorch 1.6" in error_of(folder, capsys)
    state = tiny_models.native_state_dict(model, stacked=True)
    state["layers.0.block_sparse_moe.w1"] = torch.ones(3, 32)
    torch.save(state, weights)
    assert "stacked experts" in error_of(folder, capsys)
    del state["layers.0.block_sparse_moe.w1"]
    torch.save(state, weights)
    assert "mlp.experts.gate_up_proj" in error_of(folder, capsys)
    weights.unlink()
    assert "holds no weights" in error_of(folder, capsys)
    (folder / "params.json").write_text("{")
    assert "params.json is damaged" in error_of(folder, capsys)


@pytest.mark.parametrize(
    ("doubled", "weight"),
    [
        ("model.norm.weight", "model.norm.weight"),
        (
            "layers.1.block_sparse_moe.gate.weight",
            "model.layers.1.block_sparse_moe.gate.weight",
        ),
        (
            "layers.0.block_sparse_moe.experts.3.w2.weight",
            "model.layers.0.block_sparse_moe.experts.3.w2.weight",
        ),
        ("layers.0.block_sparse_moe.w1", "model.layers.0.block_sparse_moe.experts.0.w1.weight"),
    ],
)
def test_a_weight_under_two_names(
    doubled: str, weight: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which of the two is the model's is not to be guessed."""
    model = tiny_models.build_model(tiny_models.mixtral())
    folder = tiny_models.write_native(model, tmp_path / "native")
    config = model.config
    stacked = torch.ones(config.num_local_experts * config.intermediate_size, config.hidden_size)
    torch.save({doubled: stacked}, folder / "consolidated.01.pth")
    assert f"is a second {weight}: " in error_of(folder, capsys)
