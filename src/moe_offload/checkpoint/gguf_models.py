"""The models that GGUF files hold: their configuration and tensors as transformers has them.

`ARCHITECTURES` is the table: how llama.cpp's keys become a configuration. Tensors are found by the
names that the `gguf` package gives to those of transformers' module tree. What it does not know, or
what llama.cpp stores in another layout, is here: the experts, gate and up projection apart; the
rotated rows of some architectures' queries and keys, neighbours (2i, 2i + 1) instead of halves;
and the two halves of latent attention's kv_b, one of them transposed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, Final

import gguf
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from moe_offload.checkpoint.codes import Codes, Grid, joined
from moe_offload.checkpoint.conversion import ExpertsModule
from moe_offload.checkpoint.gguf_file import GgufFile
from moe_offload.checkpoint.mistral import half_rotation
from moe_offload.checkpoint.model_config import require_plausible, transformers_told
from moe_offload.checkpoint.source_files import LazyTensor, Quantised
from moe_offload.errors import UserError

_SIGMOID: Final = 2  # of `expert_gating_func`; 1 is softmax
# What the frequencies of the rotary embedding are divided by: Llama 3's, and those of LongRoPE.
_DIVISORS: Final = "rope_freqs.weight"
_FACTORS: Final = ("rope_factors_long.weight", "rope_factors_short.weight")
# Names of the module tree that the gguf package does not know.
_OWN_NAMES: Final = {
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.e_score_correction_bias": "exp_probs_b.bias",
    "self_attn.sinks": "attn_sinks.weight",
    "block_sparse_moe.router.weight": "ffn_gate_inp.weight",
}
_LAYER: Final = re.compile(r"model\.layers\.(\d+)\.(.+)")


class _Fields:
    """What a file says of its architecture, checked as it is asked for."""

    def __init__(self, file: GgufFile) -> None:
        self.file, self.path = file, file.paths[0]
        self.architecture = self._get("general.architecture", str, None)

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number; an array of one for each layer counts if all are equal."""
        return int(self._get(f"{self.architecture}.{key}", int, default))

    def real(self, key: str, default: float | None = None) -> float:
        return float(self._get(f"{self.architecture}.{key}", float, default))

    def truth(self, key: str, default: bool) -> bool:
        return bool(self._get(f"{self.architecture}.{key}", bool, default))

    def text(self, key: str) -> str:
        return str(self._get(f"{self.architecture}.{key}", str, ""))

    def _get(self, key: str, kind: type, default: Any) -> Any:
        found = self.file.fields.get(key, default)
        if isinstance(found, list) and len(set(map(repr, found))) == 1:
            found = found[0]
        if type(found) is int and kind is float:
            found = float(found)
        if type(found) is not kind or found != found:
            what = f"found {found!r:.80}" if key in self.file.fields else "it has no such field"
            names = {int: "a whole number", float: "a number", bool: "a truth value", str: "a text"}
            raise UserError(
                f"expected {names[kind]} for {key} in {self.path}, {what}; download the file again"
            )
        return found

    def shape(self, name: str, n_dimensions: int) -> tuple[int, ...]:
        """The shape of a tensor, `blk.*` standing for the first layer that has it."""
        found = self._shapes(name)
        if not found or len(found[0]) != n_dimensions:
            what = f"one of shape {found[0]}" if found else "none"
            raise UserError(
                f"expected a tensor {name} of {n_dimensions} dimensions in {self.path}, found "
                f"{what}; download the file again"
            )
        return found[0]

    def has(self, name: str) -> bool:
        """Whether there is such a tensor, in any layer for `blk.*`."""
        return bool(self._shapes(name))

    def _shapes(self, name: str) -> list[tuple[int, ...]]:
        pattern = re.escape(name).replace(r"\*", r"\d+")
        return [one.shape for key, one in self.file.tensors.items() if re.fullmatch(pattern, key)]

    @property
    def layers(self) -> int:
        """Without those of multi-token prediction, which come after them."""
        return self.whole("block_count") - self.whole("nextn_predict_layers", 0)


