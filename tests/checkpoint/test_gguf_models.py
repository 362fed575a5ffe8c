"""A GGUF file is the model that it was written from, whatever the architecture and the types.

The files are written by `helpers/gguf_models.py` under llama.cpp's own names; the reference is
transformers' eager model with the weights that the file's bytes stand for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_models
import torch
from against_transformers import N_TOKENS, greedy, prepared, prompt_ids
from cpu_oracle import unpack_block
from gguf import GGMLQuantizationType as Type
from gguf_models import with_stored_weights, write_gguf
from plain_gguf import PLAIN, random_blocks
from refusals import refusal
from transformers import (
    Glm4MoeConfig,
    GraniteMoeSharedConfig,
    MiniMaxM2Config,
    PreTrainedConfig,
    PreTrainedModel,
)

from moe_offload.checkpoint.prepared import read_block, read_manifest
from moe_offload.engine.loading import load_model

# Rows that fill Q8_0's blocks, so that next to nothing stays F32.
_WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}
_WIDE_MOE: dict[str, Any] = {"hidden_size": 64, "moe_intermediate_size": 32}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LATENT = {**_WIDE_MOE, "kv_lora_rank": 32, "q_lora_rank": 32}


def granitemoeshared() -> PreTrainedConfig:
    fields = tiny_models.granitemoe(**_WIDE).to_dict()
    fields.pop("model_type")
    return GraniteMoeSharedConfig(**fields, shared_intermediate_size=32)


def phimoe() -> PreTrainedConfig:
    config = tiny_models.phimoe(hidden_size=32, intermediate_size=64)
    config.rope_parameters |= {"long_mscale": 1.25, "short_mscale": 1.25}  # a file has one
    return config


_PARTLY: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "num_hidden_layers": 2,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
    },
}


def glm4_moe() -> PreTrainedConfig:
    """As GLM-4.5: biases and norms of queries and keys, a dense layer, a shared expert."""
    return Glm4MoeConfig(
        **_PARTLY, intermediate_size=96, moe_intermediate_size=32, n_routed_experts=4,
        routed_scaling_factor=2.5, use_qk_norm=True, attention_bias=True,
    )  # fmt: skip


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "mixtral": lambda: tiny_models.mixtral(**_WIDE),
    "mixtral_of_llama3": lambda: tiny_models.mixtral(
        **_WIDE, max_position_embeddings=128, rope_parameters=_LLAMA3
    ),
    "qwen2_moe": lambda: tiny_models.qwen2_moe(**_WIDE_MOE, mlp_only_layers=[]),
    "qwen3_moe": lambda: tiny_models.qwen3_moe(**_WIDE_MOE, rope_parameters=dict(_YARN)),
    "phimoe": phimoe,
    "olmoe": lambda: tiny_models.olmoe(**_WIDE),
    "deepseek_v2": lambda: tiny_models.deepseek_v2(
        **_LATENT, rope_parameters=_YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}
    ),
    "deepseek_v3": lambda: tiny_models.deepseek_v3(**_LATENT),
    "glm4_moe": glm4_moe,
    "minimax_m2": lambda: MiniMaxM2Config(**_PARTLY, intermediate_size=32, num_local_experts=4),
    "gpt_oss": lambda: tiny_models.gpt_oss(
        **_WIDE, swiglu_limit=7.0, rope_parameters=_YARN | {"truncate": False}
    ),
    "granitemoe": lambda: tiny_models.granitemoe(**_WIDE),
    "granitemoeshared": granitemoeshared,
}


def assert_same_model(theirs: PreTrainedModel, folder: Path) -> None:
    """Logits as near as fp32 allows (see tests/model/test_parity.py), greedy tokens equal."""
    ours = load_model(folder, device="cpu")
    ids = prompt_ids(theirs.config.vocab_size, 24)
    with torch.inference_mode():
        expected, found = theirs(ids).logits, ours(ids).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    prompt = ids[0].tolist()
    full = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=N_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert greedy(ours, [prompt]) == [full[0, len(prompt) :].tolist()]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture(name: str, tmp_path: Path) -> None:
    model = tiny_models.build_model(CONFIGS[name]())
    stored = write_gguf(model, tmp_path / "model.gguf", Type.Q8_0)
    folder = prepared(tmp_path / "model.gguf", tmp_path / "prepared", "--expert-dtype", "fp32")
    assert_same_model(with_stored_weights(model, stored), folder)


@pytest.mark.parametrize("kind", [Type.F16, Type.BF16], ids=lambda kind: kind.name)
def test_files_that_are_not_quantised(kind: Type, tmp_path: Path) -> None:
    model = tiny_models.build_model(CONFIGS["qwen3_moe"]())
    stored = write_gguf(model, tmp_path / "model.gguf", kind)
    folder = prepared(tmp_path / "model.gguf", tmp_path / "prepared", "--expert-dtype", "fp32")
    assert_same_model(with_stored_weights(model, stored), folder)
    folder = prepared(tmp_path / "model.gguf", tmp_path / "small")
    assert read_manifest(folder).weight_format == "bf16"


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_the_experts_of_other_times(name: str, tmp_path: Path) -> None:
    """Files of before February 2024 have a tensor for each expert, some of 2026 one for two."""
    model = tiny_models.build_model(CONFIGS[name]())
    contents = []
    for experts in ("stacked", "apart", "fused"):
        write_gguf(model, tmp_path / f"{experts}.gguf", experts=experts)
        folder = prepared(tmp_path / f"{experts}.gguf", tmp_path / experts)
        contents.append([path.read_bytes() for path in sorted(folder.glob("*.safetensors"))])
    assert contents[0] == contents[1] == contents[2]


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_latent_attention_in_two_halves(name: str, tmp_path: Path) -> None:
    model = tiny_models.build_model(CONFIGS[name]())
    stored = write_gguf(model, tmp_path / "model.gguf", Type.Q8_0, split_kv_b=True)
    folder = prepared(tmp_path / "model.gguf", tmp_path / "prepared", "--expert-dtype", "fp32")
    assert_same_model(with_stored_weights(model, stored, split_kv_b=True), folder)


def test_a_mixture_of_all_types(tmp_path: Path) -> None:
    """As Q4_K_M and its kin are: types that differ from tensor to tensor."""
    model = tiny_models.build_model(
        tiny_models.mixtral(hidden_size=256, intermediate_size=256, vocab_size=64)
    )
    kinds = sorted(PLAIN, key=lambda kind: kind.name)
    used: set[Type] = set()

    def pack(values: np.ndarray, kind: Type) -> np.ndarray:
        if kind not in PLAIN:
            return gguf.quantize(values, kind)
        used.add(kind)
        blocks = random_blocks(kind, values.size // gguf.GGML_QUANT_SIZES[kind][0], len(used))
        factor = 0.05 / gguf.dequantize(blocks, kind).std()  # so that layers do not blow up
        for at in PLAIN[kind][1]:
            scales = blocks[:, at : at + 2].copy().view("<f2") * factor
            blocks[:, at : at + 2] = scales.astype("<f2").view(np.uint8)
        if kind == Type.MXFP4:
            blocks[:, 0] += np.uint8(round(math.log2(factor)) % 256)
        return blocks.reshape(*values.shape[:-1], -1)

    turn = itertools.cycle(kinds)

    def wanted(name: str) -> Type:
        return Type.F32 if "norm" in name or "gate_inp" in name else next(turn)

    stored = write_gguf(model, tmp_path / "model.gguf", wanted, pack=pack)
    assert used == set(kinds)
    folder = prepared(tmp_path / "model.gguf", tmp_path / "prepared", "--expert-dtype", "fp32")
    assert_same_model(with_stored_weights(model, stored), folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"llama.expert_count": 0}, "a model of architecture llama without experts"),
        ({"general.architecture": "grok", "grok.expert_count": 4}, "read are llama, qwen2moe"),
        ({"llama.block_count": None}, "whole number for llama.block_count in {path}, it has no"),
        ({"llama.block_count": 1 << 31}, "expected num_hidden_layers of 1 to 1000"),
        ({"llama.block_count": 1}, "no place"),
        ({"llama.attention.head_count": 0}, "expected attention heads in {path}"),
        ({"llama.expert_used_count": 9}, "expected num_experts_per_tok of 1 to 4 in {path}"),
        ({"llama.rope.freq_base": "x"}, "a number for llama.rope.freq_base"),
        ({"llama.rope.scaling.type": "new"}, "in a way that is not known here (new)"),
        ({"llama.rope.scaling.type": "longrope"}, "in a way that is not known here (longrope)"),
        (
            {"llama.attention.head_count_kv": [2, 1]},
            "a whole number for llama.attention.head_count",
        ),
    ],
)
def test_a_model_that_cannot_be(
    changes: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(tiny_models.build_model(CONFIGS["mixtral"]()), path, **changes)
    assert said.format(path=path) in refusal(capsys, path)


def test_a_model_with_more_than_it_should_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.gguf"
    model = tiny_models.build_model(CONFIGS["mixtral"]())
    write_gguf(model, path, more={"blk.0.attn_q.bias": torch.zeros(64)})
    assert "a tensor blk.0.attn_q.bias, for which transformers' model" in refusal(capsys, path)
    write_gguf(model, path, more={"rope_freqs.weight": torch.ones(7)})
    assert "8 positive numbers in rope_freqs.weight of" in refusal(capsys, path)
    write_gguf(model, path, more={"rope_freqs.weight": torch.tensor([1.0] * 7 + [0.0])})
    assert "8 positive numbers in rope_freqs.weight of" in refusal(capsys, path)
    yarn = {"llama.rope.scaling.type": "yarn"}
    write_gguf(model, path, more={"rope_freqs.weight": torch.ones(8)}, **yarn)
    assert "in a way that is not known here (yarn and rope_freqs.weight)" in refusal(capsys, path)
    factors = ("rope_factors_long.weight", "rope_factors_short.weight")
    write_gguf(model, path, more=dict.fromkeys(factors, torch.ones(8)))
    assert "in a way that is not known here (longrope)" in refusal(capsys, path)
    write_gguf(model, path, more={"blk.0.ffn_up_exps.weight": torch.zeros(4, 96, 32)})
    assert "do not fit together; download" in refusal(capsys, path)


@pytest.mark.parametrize(
    ("kind", "becomes"),
    [
        *[(Type.Q4_0, "int4"), (Type.Q4_1, "int4"), (Type.Q5_0, "int8"), (Type.Q5_1, "int8")],
        *[(Type.Q8_0, "int8"), (Type.MXFP4, "mxfp4")],
    ],
    ids=lambda one: getattr(one, "name", one),
)
def test_whole_multiples_are_kept_bit_for_bit(kind: Type, becomes: str, tmp_path: Path) -> None:
    """Also where no weight of a group is at the end of the range, as with an importance matrix."""
    model = tiny_models.build_model(CONFIGS["gpt_oss" if kind == Type.MXFP4 else "mixtral"]())

    def pack(values: np.ndarray, stored: Type) -> np.ndarray:
        if stored != kind:
            return gguf.quantize(values, stored)
        packed = random_blocks(kind, values.size // 32)
        if kind == Type.Q8_0:
            packed[:, 2:] = (packed[:, 2:].view(np.int8) // 2).view(np.uint8)
        elif kind == Type.Q4_0:
            packed[:, 2:] |= 0x11  # no code of -8
        return packed.reshape(*values.shape[:-1], -1)

    stored = write_gguf(model, tmp_path / "model.gguf", kind, pack=pack)
    manifest = read_manifest(prepared(tmp_path / "model.gguf", tmp_path / "prepared"))
    assert manifest.weight_format == becomes
    for position, layer in enumerate(manifest.moe_layers):
        parts = (
            stored[f"blk.{position}.ffn_{part}_exps.weight"] for part in ("gate", "up", "down")
        )
        for expert, (gate, up, down) in enumerate(zip(*parts, strict=True)):
            block = torch.empty(layer.layout.block_bytes, dtype=torch.uint8)
            read_block(layer, expert, block)
            found = unpack_block(layer.layout, block)
            assert torch.equal(found["gate_up"], torch.cat((gate, up)))
            assert torch.equal(found["down"], down)


def test_what_no_format_holds_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights with minima and weights without in one layer."""
    model = tiny_models.build_model(CONFIGS["mixtral"]())

    def kind(name: str) -> Type:
        return Type.Q4_1 if "ffn_down" in name else Type.Q4_0

    write_gguf(model, tmp_path / "model.gguf", kind)
    folder = prepared(tmp_path / "model.gguf", tmp_path / "prepared")
    assert read_manifest(folder).weight_format == "bf16"
    said = capsys.readouterr().err
    assert "exactly as they are (such as blk.0.ffn_down_exps.weight, Q4_1)" in said


def test_a_scale_that_is_no_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_models.build_model(CONFIGS["mixtral"]())

    def pack(values: np.ndarray, stored: Type) -> np.ndarray:
        packed = gguf.quantize(values, stored)
        if values.ndim == 3:
            packed[1, 2, :2] = np.array([np.nan], "<f2").view(np.uint8)
        return packed

    write_gguf(model, tmp_path / "in" / "model.gguf", Type.Q8_0, pack=pack)
    message = refusal(capsys, tmp_path / "in" / "model.gguf")
    assert "gate_up of expert 1 in model.layers.0.mlp.experts holds weights that are inf" in message
