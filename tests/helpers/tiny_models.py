"""Tiny random checkpoints of real architectures, written in every layout a user may have.

`CONFIGS[name]()` is a small config of an architecture; `build_model(config)` a random model of it,
on the CPU, whose every parameter differs from its default so that a lost bias or norm shows.
Writers: `write_hub` (the hub's original tensor names), `write_fused` (the module tree's names, as
transformers keeps them), `write_bin` (pytorch_model*.bin) and, for Mixtral, `write_native`
(Mistral's own format).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    GraniteMoeConfig,
    MixtralConfig,
    NemotronHConfig,
    OlmoeConfig,
    PhimoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.core_model_loading import revert_weight_conversion

_COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def mixtral(**changes: Any) -> MixtralConfig:
    sizes = {"intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralConfig(**{**_COMMON, **sizes, **changes})


def phimoe(**changes: Any) -> PhimoeConfig:
    """With LayerNorm and attention biases and the long-context rotary scaling of Phi-3.5-MoE."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.05, 1.1, 1.2],
        "long_factor": [1.0, 1.3, 2.5, 4.0],
        "short_mscale": 1.1,
        "long_mscale": 1.25,
        "original_max_position_embeddings": 64,
    }
    sizes = {
        "intermediate_size": 40,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "attention_bias": True,
        "lm_head_bias": True,
        "rope_parameters": rope,
    }
    return PhimoeConfig(**{**_COMMON, **sizes, **changes})


def qwen2_moe(**changes: Any) -> Qwen2MoeConfig:
    """With shared experts and a dense layer between the MoE ones."""
    sizes = {
        "num_hidden_layers": 3,
        "intermediate_size": 64,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "mlp_only_layers": [1],
    }
    return Qwen2MoeConfig(**{**_COMMON, **sizes, **changes})


def qwen3_moe(**changes: Any) -> Qwen3MoeConfig:
    sizes = {
        "intermediate_size": 64,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "head_dim": 16,
    }
    return Qwen3MoeConfig(**{**_COMMON, **sizes, **changes})


