"""A model of random weights as a GGUF file, which llama.cpp, its kin and this tool all read.

The output matrix is the embedding moved by one row, and the embedding is large beside what the
layers add: the greedy answer to a token is the next number. So every step of a decode is another
token and chooses other experts, and whoever computes wrongly stops counting.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from moe_offload.config import WEIGHT_FORMATS

# By model_type: llama.cpp's name of the architecture, transformers' of an expert's width and of
# their number.
_ARCHITECTURES: Final = {
    "mixtral": ("llama", "intermediate_size", "num_local_experts"),
    "qwen3_moe": ("qwen3moe", "moe_intermediate_size", "num_experts"),
}
_SCALE: Final = 0.02  # standard deviation of the weights; the embedding's is 1
_GROUP: Final = 32  # weights that are drawn and packed together; whole blocks of every type here
_N_GROUPS: Final = 131_071  # then they repeat; a prime, so that rows differ


def write_random_gguf(path: Path, config: dict[str, Any], kind: Type) -> None:
    """Write the model of a transformers configuration, all its matrices as `kind`, routers as F32.

    Streams: holds one tensor at a time. Always the same weights for the same arguments.
    """
    writer = gguf.GGUFWriter(path, _ARCHITECTURES[config["model_type"]][0])
    _add_fields(writer, config)
    shapes = _shapes(config)
    for name, shape in shapes.items():
        stored = _stored_as(name, kind)
        if stored == Type.F32:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * _n_values(shape))
        else:
            packed = gguf.quant_shape_to_byte_shape(shape, stored)
            n_bytes = _n_values(packed)
            writer.add_tensor_info(name, packed, np.dtype(np.uint8), n_bytes, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in _tensors(shapes, kind):
        writer.write_tensor_data(tensor)
    writer.close()


def weights_per_token(config: dict[str, Any]) -> tuple[int, int]:
    """The matrices' weights that one token is multiplied with: in all layers, and in the head."""
    experts = config["num_experts_per_tok"]
    layers = sum(
        _n_values(shape) // shape[0] * experts if "_exps" in name else _n_values(shape)
        for name, shape in _shapes(config).items()
        if name.startswith("blk.") and len(shape) > 1
    )
    return layers, config["vocab_size"] * config["hidden_size"]


def n_bytes(config: dict[str, Any], weight_format: str) -> int:
    """Of all matrices in one of our formats."""
    n_weights = sum(_n_values(shape) for shape in _shapes(config).values() if len(shape) > 1)
    return int(n_weights * WEIGHT_FORMATS[weight_format].bits_per_weight / 8)


def expert_sizes(config: dict[str, Any]) -> tuple[int, int]:
    """The number of experts of a layer, and their width."""
    _, width, experts = _ARCHITECTURES[config["model_type"]]
    return config[experts], config[width]


def _n_values(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))


def _stored_as(name: str, kind: Type) -> Type:
    return Type.F32 if "norm" in name or "ffn_gate_inp" in name else kind


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape by llama.cpp's name, the embedding first."""
    n_experts, inner = expert_sizes(config)
    hidden = config["hidden_size"]
    heads, kv_heads, head = _heads(config)
    vocabulary = config["vocab_size"], hidden
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": vocabulary}
    for layer in range(config["num_hidden_layers"]):
        named = {
            "attn_norm": (hidden,),
            "attn_q": (heads * head, hidden),
            "attn_k": (kv_heads * head, hidden),
            "attn_v": (kv_heads * head, hidden),
            "attn_output": (hidden, heads * head),
            "ffn_norm": (hidden,),
            "ffn_gate_inp": (n_experts, hidden),
            "ffn_gate_exps": (n_experts, inner, hidden),
            "ffn_up_exps": (n_experts, inner, hidden),
            "ffn_down_exps": (n_experts, hidden, inner),
        }
        if config["model_type"] == "qwen3_moe":
            named |= {"attn_q_norm": (head,), "attn_k_norm": (head,)}
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in named.items()}
    return shapes | {"output_norm.weight": (hidden,), "output.weight": vocabulary}


def _heads(config: dict[str, Any]) -> tuple[int, int, int]:
    """Attention heads, those of keys and values, and the size of each."""
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    return heads, config["num_key_value_heads"], size


def _tensors(shapes: dict[str, tuple[int, ...]], kind: Type) -> Iterator[NDArray[Any]]:
    draw = np.random.default_rng(0)
    values = draw.standard_normal((_N_GROUPS, _GROUP), np.float32)
    weights, embedding = (_packed(values * scale, kind) for scale in (_SCALE, 1.0))
    for name, shape in shapes.items():
        n_groups = _n_values(shape) // _GROUP
        if "norm" in name:
            yield np.ones(shape, np.float32)
        elif _stored_as(name, kind) == Type.F32:
            yield draw.standard_normal(shape, np.float32) * np.float32(_SCALE)
        elif name in ("token_embd.weight", "output.weight"):
            rows = np.resize(embedding, (n_groups, embedding.shape[1])).reshape(shape[0], -1)
            yield np.roll(rows, 1, axis=0) if name == "output.weight" else rows
        else:
            start = int(draw.integers(_N_GROUPS))
            packed = np.resize(np.roll(weights, start, axis=0), (n_groups, weights.shape[1]))
            yield packed.reshape(*shape[:-1], -1)


def _packed(values: NDArray[np.float32], kind: Type) -> NDArray[np.uint8]:
    return np.ascontiguousarray(gguf.quantize(values, kind)).view(np.uint8)


def _add_fields(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """What llama.cpp's converter writes, with a vocabulary of numbers."""
    n_experts, inner = expert_sizes(config)
    heads, kv_heads, head = _heads(config)
    writer.add_name("random weights")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(inner)
    writer.add_expert_count(n_experts)
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    letters = ["a", "b", "ab"]
    numbers = [f"[{number}]" for number in range(len(letters), config["vocab_size"])]
    writer.add_token_list([*letters, *numbers])
    writer.add_token_types([gguf.TokenType.NORMAL] * config["vocab_size"])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
