"""Tiny models of transformers written as llama.cpp writes them, by its own names.

`write_gguf(model, path)` is independent of what reads it: the names, keys and layouts below are
llama.cpp's (its gguf-py and converter), spelled out by hand. `quantise` says what type a matrix is
stored in; `read_back` makes the model of what the file then holds, by plain dequantisation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor
from transformers import PreTrainedModel

ARCHITECTURES = {
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "phimoe": "phimoe",
    "olmoe": "olmoe",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "glm4_moe": "glm4moe",
    "gpt_oss": "gpt-oss",
    "granitemoe": "granitemoe",
    "granitemoeshared": "granitemoe",
    "minimax_m2": "minimax-m2",
}
_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "model.norm.bias": "output_norm.bias",
    "lm_head.weight": "output.weight",
    "lm_head.bias": "output.bias",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "mlp.gate": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp",
    "block_sparse_moe.router": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "shared_mlp.output_linear": "ffn_down_shexp",
    **{
        f"mlp.{name}.{one}_proj": f"ffn_{one}_shexp"
        for name in ("shared_expert", "shared_experts")
        for one in ("gate", "up", "down")
    },
}


def llama_cpp_tensors(model: PreTrainedModel, split_kv_b: bool = False) -> dict[str, Tensor]:
    """The model's weights by llama.cpp's names and in its layouts; experts are stacked."""
    config, made = model.config, {}
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    permuted = config.model_type in ("mixtral", "granitemoe", "granitemoeshared")
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        if name in _TOP:
            made[_TOP[name]] = tensor
            continue
        layer, part = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name).groups()
        blk = f"blk.{layer}."
        if ".experts." in part:
            made |= _experts(model, blk, part.rpartition(".experts.")[2], tensor)
        elif part == "self_attn.sinks":
            made[f"{blk}attn_sinks.weight"] = tensor
        elif part.endswith("e_score_correction_bias"):
            made[f"{blk}exp_probs_b.bias"] = tensor
        elif part == "shared_mlp.input_linear.weight":
            made[f"{blk}ffn_gate_shexp.weight"], made[f"{blk}ffn_up_shexp.weight"] = tensor.chunk(2)
        elif part == "self_attn.kv_b_proj.weight" and split_kv_b:
            heads = tensor.view(config.num_attention_heads, -1, config.kv_lora_rank)
            keys, values = heads.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
            made[f"{blk}attn_k_b.weight"] = keys.transpose(1, 2)
            made[f"{blk}attn_v_b.weight"] = values
        else:
            stem, _, end = part.rpartition(".")
            own = _LAYER[stem]
            if config.model_type in ("gpt_oss", "glm4_moe") and own == "ffn_norm":
                own = "post_attention_norm"
            if permuted and own in ("attn_q", "attn_k"):
                heads = config.num_attention_heads
                tensor = _permute(tensor, heads if own == "attn_q" else config.num_key_value_heads)
            if own == "ffn_gate_inp_shexp":
                tensor = tensor[0]
            made[f"{blk}{own}.{end}"] = tensor
    return {name: tensor.detach().float() for name, tensor in made.items()}


def _permute(weight: Tensor, heads: int) -> Tensor:
    """Rows of a head from halves (i, i + d/2) to neighbours (2i, 2i + 1)."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _experts(model: PreTrainedModel, blk: str, part: str, tensor: Tensor) -> dict[str, Tensor]:
    end = ".bias" if part.endswith("_bias") else ".weight"
    if model.config.model_type == "gpt_oss" and end == ".weight":
        tensor = tensor.transpose(1, 2)
    if part.startswith("down"):
        return {f"{blk}ffn_down_exps{end}": tensor}
    if model.config.model_type == "gpt_oss":
        gate, up = tensor[:, ::2], tensor[:, 1::2]
    else:
        gate, up = tensor.chunk(2, dim=1)
    return {f"{blk}ffn_gate_exps{end}": gate, f"{blk}ffn_up_exps{end}": up}