def _common(fields: _Fields) -> dict[str, Any]:
    """What every architecture has."""
    heads = fields.whole("attention.head_count")
    vocabulary, hidden_size = fields.shape("token_embd.weight", 2)
    config = {
        "vocab_size": vocabulary,
        "hidden_size": hidden_size,
        "intermediate_size": fields.whole("feed_forward_length", 0),  # of dense layers
        "num_hidden_layers": fields.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": fields.whole("attention.head_count_kv", heads),
        "max_position_embeddings": fields.whole("context_length"),
        "rms_norm_eps": _norm_epsilon(fields),
        "rope_parameters": _rotation(fields),
        "num_experts_per_tok": fields.whole("expert_used_count"),
        "tie_word_embeddings": not fields.has("output.weight"),
    }
    return config | {"head_dim": _head_dim(fields)}


def _norm_epsilon(fields: _Fields) -> float:
    other = fields.real("attention.layer_norm_epsilon", 1e-5)
    return fields.real("attention.layer_norm_rms_epsilon", other)


def _rotation(fields: _Fields) -> dict[str, Any]:
    """transformers' rope_parameters."""
    rotation: dict[str, Any] = {"rope_theta": fields.real("rope.freq_base", 10000.0)}
    kind = fields.text("rope.scaling.type") or "none"
    factors = [name in fields.file.tensors for name in _FACTORS]
    if fields.architecture == "phimoe" and all(factors):  # `_phimoe` reads them
        return rotation
    if any(factors):
        kind = "longrope"
    divided = _DIVISORS in fields.file.tensors
    if kind not in (("none",) if divided else ("none", "linear", "yarn")):
        raise UserError(
            f"{fields.path} scales its rotary embedding in a way that is not known here "
            f"({kind:.40}{f' and {_DIVISORS}' if divided else ''}): use the model's Hugging Face "
            "version"
        )
    if divided:  # the same for every length, and nothing else
        divisors = _rotary_factors(fields, _DIVISORS)
        return rotation | {
            "rope_type": "longrope",
            "long_factor": divisors,
            "short_factor": divisors,
            "factor": 1.0,
            "original_max_position_embeddings": fields.whole("context_length"),
        }
    if kind == "none":
        return rotation | {"rope_type": "default"}
    rotation |= {"rope_type": kind, "factor": fields.real("rope.scaling.factor")}
    if kind == "yarn":
        rotation["original_max_position_embeddings"] = fields.whole(
            "rope.scaling.original_context_length"
        )
        rotation["beta_fast"] = fields.real("rope.scaling.yarn_beta_fast", 32.0)
        rotation["beta_slow"] = fields.real("rope.scaling.yarn_beta_slow", 1.0)
    return rotation


def _rotary_factors(fields: _Fields, name: str) -> list[float]:
    """One positive number for each pair of a head's rotated dimensions."""
    factors = fields.file.tensors[name]
    n_pairs = _head_dim(fields) // 2
    found = factors.read().float() if factors.shape == (n_pairs,) else torch.zeros(1)
    if not bool(((found > 0) & found.isfinite()).all()):
        raise UserError(
            f"expected {n_pairs} positive numbers in {name} of {fields.path}, found shape "
            f"{factors.shape} or others; download the file again"
        )
    return found.tolist()


def _head_dim(fields: _Fields) -> int:
    heads = max(fields.whole("attention.head_count"), 1)
    stated = fields.whole("attention.key_length", fields.whole("rope.dimension_count", 0))
    return stated or fields.shape("token_embd.weight", 2)[1] // heads


def _experts(fields: _Fields, count: str, width: str) -> dict[str, Any]:
    """Number and width of the experts, from the tensors: old files do not state the width."""
    if fields.has("blk.*.ffn_down_exps.weight"):
        n_experts, _, rows = fields.shape("blk.*.ffn_down_exps.weight", 3)
        return {count: n_experts, width: rows}
    n_experts = fields.whole("expert_count")
    return {count: n_experts, width: fields.shape("blk.*.ffn_down.0.weight", 2)[1]}


def _mixtral(fields: _Fields) -> dict[str, Any]:
    return {"model_type": "mixtral"} | _experts(fields, "num_local_experts", "intermediate_size")


