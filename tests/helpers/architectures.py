"""Every MoE architecture of transformers, tiny and random: prepared, run, and compared with it.

`python tests/helpers/architectures.py` (with `src` and `tests/helpers` on PYTHONPATH) writes the
table of docs/SUPPORTED_MODELS.md from what it finds, or the rows of the names it is given.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from against_transformers import eager, greedy
from tiny_models import randomise
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moe_offload.commands.prepare_model import prepare_model
from moe_offload.config import GenerationOptions
from moe_offload.engine.loading import load_model
from moe_offload.errors import UserError
from moe_offload.model.generation import Request, generate

PAGE = Path(__file__).resolve().parents[2] / "docs" / "SUPPORTED_MODELS.md"
_N_LAYERS, _N_NEW = 4, 12
_UNLIKE = (4, _N_NEW, 8)
_PROMPTS = [
    [5, 17, 200, 33, 90, 41, 7, 250, 61, 19, 77],
    [9, 8, 7, 100, 55],
    list(range(30, 48)),
]

# A model type is shrunk by its fields' names: two of what it has many of, all kinds of layers.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 320),
    "unpadded_vocab_size": 310,
    "hidden_size": 64,
    **dict.fromkeys(("num_hidden_layers", "num_layers"), _N_LAYERS),
    **dict.fromkeys(
        (
            *("intermediate_size", "dense_intermediate_size", "intermediate_size_mlp"),
            *("ffn_hidden_size", "prefix_dense_intermediate_size"),
        ),
        96,
    ),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(
        (
            *("shared_expert_intermediate_size", "shared_intermediate_size"),
            "shared_experts_intermediate_size",
        ),
        40,
    ),
    **dict.fromkeys(("num_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(
        (
            *("head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "index_head_dim"),
            *("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "swa_head_dim"),
            *("mamba_d_head", "kv_channels", "kv_lora_rank", "o_lora_rank", "rel_extent"),
            *("mamba_chunk_size", "router_hidden_size"),
        ),
        16,
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(
        (
            *("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"),
            *("top_k_experts", "n_group", "num_expert_group", "o_groups"),
        ),
        2,
    ),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("topk_group", "num_dense_layers", "first_k_dense_replace"), 1),
    **dict.fromkeys(
        ("sliding_window", "sliding_window_size", "attention_chunk_size", "index_topk"), 8
    ),
    **dict.fromkeys(("max_position_embeddings", "model_max_length"), 256),
    **dict.fromkeys(("index_n_heads", "index_topk_blocks", "linear_num_key_heads"), 2),
    **dict.fromkeys(("index_block_size", "linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_d_state", "mamba_dt_rank", "d_rel"), 8),
    **dict.fromkeys(("mamba_expand", "mamba_n_groups", "hc_count", "hc_mult"), 2),
    **dict.fromkeys(("hc_lowrank", "loop_gate_rank", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("block_size", "rotary_dim"), 8),
    **dict.fromkeys(("max_window_layers", "n_layers_per_attn_res_block", "layer_group_size"), 2),
    **dict.fromkeys(("floor_scale", "log_scaling_n_floor", "gated_norm_rank"), 4),
    **dict.fromkeys(("num_nextn_predict_layers", "num_mtp_layers", "pad_token_id"), 0),
    **dict.fromkeys(("eos_token_id", "eod_token_id"), 2),
    "zero_expert_num": 4,
    "keep_window_size": 64,
    "q_lora_rank": 24,
    "bos_token_id": 1,
    "sep_token_id": 4,
    "moe_layer_end_index": _N_LAYERS - 1,
    "loop_layer_index_start": 1,
    "loop_layer_index_end": 3,
    "loop_num_passes": 2,
    "logits_mup_width_multiplier": 2.0,
    "moe_layers": list(range(_N_LAYERS)),
}
# Fields whose None is a choice.
_KEEPS_NONE = frozenset(
    (
        *("q_lora_rank", "n_group", "topk_group", "intermediate_size", "sliding_window"),
        *("log_scaling_n_floor", "unpadded_vocab_size", "num_mtp_layers"),
        "num_nextn_predict_layers",
    )
)
_ONE_OF_EACH_KIND = frozenset(
    (
        *("layer_types", "mlp_layer_types", "indexer_types", "layer_rope_theta"),
        *("num_attention_heads_per_layer", "no_rope_layers", "mtp_layer_types"),
    )
)
_DROPPED = frozenset(
    (
        *("model_type", "architectures", "transformers_version", "_name_or_path", "id2label"),
        *("label2id", "dtype", "torch_dtype", "return_dict", "output_hidden_states"),
        *("output_attentions", "chunk_size_feed_forward", "is_encoder_decoder", "problem_type"),
        "qk_head_dim",
    )
)
_LINEAR = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_HYBRID = ["hybrid_sliding", "hybrid"]
_OWN: dict[str, dict[str, Any]] = {
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 4,
        "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {
            "hidden_size": 64,
            "ffn_hidden_size": 32,
            "moe_num_experts": 8,
            "moe_top_k": 2,
            "ffn_act_fn": {"name": "silu"},
        },
    },
    "deepseek_v2": {
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 1.5,
        "n_group": 2,
        "topk_group": 1,
    },
    "deepseek_v4": {
        "compress_rates": {
            "compressed_sparse_attention": 2,
            "heavily_compressed_attention": 4,
        },
        "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
        "layer_types": [
            *("heavily_compressed_attention", "compressed_sparse_attention"),
            *("sliding_attention", "compressed_sparse_attention"),
        ],
    },
    "doge": {"is_moe": True, "num_experts": 16},
    "dots1": {"layer_types": ["full_attention", "sliding_attention"] * 2},
    "dots3_note_text": {"per_layer_config": None},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [32, 16],  # for text and for images
        "rope_parameters": {**_ROPE, "mrope_section": [3, 3, 2]},
    },
    "flint": {"mlp_only_layers": [0]},
    "gemma4_text": {
        "enable_moe_block": True,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "per_layer_config": {"3": {"head_dim": 32}},
    },
    "glm4v_moe_text": {
        "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}
    },
    "glm5_next_text": {"index_kpool": 4, "qk_rope_head_dim": 0, "head_dim": 0},
    "gpt_oss": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": _ROPE,
    },
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "position_embedding_type": "rope",
    },
    "inkling2_loop_text": {
        "num_hidden_layers": 6,
        "layer_types": _HYBRID * 3,
        "loop_layer_index_start": 2,
        "loop_layer_index_end": 4,
    },
    "hunyuan_v1_moe": {"moe_topk": [2, 1, 2, 2]},  # as Hunyuan-A13B has it, one for each layer
    "hy_v4_vl_text": {"rope_parameters": {**_ROPE, "mrope_section": [4, 2, 2]}},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "laguna": {"num_attention_heads_per_layer": [4, 4, 4, 4]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mistral4": {"head_dim": 32},  # both parts of a head together
    "mistral_large4_text": {"kv_source_layers": list(range(_N_LAYERS))},
    "mixtral": {"sliding_window": None},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "moe_shared_expert_intermediate_size": 32,
        "moe_latent_size": None,
        "ssm_state_size": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "chunk_size": 16,
    },
    "phimoe": {"attention_bias": True, "lm_head_bias": True},
    "qwen2_moe": {"mlp_only_layers": [1]},
    "qwen3_5_moe_text": {"layer_types": _LINEAR},
    "qwen3_next": {"layer_types": _LINEAR},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ple_layer_ids": [],
        "ple_embed_dim": 16,
        "ngram_vocab_size_base": 100,
        "heads_per_ngram": 2,
        "split_ngram_parts": 2,
        "make_ngram_vocab_size_divisible_by": 8,
    },
    "step3p5": {"sliding_window": 8},
    "zaya": {"num_experts_per_tok": 1},
}
_MARKS = (
    *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    *("num_experts_per_tok", "top_k_experts", "moe_topk", "ffn_config"),
)


def moe_types() -> list[str]:
    """The model types of the installed transformers whose configs speak of experts.

    Of text models; a wrapper of several models has their texts' type inside.
    """
    found = []
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            fields = CONFIG_MAPPING[name]().to_dict()
        except Exception:  # one that has no default is another model's part
            continue
        if any(mark in fields for mark in _MARKS):
            found.append(name)
    return sorted(found)


# Models of images and text with a Mixture of Experts inside. Left out: those whose transformers
# code needs more packages, or that make no text token by token.
WRAPPERS = (
    *("aria", "dots3_note", "ernie4_5_vl_moe", "gemma4", "glm4v_moe", "glm5_next", "hy_v4_vl"),
    *("inkling2", "inkling2_loop", "kimi_k25", "llama4", "minimax_m3_vl", "mistral3"),
    *("mistral_large4", "muse_spark", "nemotron_h_omni", "qwen3_5_moe", "qwen3_omni_moe_thinker"),
    *("qwen3_vl_moe", "qwen4_exp", "step3p7"),
)

# Of a model that takes images or sound too, the parts that see and hear: one small layer.
_OTHER_PART: dict[str, Any] = {
    **dict.fromkeys(("depth", "num_hidden_layers", "n_layers", "encoder_layers"), 1),
    **dict.fromkeys(("hidden_size", "intermediate_size", "d_model", "encoder_ffn_dim"), 32),
    **dict.fromkeys(("num_heads", "num_attention_heads", "encoder_attention_heads"), 2),
    **dict.fromkeys(("num_key_value_heads", "downsample_hidden_size"), 2),
    **dict.fromkeys(
        ("out_hidden_size", "output_dim", "text_hidden_size", "adapter_out_dim"),
        _SIZES["hidden_size"],
    ),
    **dict.fromkeys(("adapter_in_dim", "adapter_input_size", "projection_intermediate_size"), 32),
    **dict.fromkeys(("moe_intermediate_size", "projection_hidden_dim"), 32),
    "num_local_experts": 4,
    "num_position_embeddings": 16,
    "position_embedding_size": 16,
    "head_dim": 16,
    "image_size": 28,
    "spatial_merge_size": 2,
    "deepstack_visual_indexes": [0],
    "mlp_layer_types": ["dense"],
    "layer_types": ["window_attention"],
    "per_layer_config": None,
}
# Wrappers whose usual text model is no Mixture of Experts.
_OWN_TEXT = {"mistral3": "mistral4"}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A config of `model_type` with some four small layers of every kind it has."""
    default_config = CONFIG_MAPPING[model_type]()
    default = default_config.to_dict()
    parts = {name: value for name, value in default.items() if name.endswith("_config")}
    if "text_config" in parts:
        text_type = _OWN_TEXT.get(model_type, default_config.get_text_config().model_type)
        parts = {name: _tiny_part(part) for name, part in parts.items() if part is not None}
        parts["text_config"] = tiny_config(text_type).to_dict()
        return CONFIG_MAPPING[model_type](**parts)
    fields: dict[str, Any] = {}
    for name, value in default.items():
        if name in _DROPPED:
            continue
        if name in _SIZES and not (value is None and name in _KEEPS_NONE):
            value = _SIZES[name]
        elif name in _ONE_OF_EACH_KIND and isinstance(value, list):
            kinds = {str(one): one for one in reversed(value)}
            first = list(dict.fromkeys(map(str, value)))
            value = ([kinds[one] for one in first] if len(first) > 1 else []) + value
            value = value[:_N_LAYERS]
        fields[name] = value
    if "kv_lora_rank" in default:
        fields["num_key_value_heads"] = 4
    fields |= _OWN.get(model_type, {})
    for name in ("layer_types", "per_layer_config"):
        if fields.get(name, 0) is None:
            del fields[name]
    return CONFIG_MAPPING[model_type](**fields)


