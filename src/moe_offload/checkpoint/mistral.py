"""The names and layouts of Mistral's native checkpoint format, for Mixtral.

It differs from the hub's in three ways. Names: the table below. Rotary embedding: it rotates the
neighbours (2i, 2i + 1) of a head where transformers rotates (i, i + head_dim / 2), so the rows of
wq and wk are sorted apart. Experts: the first release stacks them, `block_sparse_moe.w1|w2|w3`
[E*I, H] with w2 transposed; later ones have one tensor each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from torch import Tensor
from transformers import MixtralConfig

from moe_offload.checkpoint.source_files import LazyTensor
from moe_offload.errors import UserError

_TOP_NAMES: Final = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES: Final = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.gate.weight": "block_sparse_moe.gate.weight",
    "block_sparse_moe.gate.weight": "block_sparse_moe.gate.weight",
}
_LAYER: Final = re.compile(r"layers\.(\d+)\.(.+)")
_EXPERT: Final = re.compile(r"(?:feed_forward|block_sparse_moe)\.experts\.(\d+)\.(w[123])\.weight")
_STACKED: Final = re.compile(r"block_sparse_moe\.(w[123])(?:\.weight)?")


def to_hub_tensors(tensors: dict[str, LazyTensor], config: MixtralConfig) -> dict[str, LazyTensor]:
    """The same checkpoint under the hub's names, in the hub's layout, still unread.

    UserError for a weight that is there twice, under two of its names.
    """
    renamed: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        for hub_name, converted in _to_hub(name, tensor, config):
            if hub_name in renamed:
                raise UserError(
                    f"tensor {name} in {tensor.path} is a second {hub_name}: expected each weight "
                    "under one name; download the model again"
                )
            renamed[hub_name] = converted
    return renamed


def _to_hub(
    name: str, tensor: LazyTensor, config: MixtralConfig
) -> Iterator[tuple[str, LazyTensor]]:
    match = _LAYER.fullmatch(name)
    if match is None:
        yield _TOP_NAMES.get(name, name), tensor
        return
    layer, part = f"model.layers.{match[1]}.", match[2]
    if expert := _EXPERT.fullmatch(part):
        yield f"{layer}block_sparse_moe.experts.{expert[1]}.{expert[2]}.weight", tensor
    elif stacked := _STACKED.fullmatch(part):
        for position, weight in enumerate(_unstack(tensor, config, stacked[1] == "w2")):
            yield f"{layer}block_sparse_moe.experts.{position}.{stacked[1]}.weight", weight
    elif part in ("attention.wq.weight", "attention.wk.weight"):
        yield layer + _LAYER_NAMES[part], _to_half_rotation(tensor, config.head_dim)
    else:
        yield layer + _LAYER_NAMES.get(part, part), tensor


def _unstack(tensor: LazyTensor, config: MixtralConfig, transposed: bool) -> Iterator[LazyTensor]:
    rows, hidden_size = config.intermediate_size, config.hidden_size
    n_experts: int = config.num_local_experts
    if tensor.shape != (n_experts * rows, hidden_size):
        raise UserError(
            f"the stacked experts in {tensor.path} have shape {tensor.shape}, params.json promises "
            f"{(n_experts * rows, hidden_size)}; download both again"
        )
    for expert in range(n_experts):
        yield _rows(tensor, expert * rows, rows, transposed)


def _rows(tensor: LazyTensor, first: int, n_rows: int, transposed: bool) -> LazyTensor:
    """Rows [first, first + n_rows) of a matrix, on request transposed."""
    n_columns = tensor.shape[1]

    def read_rows(start: int, stop: int) -> Tensor:
        if not transposed:
            return tensor.read_rows(first + start, first + stop)
        return tensor.read_rows(first, first + n_rows).t()[start:stop].contiguous()

    shape = (n_columns, n_rows) if transposed else (n_rows, n_columns)
    return replace(tensor, shape=shape, read_rows=read_rows)


def _to_half_rotation(tensor: LazyTensor, head_dim: int) -> LazyTensor:
    def read_rows(start: int, stop: int) -> Tensor:
        return half_rotation(tensor.read(), head_dim)[start:stop].contiguous()

    return replace(tensor, read_rows=read_rows)


def half_rotation(weight: Tensor, head_dim: int) -> Tensor:
    """Per head of a matrix or a bias, the even rows first, then the odd ones."""
    pairs: Tensor = weight.unflatten(0, (-1, head_dim // 2, 2))
    return pairs.transpose(1, 2).reshape(weight.shape)
