"""Names, shapes and settings of checkpoints as they are published, without their bytes.

No published model can be downloaded where these tests run. What their repositories say of
themselves can be written down: `config.json` and the tensors' names, dtypes and shapes, at full
width, with few layers and experts. The files here are sparse: every number is zero.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_offload.checkpoint.source import open_source

Tensors = dict[str, tuple[str, tuple[int, ...]]]
BYTES = {"F32": 4, "I32": 4, "F16": 2, "BF16": 2, "U8": 1, "F8_E4M3": 1}


def plain(name: str, *shape: int, dtype: str = "BF16") -> Tensors:
    return {f"{name}.weight": (dtype, shape)}


def fp8_blocks(dtype: str) -> Callable[..., Tensors]:
    def matrix(name: str, rows: int, columns: int) -> Tensors:
        blocks = (-(-rows // 128), -(-columns // 128))
        return {
            f"{name}.weight": ("F8_E4M3", (rows, columns)),
            f"{name}.weight_scale_inv": (dtype, blocks),
        }

    return matrix


def fp8_channels(name: str, rows: int, columns: int) -> Tensors:
    return {
        f"{name}.weight": ("F8_E4M3", (rows, columns)),
        f"{name}.weight_scale": ("BF16", (rows, 1)),
    }


def packed_int4(name: str, rows: int, columns: int) -> Tensors:
    return {
        f"{name}.weight_packed": ("I32", (rows, columns // 8)),
        f"{name}.weight_scale": ("BF16", (rows, columns // 32)),
        f"{name}.weight_shape": ("I32", (2,)),
    }


def awq(name: str, rows: int, columns: int) -> Tensors:
    return {
        f"{name}.qweight": ("I32", (columns, rows // 8)),
        f"{name}.qzeros": ("I32", (columns // 128, rows // 8)),
        f"{name}.scales": ("F16", (columns // 128, rows)),
    }


def gptq(bits: int = 4, g_idx: bool = True, bias: bool = True) -> Callable[..., Tensors]:
    """AutoGPTQ writes a bias of zeros for layers that have none; AutoRound no order of groups."""

    def matrix(name: str, rows: int, columns: int) -> Tensors:
        groups, per_word = columns // 128, 32 // bits
        return {
            f"{name}.qweight": ("I32", (columns // per_word, rows)),
            f"{name}.qzeros": ("I32", (groups, rows // per_word)),
            f"{name}.scales": ("F16", (groups, rows)),
            **({f"{name}.g_idx": ("I32", (columns,))} if g_idx else {}),
            **({f"{name}.bias": ("F16", (rows,))} if bias else {}),
        }

    return matrix


def nvfp4_modelopt(name: str, rows: int, columns: int) -> Tensors:
    return {
        f"{name}.weight": ("U8", (rows, columns // 2)),
        f"{name}.weight_scale": ("F8_E4M3", (rows, columns // 16)),
        f"{name}.weight_scale_2": ("F32", ()),
        f"{name}.input_scale": ("F32", ()),
    }


def nvfp4(name: str, rows: int, columns: int) -> Tensors:
    return {
        f"{name}.weight_packed": ("U8", (rows, columns // 2)),
        f"{name}.weight_scale": ("F8_E4M3", (rows, columns // 16)),
        f"{name}.weight_global_scale": ("F32", (1,)),
        f"{name}.input_global_scale": ("F32", (1,)),
    }


def experts(
    name: str, n: int, hidden: int, width: int, matrix: Callable[..., Tensors], names: str
) -> Tensors:
    """gate, up and down projection of each, whatever they are called."""
    gate, up, down = names.split()
    made: Tensors = {}
    for expert in range(n):
        stem = f"{name}.{expert}"
        made |= matrix(f"{stem}.{gate}", width, hidden) | matrix(f"{stem}.{up}", width, hidden)
        made |= matrix(f"{stem}.{down}", hidden, width)
    return made


PROJECTIONS = "gate_proj up_proj down_proj"
Q_K_V_O = ("q_proj", "k_proj", "v_proj", "o_proj")


def ends(vocabulary: int, hidden: int, dtype: str = "BF16") -> Tensors:
    return {
        "model.embed_tokens.weight": (dtype, (vocabulary, hidden)),
        "model.norm.weight": (dtype, (hidden,)),
        "lm_head.weight": (dtype, (vocabulary, hidden)),
    }


def norms(layer: str, hidden: int, dtype: str = "BF16") -> Tensors:
    return plain(f"{layer}.input_layernorm", hidden, dtype=dtype) | plain(
        f"{layer}.post_attention_layernorm", hidden, dtype=dtype
    )


def gpt_oss() -> Tensors:
    made = ends(201088, 2880)
    for layer in range(2):
        stem = f"model.layers.{layer}"
        rows = {"q_proj": 4096, "k_proj": 512, "v_proj": 512}
        for name, n in rows.items():
            made |= plain(f"{stem}.self_attn.{name}", n, 2880)
            made[f"{stem}.self_attn.{name}.bias"] = ("BF16", (n,))
        made |= plain(f"{stem}.self_attn.o_proj", 2880, 4096) | norms(stem, 2880)
        made[f"{stem}.self_attn.o_proj.bias"] = ("BF16", (2880,))
        made[f"{stem}.self_attn.sinks"] = ("BF16", (64,))
        made |= plain(f"{stem}.mlp.router", 4, 2880)
        made[f"{stem}.mlp.router.bias"] = ("BF16", (4,))
        for name, n in (("gate_up", 5760), ("down", 2880)):
            made[f"{stem}.mlp.experts.{name}_proj_blocks"] = ("U8", (4, n, 90, 16))
            made[f"{stem}.mlp.experts.{name}_proj_scales"] = ("U8", (4, n, 90))
            made[f"{stem}.mlp.experts.{name}_proj_bias"] = ("BF16", (4, n))
    return made


def deepseek(
    dense: Callable[..., Tensors],
    of_experts: Callable[..., Tensors],
    n_heads: int,
    vocabulary: int,
    mtp: bool,
) -> Tensors:
    """A dense layer, one with experts, and layer 61 for multi-token prediction."""
    made = ends(vocabulary, 7168)
    for layer in (0, 1, *((61,) if mtp else ())):
        stem = f"model.layers.{layer}"
        attention = f"{stem}.self_attn"
        made |= dense(f"{attention}.q_a_proj", 1536, 7168)
        made |= dense(f"{attention}.q_b_proj", 192 * n_heads, 1536)
        made |= dense(f"{attention}.kv_a_proj_with_mqa", 576, 7168)
        made |= dense(f"{attention}.kv_b_proj", 256 * n_heads, 512)
        made |= dense(f"{attention}.o_proj", 7168, 128 * n_heads)
        made |= plain(f"{attention}.q_a_layernorm", 1536) | norms(stem, 7168)
        made |= plain(f"{attention}.kv_a_layernorm", 512)
        if layer == 0:
            made |= dense(f"{stem}.mlp.gate_proj", 18432, 7168)
            made |= dense(f"{stem}.mlp.up_proj", 18432, 7168)
            made |= dense(f"{stem}.mlp.down_proj", 7168, 18432)
            continue
        made |= plain(f"{stem}.mlp.gate", 8, 7168)
        made[f"{stem}.mlp.gate.e_score_correction_bias"] = ("F32", (8,))
        made |= experts(f"{stem}.mlp.experts", 8, 7168, 2048, of_experts, PROJECTIONS)
        for name, shape in (("gate", (2048, 7168)), ("up", (2048, 7168)), ("down", (7168, 2048))):
            made |= dense(f"{stem}.mlp.shared_experts.{name}_proj", *shape)
        if layer == 61:
            made |= plain(f"{stem}.enorm", 7168) | plain(f"{stem}.hnorm", 7168)
            made |= plain(f"{stem}.eh_proj", 7168, 14336)
            made |= plain(f"{stem}.embed_tokens", vocabulary, 7168)
            made |= plain(f"{stem}.shared_head.norm", 7168)
            made |= plain(f"{stem}.shared_head.head", vocabulary, 7168)
    return made


def qwen3(matrix: Callable[..., Tensors], caches: bool = False) -> Tensors:
    made = ends(151936, 2048)
    for layer in range(2):
        stem = f"model.layers.{layer}"
        shapes = ((4096, 2048), (512, 2048), (512, 2048), (2048, 4096))
        for name, shape in zip(Q_K_V_O, shapes, strict=True):
            made |= matrix(f"{stem}.self_attn.{name}", *shape)
        made |= plain(f"{stem}.self_attn.q_norm", 128) | plain(f"{stem}.self_attn.k_norm", 128)
        made |= norms(stem, 2048) | plain(f"{stem}.mlp.gate", 4, 2048)
        made |= experts(f"{stem}.mlp.experts", 4, 2048, 768, matrix, PROJECTIONS)
        if caches:
            made[f"{stem}.self_attn.k_proj.k_scale"] = ("F32", ())
            made[f"{stem}.self_attn.v_proj.v_scale"] = ("F32", ())
    return made


def mixtral(matrix: Callable[..., Tensors]) -> Tensors:
    made = ends(32000, 4096, "F16")
    for layer in range(2):
        stem = f"model.layers.{layer}"
        shapes = ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096))
        for name, shape in zip(Q_K_V_O, shapes, strict=True):
            made |= matrix(f"{stem}.self_attn.{name}", *shape)
        made |= norms(stem, 4096, "F16")
        made |= plain(f"{stem}.block_sparse_moe.gate", 2, 4096, dtype="F16")
        made |= experts(f"{stem}.block_sparse_moe.experts", 2, 4096, 14336, matrix, "w1 w3 w2")
    return made


def mixed_auto_round(name: str, rows: int, columns: int) -> Tensors:
    """Experts in 4 bits and the rest in 8, as `extra_config` says layer by layer."""
    return gptq(4 if ".experts." in name else 8, g_idx=False, bias=False)(name, rows, columns)


GPT_OSS = {
    "model_type": "gpt_oss", "num_hidden_layers": 2, "num_local_experts": 4,
    "num_experts_per_tok": 4, "hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 201088,
    "sliding_window": 128, "swiglu_limit": 7.0, "rope_theta": 150000,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn",
        "original_max_position_embeddings": 4096, "truncate": False,
    },
}  # fmt: skip
DEEPSEEK = {
    "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 8,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
    "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_attention_heads": 128, "num_key_value_heads": 128, "vocab_size": 129280,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "num_nextn_predict_layers": 1, "scoring_func": "sigmoid",
    "topk_method": "noaux_tc", "routed_scaling_factor": 2.5, "moe_layer_freq": 1,
    "rope_theta": 10000, "max_position_embeddings": 163840, "tie_word_embeddings": False,
    "rope_scaling": {
        "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
        "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
    },
}  # fmt: skip
KIMI = DEEPSEEK | {
    "model_type": "kimi_k2", "num_attention_heads": 64, "num_key_value_heads": 64,
    "vocab_size": 163840, "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0,
}  # fmt: skip
QWEN3 = {
    "model_type": "qwen3_moe", "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 4,
    "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "head_dim": 128,
    "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 151936,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
    "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": False,
}  # fmt: skip
MIXTRAL = {
    "model_type": "mixtral", "num_hidden_layers": 2, "num_local_experts": 2,
    "num_experts_per_tok": 2, "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
    "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
}  # fmt: skip


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    """As llm-compressor writes it, with what it says of activations."""
    activations = {"dynamic": True, "num_bits": 8, "strategy": "token", "type": "float"}
    group = {
        "targets": ["Linear"],
        "weights": {"actorder": None, "block_structure": None, "dynamic": False, **weights},
        "input_activations": None if form == "pack-quantized" else activations,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


_GPTQ = {
    "quant_method": "gptq", "bits": 4, "group_size": 128, "damp_percent": 0.1, "sym": True,
    "true_sequential": True, "model_name_or_path": None, "model_file_base_name": "model",
}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """What a repository says, what `auto` makes of it, and how many tensors have no place."""

    config: dict[str, Any]
    quantization: dict[str, Any]
    tensors: Callable[[], Tensors]
    becomes: str
    n_unused: int = 0


PUBLISHED = {
    "openai/gpt-oss-20b": Published(
        GPT_OSS,
        {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
                "lm_head",
            ],
        },
        gpt_oss, "mxfp4",
    ),
    "deepseek-ai/DeepSeek-V3": Published(
        DEEPSEEK,
        {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        },
        lambda: deepseek(fp8_blocks("F32"), fp8_blocks("F32"), 128, 129280, mtp=True), "fp8",
    ),
    "moonshotai/Kimi-K2-Thinking": Published(
        KIMI,
        compressed(
            "pack-quantized", num_bits=4, type="int", strategy="group", group_size=32,
            symmetric=True, observer="minmax", observer_kwargs={},
        ),
        lambda: deepseek(plain, packed_int4, 64, 163840, mtp=False), "int4",
    ),
    "Qwen/Qwen3-30B-A3B-FP8": Published(
        QWEN3,
        {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"],
        },
        lambda: qwen3(fp8_blocks("BF16")), "fp8",
    ),
    "RedHatAI/Qwen3-30B-A3B-FP8-dynamic": Published(
        QWEN3,
        compressed(
            "float-quantized", num_bits=8, type="float", strategy="channel", symmetric=True,
            group_size=None, observer="minmax",
        ),
        lambda: qwen3(fp8_channels), "fp8",
    ),
    "RedHatAI/Qwen3-30B-A3B-NVFP4": Published(
        QWEN3,
        compressed(
            "nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group",
            group_size=16, symmetric=True, observer="minmax",
        ),
        lambda: qwen3(nvfp4), "bf16",
    ),
    "nvidia/Qwen3-30B-A3B-FP4": Published(
        QWEN3,
        {
            "quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"],
            "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
            "producer": {"name": "modelopt", "version": "0.29.0"},
        },
        lambda: qwen3(nvfp4_modelopt, caches=True), "bf16",
    ),
    "Intel/Qwen3-30B-A3B-int4-mixed-AutoRound": Published(
        QWEN3,
        {
            "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4,
            "data_type": "int", "group_size": 128, "sym": True, "iters": 200,
            "extra_config": {
                "model.layers.0.self_attn.q_proj": {"bits": 8},
                "model.layers.0.mlp.gate": {"bits": 16, "data_type": "fp"},
            },
        },
        lambda: qwen3(mixed_auto_round), "int4",
    ),
    "TheBloke/Mixtral-8x7B-Instruct-v0.1-GPTQ": Published(
        MIXTRAL, {**_GPTQ, "desc_act": True}, lambda: mixtral(gptq()), "bf16", n_unused=20,
    ),
    "TheBloke/Mixtral-8x7B-Instruct-v0.1-AWQ": Published(
        MIXTRAL,
        {
            "quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm",
            "zero_point": True, "modules_to_not_convert": ["gate"],
        },
        lambda: mixtral(awq), "int4",
    ),
}  # fmt: skip


def write_sparse(path: Path, tensors: Tensors) -> None:
    """A safetensors file that takes no room: zeros, but for a scale that divides."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + position)
        for name, field in header.items():
            if name.endswith("weight_global_scale"):
                file.seek(8 + len(text) + field["data_offsets"][0])
                file.write(struct.pack("<f", 1.0))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published(name: str, tmp_path: Path) -> None:
    """Every tensor finds its place, every place its tensor, and the experts their format."""
    published = PUBLISHED[name]
    config = published.config | {"quantization_config": published.quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_sparse(tmp_path / "model.safetensors", published.tensors())
    source = open_source(tmp_path, True, torch.bfloat16)
    assert len(source.unused) == published.n_unused
    assert source.find_format()[0] == published.becomes