def _tiny_part(part: dict[str, Any]) -> dict[str, Any]:
    fields = {name: _OTHER_PART.get(name, value) for name, value in part.items()}
    for name in ("patch_sizes", "hidden_sizes", "depths"):  # one of each layer
        if name in fields:
            fields[name] = fields[name][:1]
    return {name: value for name, value in fields.items() if name not in _DROPPED}


@dataclass(frozen=True)
class Row:
    """What an architecture is found to be: how its answers compare, alone and in a padded batch.

    `alone` and `batched` are exact (transformers' eager model, recomputed for every token), as
    transformers (its own cached generation, where that differs) or refused; `notes` are sentences.
    """

    name: str
    alone: str
    batched: str
    notes: tuple[str, ...] = ()

    def line(self) -> str:
        return f"| {self.name} | {self.alone} | {self.batched} | {'; '.join(self.notes)} |"


@torch.inference_mode()
def _recomputed(model: PreTrainedModel, prompt: Sequence[int]) -> list[int]:
    """Greedy ids, everything computed again for every token."""
    ids = list(prompt)
    for _ in range(_N_NEW):
        logits = model(torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


def _own_generation(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """transformers' own cached generation for a left-padded batch."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(one)) + list(one) for one in prompts])
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts])
    settings = {"max_new_tokens": _N_NEW, "do_sample": False, "pad_token_id": 0}
    found = model.generate(ids, attention_mask=mask, eos_token_id=None, **settings)
    return [row[longest:].tolist() for row in found]


def _error(found: Tensor, expected: Tensor) -> Tensor:
    """The relative error of each token's logits [B, S]."""
    return (found.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)


def _near(ours: PreTrainedModel, theirs: PreTrainedModel, ids: Tensor, logits: Tensor) -> float:
    """The share of tokens [B, S] whose logits are as near to `logits` as usual in theirs."""
    error = _error(ours(input_ids=ids).logits, logits)
    reference = _error(theirs(ids, use_cache=False).logits, logits)
    # a turned choice of experts moves a token's logits by far
    usual = torch.maximum(reference, reference.median())
    return (error < 2 * usual + 0.02).float().mean().item()


@contextlib.contextmanager
def _choosing(
    model: PreTrainedModel, given: Mapping[str, tuple[Tensor, Tensor]] | None = None
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """What the routers choose, ids and weights [tokens, top_k] a layer, or else what is given."""
    chosen: dict[str, tuple[Tensor, Tensor]] = {}

    def look(name: str, arguments: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        hidden, *chosen[name] = arguments
        ids, weights = chosen[name] if given is None else given[name]
        return hidden, ids, weights.to(chosen[name][1].dtype)

    hooks = [
        module.register_forward_pre_hook(lambda _, arguments, name=name: look(name, arguments))
        for name, module in model.named_modules()
        if name.endswith(".experts")
    ]
    try:
        yield chosen
    finally:
        for hook in hooks:
            hook.remove()


def _compare(name: str, found: object, exact: object, own: Any) -> str:
    """`found` against `exact`, and against what `own()` gives where they differ."""
    if found == exact:
        return "exact"
    try:
        theirs = own()
    except Exception as error:
        theirs = type(error).__name__
    assert found == theirs, f"{name}: {found} for {exact}, transformers itself: {theirs}"
    return "as transformers"


def examine(name: str, folder: Path) -> Row:
    """Prepare a random `name` in `folder` in three formats and run it; AssertionError for a fault.

    fp32 gives the tokens of a full recomputation, or else transformers' own; with an expert cache
    and fetching ahead it gives the same tokens; bf16 is as near to fp32 as transformers' bf16;
    int4 experts in int8 dense weights run.
    """
    config = tiny_config(name)
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        takes_images = type(config) in AutoModelForImageTextToText._model_mapping
        builder = AutoModelForImageTextToText if takes_images else AutoModelForCausalLM
        model = builder.from_config(config, dtype=torch.float32).eval()
    randomise(model, seed=0)
    hub = folder / "hub"
    model.save_pretrained(hub, save_original_format=True)
    notes = []

    def prepared(**formats: Any) -> Path:
        path = folder / "-".join(formats.values())
        with contextlib.redirect_stderr(io.StringIO()):  # its notes are not the question here
            prepare_model(hub, path, hf=True, **formats)
        return path

    try:
        exact_folder = prepared(expert_dtype="fp32")
        ours = load_model(exact_folder, device="cpu")
    except UserError as error:
        sentence = str(error).replace(f"{folder}/", "")
        return Row(name, "refused", "refused", (sentence,))
    theirs = eager(hub, torch.float32, type(model))
    ids = torch.tensor([_PROMPTS[0]])
    with torch.inference_mode():
        logits = theirs(ids, use_cache=False).logits
    exact = [_recomputed(theirs, prompt) for prompt in _PROMPTS]
    with torch.inference_mode():
        assert _error(ours(input_ids=ids).logits, logits).max() < 1e-4
    alone = [greedy(ours, [prompt], _N_NEW)[0] for prompt in _PROMPTS]
    found_alone = _compare(
        name, alone, exact, lambda: [_own_generation(theirs, [one])[0] for one in _PROMPTS]
    )
    batch = None
    try:
        batch = greedy(ours, _PROMPTS, _N_NEW)
        found_batched = _compare(name, batch, alone, lambda: _own_generation(theirs, _PROMPTS))
        found_batched = found_alone if batch == alone else found_batched
    except UserError as error:
        found_batched = "refused"
        notes.append(str(error))
    if batch == alone:
        assert _refilled(ours) == [ids[:n] for ids, n in zip(alone, _UNLIKE, strict=True)]
    ours.engine.close()
    notes += _with_a_cache(exact_folder, alone, batch)
    with torch.inference_mode():
        bf16 = load_model(prepared(expert_dtype="bf16"), device="cpu")
        theirs_bf16 = eager(hub, torch.bfloat16, type(model))
        near = _near(bf16, theirs_bf16, ids, logits)
        if near < 0.75:
            # A rounding may turn a close choice of experts: at the first token it moves the logits
            # of all that look back at it. So all are given the same choices; few may be others.
            with _choosing(theirs) as right:
                theirs(ids, use_cache=False)
            with _choosing(bf16, right) as own, _choosing(theirs_bf16, right):
                near = _near(bf16, theirs_bf16, ids, logits)
            same = [
                (own[layer][0].sort()[0] == ids.sort()[0]).flatten()
                for layer, (ids, _) in right.items()
            ]
            assert torch.cat(same).float().mean() >= 0.9, f"{name}: bf16 chooses {own} of {right}"
        assert near >= 0.75, f"{name}: bf16 is near to fp32 for {near} of the tokens"
        assert len(greedy(bf16, _PROMPTS[:1], _N_NEW)[0]) == _N_NEW
        bf16.engine.close()
    small = load_model(prepared(expert_dtype="int4", dense_dtype="int8"), device="cpu")
    assert len(greedy(small, _PROMPTS[:1], _N_NEW)[0]) == _N_NEW
    small.engine.close()
    return Row(name, found_alone, found_batched, tuple(dict.fromkeys(notes)))


def _refilled(model: PreTrainedModel) -> list[list[int]]:
    """Answers of unlike lengths, two at a time: the third prompt joins the second."""
    requests = [
        Request(number, ids, GenerationOptions(max_tokens))
        for number, (ids, max_tokens) in enumerate(zip(_PROMPTS, _UNLIKE, strict=True))
    ]
    records = {record.prompt: record for record, _ in generate(model, requests, 2)}
    return [records[number].ids for number in range(len(_PROMPTS))]


def _with_a_cache(folder: Path, alone: list[list[int]], batch: list[list[int]] | None) -> list[str]:
    """The same tokens with slots on an emulated accelerator; what is refused of it."""
    notes = []
    cache = {"cache_nblocks": 2, "cache_nways": 2, "cache_replace_policy": "LRU"}
    for settings in (cache | {"prefetch": "next-layer"}, cache):
        try:
            ours = load_model(folder, device="cpu", **settings)
        except UserError as error:
            notes.append(str(error).replace(folder.name, "the model"))
            continue
        assert [greedy(ours, [prompt], _N_NEW)[0] for prompt in _PROMPTS] == alone
        assert batch is None or greedy(ours, _PROMPTS, _N_NEW) == batch
        ours.engine.close()
        break
    return notes


def rows_of_the_page() -> dict[str, str]:
    """The table's lines by architecture."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines[1:]}


def main(names: Sequence[str]) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = rows_of_the_page() if names else {}
    for name in names or sorted({*moe_types(), *WRAPPERS}):
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-"))
        try:
            rows[name] = examine(name, folder).line()
        except Exception as error:
            rows[name] = f"| {name} | FAULT | | {type(error).__name__}: {str(error)[:300]} |"
        finally:
            shutil.rmtree(folder)
        print(rows[name], flush=True)
    text = PAGE.read_text()
    head = text[: text.index("| architecture")]
    table = ["| architecture | a prompt alone | in a padded batch | notes |", "|---|---|---|---|"]
    PAGE.write_text(head + "\n".join([*table, *(rows[name] for name in sorted(rows))]) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