def olmoe(**changes: Any) -> OlmoeConfig:
    sizes = {"intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3, "clip_qkv": 4.0}
    return OlmoeConfig(**{**_COMMON, **sizes, **changes})


_MLA: dict[str, Any] = {
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "intermediate_size": 64,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}


def deepseek_v2(**changes: Any) -> DeepseekV2Config:
    """With latent attention, shared experts, a dense first layer and grouped routing."""
    sizes = {"topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5}
    return DeepseekV2Config(**{**_COMMON, **_MLA, **sizes, **changes})


def deepseek_v3(**changes: Any) -> DeepseekV3Config:
    """With latent attention, shared experts, a dense first layer and a corrected router."""
    return DeepseekV3Config(**{**_COMMON, **_MLA, "num_mtp_layers": 0, **changes})


def granitemoe(**changes: Any) -> GraniteMoeConfig:
    """With tied embeddings and Granite's four multipliers."""
    sizes = {
        "intermediate_size": 24,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "tie_word_embeddings": True,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.25,
    }
    return GraniteMoeConfig(**{**_COMMON, **sizes, **changes})


def gpt_oss(**changes: Any) -> GptOssConfig:
    """With biased, transposed, interleaved experts, attention sinks and a sliding window."""
    sizes = {
        "intermediate_size": 40,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "sliding_window": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "swiglu_limit": 1.5,
    }
    return GptOssConfig(**{**_COMMON, **sizes, **changes})


def nemotron_h(**changes: Any) -> NemotronHConfig:
    """With gateless experts (squared ReLU), a Mamba layer and an attention layer."""
    sizes = {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 24,
        "moe_latent_size": None,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "head_dim": 8,
        "ssm_state_size": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "chunk_size": 16,
    }
    return NemotronHConfig(**{**_COMMON, **sizes, **changes})


CONFIGS: dict[str, Callable[..., PreTrainedConfig]] = {
    config.__name__: config
    for config in (
        *(mixtral, phimoe, qwen2_moe, qwen3_moe, olmoe),
        *(deepseek_v2, deepseek_v3, granitemoe, gpt_oss),
    )
}


def build_model(
    config: PreTrainedConfig, seed: int = 0, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A model of `config` in eval mode with eager attention; every weight random, none at rest.

    Matrices have a standard deviation of 0.7 / sqrt(inputs), so that two layers neither fade nor
    blow up and the logits of different tokens differ by more than rounding.
    """
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    return randomise(model, seed)


def randomise(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Give `model` the weights that `build_model` describes; state-space layers keep their own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith(("A_log", "dt_bias", ".D")):
                continue
            if tensor.dim() >= 2:
                fan_in = 1 if "embed" in name else min(tensor.shape[-2:])
                tensor.copy_(noise * 0.7 / fan_in**0.5)
            elif name.endswith("weight"):
                tensor.copy_(1 + 0.1 * noise)
            else:
                tensor.copy_(0.1 * noise)
    model.tie_weights()
    return model.requires_grad_(False)


def write_hub(model: PreTrainedModel, folder: Path, max_shard_size: int | str = "5GB") -> Path:
    """Safetensors under the hub's original names; several shards when `max_shard_size` is small."""
    model.save_pretrained(folder, save_original_format=True, max_shard_size=max_shard_size)
    return folder


def write_fused(model: PreTrainedModel, folder: Path, max_shard_size: int | str = "5GB") -> Path:
    """Safetensors under the module tree's own names, experts fused into one tensor per layer."""
    model.save_pretrained(folder, save_original_format=False, max_shard_size=max_shard_size)
    return folder


def write_bin(model: PreTrainedModel, folder: Path, n_shards: int = 1) -> Path:
    """`pytorch_model.bin`, or shards and their index, under the hub's original names."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    state = {name: tensor.clone() for name, tensor in hub_state_dict(model).items()}
    if n_shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    names = sorted(state)
    weight_map = {}
    for position in range(n_shards):
        file = f"pytorch_model-{position + 1:05d}-of-{n_shards:05d}.bin"
        part = {name: state[name] for name in names[position::n_shards]}
        torch.save(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def hub_state_dict(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's weights under the hub's original names."""
    state = dict(model.state_dict())
    for tied in getattr(model, "all_tied_weights_keys", {}):
        state.pop(tied, None)
    return dict(revert_weight_conversion(model, state))


def native_state_dict(model: PreTrainedModel, stacked: bool = False) -> dict[str, Tensor]:
    """A Mixtral model under Mistral's names and in its rotary layout, pairs (2i, 2i+1).

    `stacked` is the first release's form: `block_sparse_moe.w1|w2|w3` [E*I, H], w2 transposed.
    """
    config = model.config
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    native: dict[str, Tensor] = {}
    names = {
        "model.embed_tokens.weight": "tok_embeddings.weight",
        "model.norm.weight": "norm.weight",
        "lm_head.weight": "output.weight",
    }
    parts = {
        "self_attn.q_proj.weight": "attention.wq.weight",
        "self_attn.k_proj.weight": "attention.wk.weight",
        "self_attn.v_proj.weight": "attention.wv.weight",
        "self_attn.o_proj.weight": "attention.wo.weight",
        "input_layernorm.weight": "attention_norm.weight",
        "post_attention_layernorm.weight": "ffn_norm.weight",
        "mlp.gate.weight": "block_sparse_moe.gate.weight"
        if stacked
        else "feed_forward.gate.weight",
    }
    for name, tensor in model.state_dict().items():
        if name in names:
            native[names[name]] = tensor.clone()
            continue
        _, _, layer, part = name.split(".", 3)
        prefix = f"layers.{layer}."
        if part in parts:
            if part.startswith(("self_attn.q", "self_attn.k")):
                halves = tensor.view(-1, 2, head_dim // 2, tensor.shape[1])
                tensor = halves.transpose(1, 2).reshape(tensor.shape)
            native[prefix + parts[part]] = tensor.clone()
            continue
        matrices = {"w2": tensor}
        if part == "mlp.experts.gate_up_proj":
            matrices = dict(zip(("w1", "w3"), tensor.chunk(2, dim=1), strict=True))
        for matrix, weights in matrices.items():
            if stacked:
                rows = weights.transpose(1, 2) if matrix == "w2" else weights
                native[f"{prefix}block_sparse_moe.{matrix}"] = rows.reshape(
                    -1, config.hidden_size
                ).clone()
                continue
            for expert, weight in enumerate(weights):
                key = f"{prefix}feed_forward.experts.{expert}.{matrix}.weight"
                native[key] = weight.clone()
    return native


def write_native(
    model: PreTrainedModel,
    folder: Path,
    stacked: bool = False,
    safetensors: bool = False,
    n_files: int = 1,
) -> Path:
    """Mistral's own folder: `params.json` and `consolidated*` files."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "head_dim": config.head_dim or config.hidden_size // config.num_attention_heads,
        "hidden_dim": config.intermediate_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "rope_theta": config.rope_parameters["rope_theta"],
        "max_seq_len": config.max_position_embeddings,
        "moe": {
            "num_experts_per_tok": config.num_experts_per_tok,
            "num_experts": config.num_local_experts,
        },
    }
    (folder / "params.json").write_text(json.dumps(params))
    state = native_state_dict(model, stacked)
    names = sorted(state)
    for position in range(n_files):
        part = {name: state[name] for name in names[position::n_files]}
        if safetensors and n_files == 1:
            save_file(part, folder / "consolidated.safetensors")
        elif safetensors:
            save_file(
                part, folder / f"consolidated-{position + 1:05d}-of-{n_files:05d}.safetensors"
            )
        else:
            torch.save(part, folder / f"consolidated.{position:02d}.pth")
    return folder


def write_mixtral_with_tokenizer(folder: Path, **changes: Any) -> Path:
    """A random Mixtral in the hub's layout with Mistral's v1 tokenizer, ready for the command line.

    The tokenizer file comes from the mistral-common package.
    """
    import mistral_common

    model = build_model(mixtral(vocab_size=32000, **changes), dtype=torch.bfloat16)
    write_hub(model, folder)
    data = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    (folder / "tokenizer.model").write_bytes(data.read_bytes())
    return folder


# A shape as shapes.yaml holds it, for runs with random weights.
TINY_SHAPE = {
    "model_type": "qwen3_moe",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
}
