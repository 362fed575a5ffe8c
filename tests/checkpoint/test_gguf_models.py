"""A GGUF file is the model that it was written from, whatever the architecture and the types.

The files are written by `helpers/gguf_models.py` under llama.cpp's own names; the reference is
transformers' eager model with the weights that the file's bytes stand for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from against_transformers import N_TOKENS, greedy, prepared, prompt_ids
from gguf import GGMLQuantizationType as Type
from gguf_models import with_stored_weights, write_gguf
from transformers import GraniteMoeSharedConfig, PreTrainedConfig, PreTrainedModel

from moe_offload.engine.engine import load_model

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
_LATENT = {**_WIDE_MOE, "kv_lora_rank": 32, "q_lora_rank": 32}


def granitemoeshared() -> PreTrainedConfig:
    fields = tiny_models.granitemoe(**_WIDE).to_dict()
    fields.pop("model_type")
    return GraniteMoeSharedConfig(**fields, shared_intermediate_size=32)


def phimoe() -> PreTrainedConfig:
    config = tiny_models.phimoe(hidden_size=32, intermediate_size=64)
    config.rope_parameters |= {"long_mscale": 1.25, "short_mscale": 1.25}  # a file has one
    return config


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "mixtral": lambda: tiny_models.mixtral(**_WIDE),
    "qwen2_moe": lambda: tiny_models.qwen2_moe(**_WIDE_MOE, mlp_only_layers=[]),
    "qwen3_moe": lambda: tiny_models.qwen3_moe(**_WIDE_MOE, rope_parameters=dict(_YARN)),
    "phimoe": phimoe,
    "olmoe": lambda: tiny_models.olmoe(**_WIDE),
    "deepseek_v2": lambda: tiny_models.deepseek_v2(
        **_LATENT, rope_parameters=_YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}
    ),
    "deepseek_v3": lambda: tiny_models.deepseek_v3(**_LATENT),
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