def _qwen2_moe(fields: _Fields) -> dict[str, Any]:
    return {
        "model_type": "qwen2_moe",
        **_experts(fields, "num_experts", "moe_intermediate_size"),
        "shared_expert_intermediate_size": fields.shape("blk.*.ffn_gate_shexp.weight", 2)[0],
        "norm_topk_prob": fields.truth("expert_weights_norm", False),
        "qkv_bias": fields.has("blk.*.attn_q.bias"),
    }


def _qwen3_moe(fields: _Fields) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe",
        **_experts(fields, "num_experts", "moe_intermediate_size"),
        "norm_topk_prob": fields.truth("expert_weights_norm", True),
        "attention_bias": fields.has("blk.*.attn_q.bias"),
    }


def _olmoe(fields: _Fields) -> dict[str, Any]:
    clip = fields.real("attention.clamp_kqv", 0.0)
    return {
        "model_type": "olmoe",
        **_experts(fields, "num_experts", "intermediate_size"),
        "norm_topk_prob": fields.truth("expert_weights_norm", False),
        "clip_qkv": clip or None,
    }


def _phimoe(fields: _Fields) -> dict[str, Any]:
    """Its two magnitudes (mscale) are one in the file: what the converter computed."""
    config = {
        "model_type": "phimoe",
        **_experts(fields, "num_local_experts", "intermediate_size"),
        "attention_bias": fields.has("blk.*.attn_q.bias"),
        "lm_head_bias": fields.has("output.bias"),
        "sliding_window": fields.whole("attention.sliding_window", 0) or None,
    }
    if not all(map(fields.has, _FACTORS)):
        return config
    long_factor, short_factor = (_rotary_factors(fields, name) for name in _FACTORS)
    magnitude = fields.real("rope.scaling.attn_factor", 1.0)
    return config | {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": fields.real("rope.freq_base", 10000.0),
            "long_factor": long_factor,
            "short_factor": short_factor,
            "long_mscale": magnitude,
            "short_mscale": magnitude,
            "original_max_position_embeddings": fields.whole(
                "rope.scaling.original_context_length"
            ),
        }
    }