def metadata(model: PreTrainedModel, split_kv_b: bool = False) -> dict[str, Any]:
    """The keys that llama.cpp's converter writes for this model, without the architecture."""
    config = model.config
    kind = config.model_type
    rope = config.rope_parameters
    heads = config.num_attention_heads
    found: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": config.vocab_size,
        "expert_used_count": config.num_experts_per_tok,
        "expert_count": next(
            getattr(config, name)
            for name in ("num_local_experts", "num_experts", "n_routed_experts")
            if hasattr(config, name)
        ),
    }
    if kind in ("mixtral", "phimoe", "granitemoe", "granitemoeshared"):
        found["rope.dimension_count"] = config.hidden_size // heads
    if kind in ("glm4_moe", "minimax_m2"):
        partly = int(config.head_dim * rope["partial_rotary_factor"])
        found["rope.dimension_count"] = partly
        found["expert_gating_func"] = 2
    if kind == "minimax_m2":
        found["expert_feed_forward_length"] = config.intermediate_size
    if kind == "glm4_moe":
        found |= _shared_experts(config)
        found["nextn_predict_layers"] = 1
        found["block_count"] += 1
    if kind in ("qwen3_moe", "gpt_oss", "glm4_moe", "minimax_m2"):
        found["attention.key_length"] = found["attention.value_length"] = config.head_dim
    if kind in ("qwen2_moe", "qwen3_moe"):
        found["expert_feed_forward_length"] = config.moe_intermediate_size
    if kind == "qwen2_moe":
        found["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    if kind == "olmoe" and config.clip_qkv is not None:
        found["attention.clamp_kqv"] = float(config.clip_qkv)
    if kind == "gpt_oss":
        found["expert_feed_forward_length"] = config.intermediate_size
        found["attention.sliding_window"] = config.sliding_window
    if rope["rope_type"] == "yarn":
        found["rope.scaling.type"] = "yarn"
        found["rope.scaling.factor"] = float(rope["factor"])
        original = rope["original_max_position_embeddings"]
        found["rope.scaling.original_context_length"] = original
    if rope["rope_type"] == "longrope":
        found["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        found["rope.scaling.attn_factor"] = float(rope["long_mscale"])
    if kind.startswith("granitemoe"):
        found["attention.scale"] = float(config.attention_multiplier)
        found["embedding_scale"] = float(config.embedding_multiplier)
        found["residual_scale"] = float(config.residual_multiplier)
        found["logit_scale"] = float(config.logits_scaling)
    if kind in ("deepseek_v2", "deepseek_v3"):
        found |= _latent(config, split_kv_b)
    return found


def _shared_experts(config: Any) -> dict[str, Any]:
    return {
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_count": config.n_shared_experts,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": bool(config.norm_topk_prob),
    }


def _latent(config: Any, split_kv_b: bool) -> dict[str, Any]:
    key_length = config.qk_nope_head_dim + config.qk_rope_head_dim
    found = {
        "attention.q_lora_rank": config.q_lora_rank,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.key_length": key_length,
        "attention.value_length": config.v_head_dim,
        "rope.dimension_count": config.qk_rope_head_dim,
        **_shared_experts(config),
        "expert_group_count": config.n_group,
        "expert_group_used_count": config.topk_group,
        "expert_gating_func": 2 if config.model_type == "deepseek_v3" else 1,
    }
    if split_kv_b:
        found["attention.head_count_kv"] = 1
        found["attention.key_length"] = config.kv_lora_rank + config.qk_rope_head_dim
        found["attention.value_length"] = config.kv_lora_rank
        found["attention.key_length_mla"] = key_length
        found["attention.value_length_mla"] = config.v_head_dim
    if config.rope_parameters["rope_type"] == "yarn":
        magnitude = config.rope_parameters["mscale_all_dim"]
        found["rope.scaling.yarn_log_multiplier"] = 0.1 * magnitude
    return found


def byte_tokenizer(n_tokens: int) -> dict[str, Any]:
    """A byte-level vocabulary: three special tokens, some of GPT-2's alphabet, and a merge."""
    alphabet = [*"abcdefghijklmnopqrstuvwxyz0123456789", "\u0120", "ab"][: n_tokens - 3]
    tokens = ["<unk>", "<s>", "</s>", *alphabet]
    tokens += [f"[PAD{n}]" for n in range(len(tokens), n_tokens)]
    kinds = [3, 3, 3] + [1] * len(alphabet) + [5] * (n_tokens - 3 - len(alphabet))
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    }


def stored_type(name: str, tensor: Tensor, wanted: Type) -> Type:
    """As llama.cpp does: vectors, routers and rows that do not fit a block stay F32."""
    block = gguf.GGML_QUANT_SIZES[wanted][0]
    plain = tensor.dim() < 2 or "ffn_gate_inp" in name or tensor.shape[-1] % block
    return Type.F32 if plain else wanted


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    wanted: Type | Callable[[str], Type] = Type.F32,
    split_kv_b: bool = False,
    n_parts: int = 1,
    experts: Literal["stacked", "apart", "fused"] = "stacked",
    more: dict[str, Tensor] | None = None,
    pack: Callable[[np.ndarray, Type], np.ndarray] = gguf.quantize,
    **changes: Any,
) -> dict[str, Tensor]:
    """Write it; returns what its tensors dequantise to, by llama.cpp's names.

    `changes` are other fields, `None` for one to leave out; `more` are other tensors. Of several
    parts, `path` is the first: call it `x-00001-of-0000N.gguf`.
    """
    architecture = ARCHITECTURES[model.config.model_type]
    own = {f"{architecture}.{key}": value for key, value in metadata(model, split_kv_b).items()}
    fields = own | byte_tokenizer(model.config.vocab_size) | changes
    fields.pop("general.architecture", None)  # the writer's own
    tensors = llama_cpp_tensors(model, split_kv_b)
    rope = model.config.rope_parameters
    if rope["rope_type"] == "longrope":
        for length in ("long", "short"):
            factors = torch.tensor(rope[f"{length}_factor"])
            tensors[f"rope_factors_{length}.weight"] = factors
    if rope["rope_type"] == "llama3":
        tensors["rope_freqs.weight"] = llama3_divisors(
            rope, model.config.hidden_size // model.config.num_attention_heads
        )
    if experts != "stacked":
        tensors = _unstack(tensors) if experts == "apart" else _fuse(tensors)
    tensors |= more or {}
    stored, names = {}, list(tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    for part in range(n_parts):
        numbered = path.name.replace("-00001-of-", f"-{part + 1:05d}-of-")
        named = str(changes.get("general.architecture", architecture))
        writer = gguf.GGUFWriter(path.with_name(numbered), named)
        if n_parts > 1:
            writer.add_uint16("split.no", part)
            writer.add_uint16("split.count", n_parts)
            writer.add_int32("split.tensors.count", len(names))
        if part == 0:
            _add_fields(writer, fields)
        for name in names[part::n_parts]:
            kind = wanted if isinstance(wanted, Type) else wanted(name)
            kind = stored_type(name, tensors[name], kind)
            packed = pack(tensors[name].contiguous().numpy(), kind)
            writer.add_tensor(name, packed, raw_dtype=kind)
            stored[name] = torch.from_numpy(np.array(gguf.dequantize(packed, kind)))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return stored


def llama3_divisors(rope: dict[str, Any], head_dim: int) -> Tensor:
    """What Llama 3.1 divides each frequency by: 1 for fast ones, `factor` for slow ones."""
    found = []
    for pair in range(head_dim // 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (2 * pair / head_dim)
        turns = rope["original_max_position_embeddings"] / wavelength
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        share = min(max((turns - low) / (high - low), 0), 1)
        found.append(1 / ((1 - share) / rope["factor"] + share))
    return torch.tensor(found)


def _unstack(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    made = {}
    for name, tensor in tensors.items():
        stem, experts, end = name.partition("_exps")
        parts = enumerate(tensor) if experts else ()
        made |= {f"{stem}.{expert}{end}": part for expert, part in parts} or {name: tensor}
    return made


def _fuse(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gate and up projection in one tensor."""
    made = dict(tensors)
    for name in tensors:
        if "ffn_gate_exps" in name:
            parts = (made.pop(name), made.pop(name.replace("gate", "up")))
            made[name.replace("gate", "gate_up")] = torch.cat(parts, dim=1)
    return made


def _add_fields(writer: gguf.GGUFWriter, fields: dict[str, Any]) -> None:
    for key, value in fields.items():
        if value is None:
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def with_stored_weights(
    model: PreTrainedModel, stored: dict[str, Tensor], split_kv_b: bool = False
) -> PreTrainedModel:
    """A copy of the model with the weights that a file has after quantisation.

    `llama_cpp_tensors` only rearranges. So a copy whose weights are their own numbers, written in
    the same way, says where each stored element belongs.
    """
    copy, start = deepcopy(model), 0
    weights = {tensor.data_ptr(): tensor for tensor in copy.state_dict().values()}  # tied ones once
    with torch.no_grad():
        for tensor in weights.values():
            tensor.copy_(torch.arange(start, start + tensor.numel()).view(tensor.shape))
            start += tensor.numel()
        assert start < 1 << 24, "fp32 counts no further"
        values = torch.zeros(start)
        for name, places in llama_cpp_tensors(copy, split_kv_b).items():
            values[places.long().reshape(-1)] = stored[name].float().reshape(-1)
        for tensor in weights.values():
            tensor.copy_(values[tensor.long()])
    return copy