def _deepseek(fields: _Fields) -> dict[str, Any]:
    """V3 and its kin choose experts by sigmoid and a correction; V2 by softmax."""
    is_v3 = fields.whole("expert_gating_func", 1) == _SIGMOID
    rotated = fields.whole("rope.dimension_count")
    scaling = _rotation(fields)
    if "factor" in scaling:
        # the file holds a tenth of what both of transformers' fields are in DeepSeek's models
        magnitude = round(10 * fields.real("rope.scaling.yarn_log_multiplier", 0.0), 4)
        scaling |= {"mscale": magnitude, "mscale_all_dim": magnitude}
    key_length = fields.whole("attention.key_length")
    value_length = fields.whole("attention.value_length")
    config = {
        "model_type": "deepseek_v3" if is_v3 else "deepseek_v2",
        **_grouped_experts(fields),
        "rope_parameters": scaling,
        "num_key_value_heads": fields.whole("attention.head_count"),
        "q_lora_rank": fields.whole("attention.q_lora_rank", 0) or None,
        "kv_lora_rank": fields.whole("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": fields.whole("attention.key_length_mla", key_length) - rotated,
        "v_head_dim": fields.whole("attention.value_length_mla", value_length),
        "head_dim": rotated,
    }
    if is_v3:
        return config
    return config | {"topk_method": "group_limited_greedy" if config["n_group"] > 1 else "greedy"}


def _grouped_experts(fields: _Fields) -> dict[str, Any]:
    """DeepSeek's experts and its kin's: some for every token, dense layers before them."""
    return {
        **_experts(fields, "n_routed_experts", "moe_intermediate_size"),
        "n_shared_experts": fields.whole("expert_shared_count", 0) or None,
        "first_k_dense_replace": fields.whole("leading_dense_block_count", 0),
        "routed_scaling_factor": fields.real("expert_weights_scale", 1.0),
        "norm_topk_prob": fields.truth("expert_weights_norm", False),
        "n_group": fields.whole("expert_group_count", 1),
        "topk_group": fields.whole("expert_group_used_count", 1),
    }


def _partly_rotated(fields: _Fields) -> dict[str, Any]:
    share = fields.whole("rope.dimension_count") / _head_dim(fields)
    return {"rope_parameters": _rotation(fields) | {"partial_rotary_factor": share}}


def _glm4_moe(fields: _Fields) -> dict[str, Any]:
    return {
        "model_type": "glm4_moe",
        **_grouped_experts(fields),
        **_partly_rotated(fields),
        "attention_bias": fields.has("blk.*.attn_q.bias"),
        "use_qk_norm": fields.has("blk.*.attn_q_norm.weight"),
    }


def _minimax_m2(fields: _Fields) -> dict[str, Any]:
    experts = _experts(fields, "num_local_experts", "intermediate_size")
    return {"model_type": "minimax_m2", **experts, **_partly_rotated(fields)}


def _gpt_oss(fields: _Fields) -> dict[str, Any]:
    rotation = _rotation(fields)
    if rotation["rope_type"] == "yarn":
        rotation["truncate"] = False
    return {
        "model_type": "gpt_oss",
        **_experts(fields, "num_local_experts", "intermediate_size"),
        "rope_parameters": rotation,
        "sliding_window": fields.whole("attention.sliding_window"),
    }


def _granitemoe(fields: _Fields) -> dict[str, Any]:
    config = {
        "model_type": "granitemoe",
        **_experts(fields, "num_local_experts", "intermediate_size"),
        "attention_multiplier": fields.real("attention.scale", 1.0),
        "embedding_multiplier": fields.real("embedding_scale", 1.0),
        "residual_multiplier": fields.real("residual_scale", 1.0),
        "logits_scaling": fields.real("logit_scale", 1.0),
    }
    if fields.has("blk.*.ffn_gate_shexp.weight"):
        config["model_type"] = "granitemoeshared"
        width = fields.shape("blk.*.ffn_gate_shexp.weight", 2)[0]
        config["shared_intermediate_size"] = width
    return config


ARCHITECTURES: Final = {
    "llama": _mixtral,
    "qwen2moe": _qwen2_moe,
    "qwen3moe": _qwen3_moe,
    "phimoe": _phimoe,
    "olmoe": _olmoe,
    "deepseek2": _deepseek,
    "glm4moe": _glm4_moe,
    "gpt-oss": _gpt_oss,
    "granitemoe": _granitemoe,
    "minimax-m2": _minimax_m2,
}
_NEIGHBOURS: Final = ("llama", "granitemoe")  # are rotated in these, not halves


def read_gguf_config(file: GgufFile) -> PreTrainedConfig:
    """transformers' config of the model; UserError for one without experts or an unknown one."""
    fields = _Fields(file)
    path, architecture = fields.path, fields.architecture
    found = ARCHITECTURES.get(architecture)
    n_experts = file.fields.get(f"{architecture}.expert_count", 0)
    if found is None or not n_experts:
        kind = f"a model of architecture {architecture:.40}"
        if not n_experts:
            raise UserError(
                f"{path} holds {kind} without experts, expected a Mixture-of-Experts model; run it "
                "with llama.cpp"
            )
        raise UserError(
            f"{path} holds {kind}, which is not read from GGUF files (read are "
            f"{', '.join(ARCHITECTURES)}): use the model's Hugging Face version"
        )
    config = _common(fields) | found(fields) | _stop_ids(file)
    heads = config["num_attention_heads"], config["num_key_value_heads"]
    if min(heads) < 1:
        raise UserError(f"expected attention heads in {path}, found {heads}; download it again")
    require_plausible(config, path, "download it again")
    with transformers_told(f"use the fields of {path}", "download it again"):
        return AutoConfig.for_model(**config)


def _stop_ids(file: GgufFile) -> dict[str, int]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    ids = {key: file.fields.get(f"tokenizer.ggml.{name}_token_id") for key, name in names.items()}
    return {key: value for key, value in ids.items() if type(value) is int}


def to_model_tensors(
    file: GgufFile, model: PreTrainedModel, experts: Sequence[ExpertsModule]
) -> dict[str, LazyTensor]:
    """The file's tensors under the names of transformers' module tree, in its layout, unread.

    Those of layers for multi-token prediction keep their names. UserError for any other that the
    model has no place for: then it is not the one that the file was written for.
    """
    architecture = str(file.fields["general.architecture"])
    names = _Names(file, architecture, model.config.num_hidden_layers)
    rotated = re.compile(r"self_attn\.[qk]_proj\." if architecture in _NEIGHBOURS else r"(?!)")
    made: dict[str, LazyTensor] = {}
    for module in experts:
        made |= _experts_tensors(names, module)
    for target, expected in model.state_dict().items():
        found = None if target in made else names.take(names.of(target))
        if found is not None and rotated.search(target):
            found = combined([found], _halves(model.config), by_row=False)
        elif target.endswith("kv_b_proj.weight"):
            latent = ("attn_k_b", "attn_v_b")
            found = found or _from_parts(names, target, latent, _key_and_value_b)
        elif target.endswith("shared_mlp.input_linear.weight"):
            found = _from_parts(names, target, ("ffn_gate_shexp", "ffn_up_shexp"), torch.cat)
        elif found is not None and expected.shape == (1, *found.shape):  # a gate of one row
            found = combined([found], lambda parts: parts[0].unsqueeze(0), by_row=False)
        if found is not None:
            made[target] = found
    return made | names.left_over()


class _Names:
    """A file's tensors, each taken once, by llama.cpp's names."""

    def __init__(self, file: GgufFile, architecture: str, n_layers: int) -> None:
        self._path = file.paths[0]
        in_config = (_DIVISORS, *_FACTORS)
        self._left = {name: one for name, one in file.tensors.items() if name not in in_config}
        kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        self._map = gguf.get_tensor_name_map(kinds[architecture], n_layers)
        stated: int = file.fields[f"{architecture}.block_count"]
        self._spare_layers = range(n_layers, stated)  # of multi-token prediction

    def of(self, target: str) -> str:
        """llama.cpp's name of a tensor of the module tree; empty where it has none."""
        layer = _LAYER.fullmatch(target)
        if layer and layer[2] in _OWN_NAMES:
            return f"blk.{layer[1]}.{_OWN_NAMES[layer[2]]}"
        return self._map.get_name(target, try_suffixes=(".weight", ".bias")) or ""

    def take(self, name: str) -> LazyTensor | None:
        return self._left.pop(name, None)

    def take_all(self, *names: str) -> list[LazyTensor] | None:
        """These, or none of them where one is missing."""
        if not all(name in self._left for name in names):
            return None
        return [self._left.pop(name) for name in names]

    def left_over(self) -> dict[str, LazyTensor]:
        for name in self._left:
            layer = re.match(r"blk\.(\d+)\.", name)
            if layer is None or int(layer[1]) not in self._spare_layers:
                raise UserError(
                    f"{self._path} holds a tensor {name:.80}, for which transformers' model of "
                    "this architecture has no place: use the model's Hugging Face version"
                )
        return self._left


def combined(
    parts: Sequence[LazyTensor], combine: Callable[[list[Tensor]], Tensor], by_row: bool
) -> LazyTensor:
    """What `combine` makes of several tensors, read when it is; `by_row` if it keeps dimension 0.

    UserError where their shapes do not fit together.
    """
    path = parts[0].path
    try:
        shape = combine([torch.empty(part.shape, device="meta") for part in parts]).shape
    except RuntimeError as error:
        shapes = ", ".join(str(part.shape) for part in parts)
        raise UserError(
            f"tensors of shapes {shapes} in {path} do not fit together; download the file again"
        ) from error

    def read_rows(start: int, stop: int) -> Tensor:
        if by_row:
            return combine([part.read_rows(start, stop) for part in parts])
        return combine([part.read() for part in parts])[start:stop]

    dtype = parts[0].dtype if len({part.dtype for part in parts}) == 1 else torch.float32

    def read_codes(found: list[Codes]) -> Codes:
        return joined(found, combine)

    return LazyTensor(
        tuple(shape), dtype, path, read_rows, _together(parts, read_codes) if by_row else None
    )


def _together(
    parts: Sequence[LazyTensor], join: Callable[[list[Codes]], Codes], stacked: bool = False
) -> Quantised | None:
    """What tensors that are made one, as `join` does with their codes, are as quantised ones.

    `stacked` where each is one row of the whole.
    """
    quantised = [part.quantised for part in parts if part.quantised is not None]
    if len(quantised) < len(parts):
        return None
    readers = [one.read_rows for one in quantised if one.read_rows is not None]
    alike = len(readers) == len(parts) and len({one.kind for one in quantised}) == 1

    def read_rows(start: int, stop: int) -> Codes:
        if stacked:
            rows = [parts[row].shape[0] for row in range(start, stop)]
            return join([read(0, n) for read, n in zip(readers[start:stop], rows, strict=True)])
        return join([read(start, stop) for read in readers])

    def grids() -> Iterator[Grid]:
        return chain.from_iterable(one.grids() for one in quantised)

    return Quantised(quantised[0].kind, grids, read_rows if alike else None)


def _halves(config: PreTrainedConfig) -> Callable[[list[Tensor]], Tensor]:
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    return lambda parts: half_rotation(parts[0], head_dim)


def _from_parts(
    names: _Names, target: str, stems: Sequence[str], combine: Callable[[list[Tensor]], Tensor]
) -> LazyTensor | None:
    """What `combine` makes of these weights of the target's layer, if all are there."""
    layer = _LAYER.fullmatch(target)
    parts = layer and names.take_all(*(f"blk.{layer[1]}.{stem}.weight" for stem in stems))
    return combined(parts, combine, by_row=False) if parts else None


def _key_and_value_b(parts: list[Tensor]) -> Tensor:
    """[heads * (nope + v), rank] of attn_k_b [heads, rank, nope] and attn_v_b [heads, v, rank]."""
    keys, values = parts
    return torch.cat((keys.transpose(1, 2), values), dim=1).flatten(0, 1)


def _experts_tensors(names: _Names, module: ExpertsModule) -> dict[str, LazyTensor]:
    """The parameters of one experts module, of those that the file has."""
    layer = _LAYER.fullmatch(module.name)
    blk = f"blk.{layer[1]}." if layer else ""
    in_layout = partial(_in_layout, module)
    made = {}
    for field, target in module.parameters.items():
        end = ".bias" if field.endswith("_bias") else ".weight"
        is_first = field.startswith("gate_up")
        stems = (f"{blk}ffn_gate", f"{blk}ffn_up") if is_first else (f"{blk}ffn_down",)
        fused = names.take(f"{blk}ffn_gate_up_exps{end}") if is_first else None
        if fused is not None:  # the gate's rows and, after them, the up projection's
            made[target] = combined(
                [fused], lambda parts: in_layout(list(parts[0].chunk(2, dim=1))), by_row=True
            )
            continue
        parts = names.take_all(*(f"{stem}_exps{end}" for stem in stems))
        if parts is None:  # a file of before they were stacked
            apart = [
                names.take_all(*(f"{stem}.{expert}{end}" for expert in range(module.n_experts)))
                for stem in stems
            ]
            parts = [_stacked(tensors) for tensors in apart if tensors]
        if len(parts) == len(stems):
            made[target] = combined(parts, in_layout, by_row=True)
    return made


def _in_layout(module: ExpertsModule, parts: list[Tensor]) -> Tensor:
    """gate and up [E, I, H], or down [E, H, I] alone, or their biases, as the module has them."""
    if len(parts) == 1:
        (joined,) = parts
    elif module.is_concatenated:
        joined = torch.cat(parts, dim=1)
    else:
        joined = torch.stack(parts, dim=2).flatten(1, 2)
    return joined.transpose(1, 2) if module.is_transposed and joined.dim() == 3 else joined


def _stacked(experts: Sequence[LazyTensor]) -> LazyTensor:
    """One tensor of matrices that lie apart."""
    first = experts[0]
    if any(one.shape != first.shape for one in experts):
        raise UserError(
            f"the experts of a layer in {first.path} differ in shape; download the file again"
        )

    def read_rows(start: int, stop: int) -> Tensor:
        return torch.stack([expert.read() for expert in experts[start:stop]])

    shape = (len(experts), *first.shape)
    quantised = _together(experts, lambda found: joined(found, torch.stack), stacked=True)
    return LazyTensor(shape, first.dtype, first.path, read_rows, quantised)
