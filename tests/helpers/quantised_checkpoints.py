"""Tiny quantised checkpoints as they are published, and the plain ones that they stand for.

`write(name, folder)` makes both of `SOURCES[name]`: `quantised` is written from the layout's
description in numpy, or by the compressed_tensors library where the format is its own; `plain` has
in place of each quantised weight the fp32 numbers that the stored bytes mean, computed element by
element from indices.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import architectures
import numpy as np
import tiny_models
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig

# What one matrix becomes: tensors by the end of their names, and the numbers they mean.
Stored = tuple[dict[str, Tensor], Tensor]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def e4m3_values() -> NDArray[np.float32]:
    """What each byte means as e4m3: sign, four bits of exponent (bias 7), three of mantissa."""
    found = []
    for byte in range(256):
        exponent, mantissa = (byte >> 3) & 15, byte & 7
        value = (
            mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        )
        found.append(np.nan if byte & 127 == 127 else (-value if byte & 128 else value))
    return np.array(found, np.float32)


E4M3 = e4m3_values()


def nearest(x: NDArray[np.float32], table: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The place in the table of the number nearest to each of x."""
    distance = np.abs(x[..., None] - table)
    return np.nanargmin(distance, axis=-1).astype(np.uint8)


def per_block(block: tuple[int, int], x: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Index arrays [R, 1] and [1, C] of the block that an element of x is in."""
    rows, columns = x.shape
    return np.arange(rows)[:, None] // block[0], np.arange(columns)[None] // block[1]


def largest(x: NDArray[np.float32], block: tuple[int, int]) -> NDArray[np.float32]:
    """The largest magnitude in each block, the last ones cut off."""
    out = np.zeros([-(-n // of) for n, of in zip(x.shape, block, strict=True)], np.float32)
    np.maximum.at(out, per_block(block, x), np.abs(x))
    return out


def fp8(block: tuple[int, int] | None, dtype: torch.dtype, end: str) -> Callable[..., Stored]:
    """e4m3 with a scale for each block; of the whole matrix it is one number."""

    def write(weight: Tensor) -> Stored:
        x = weight.numpy()
        of = block or x.shape
        scales = torch.from_numpy(largest(x, of) / 448).to(dtype)
        spread = scales.float().numpy()[per_block(of, x)]
        codes = nearest(x / spread, E4M3)
        stored = scales if block else scales.reshape(())
        tensors = {"weight": torch.from_numpy(codes).view(torch.float8_e4m3fn), end: stored}
        return tensors, torch.from_numpy(E4M3[codes] * spread)

    return write


def exponents(x: NDArray[np.float32], block: tuple[int, int], top: float) -> NDArray[np.uint8]:
    """E8M0: the power of two, plus 127, that brings each block's largest below `top`."""
    return (np.ceil(np.log2(largest(x, block) / top)) + 127).astype(np.uint8)


def mxfp8(weight: Tensor) -> Stored:
    x = weight.numpy()
    scales = exponents(x, (1, 32), 448)
    spread = (2.0 ** (scales.astype(np.float32) - 127))[per_block((1, 32), x)]
    codes = nearest(x / spread, E4M3)
    tensors = {"weight": torch.from_numpy(codes).view(torch.float8_e4m3fn)}
    return tensors | {"weight_scale_inv": torch.from_numpy(scales)}, torch.from_numpy(
        (E4M3[codes] * spread).astype(np.float32)
    )


def pairs(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def mxfp4(weight: Tensor) -> tuple[NDArray[np.uint8], NDArray[np.uint8], Tensor]:
    """Nibbles [R, C / 2], exponents [R, C / 32] and the numbers."""
    x = weight.numpy()
    scales = exponents(x, (1, 32), 6)
    spread = (2.0 ** (scales.astype(np.float32) - 127))[per_block((1, 32), x)]
    codes = nearest(x / spread, E2M1)
    return pairs(codes), scales, torch.from_numpy((E2M1[codes] * spread).astype(np.float32))


def gpt_oss_experts(weight: Tensor) -> Stored:
    """From [E, C, R] as transformers has them; blocks are of the transposed matrix."""
    tensors: dict[str, list[Tensor]] = {"_blocks": [], "_scales": []}
    values = []
    for expert in weight:
        nibbles, scales, numbers = mxfp4(expert.t().contiguous())
        tensors["_blocks"].append(torch.from_numpy(nibbles).unflatten(1, (-1, 16)))
        tensors["_scales"].append(torch.from_numpy(scales))
        values.append(numbers.t())
    return {end: torch.stack(parts) for end, parts in tensors.items()}, torch.stack(values)


def fp8_experts(weight: Tensor) -> Stored:
    """Experts [E, R, C] in one tensor, in the order in which the model stores them."""
    each = [fp8((16, 32), torch.float32, "_scale_inv")(expert) for expert in weight]
    codes, scales = (torch.stack([one[0][end] for one in each]) for end in ("weight", "_scale_inv"))
    return {"": codes, "_scale_inv": scales}, torch.stack([numbers for _, numbers in each])


def deepseek_v4(weight: Tensor, is_expert: bool) -> Stored:
    """Experts in packed e2m1, the rest in FP8 blocks of 128; E8M0 scales both."""
    if is_expert:
        nibbles, scales, numbers = mxfp4(weight)
        codes = torch.from_numpy(nibbles).view(torch.int8)
        return {
            "weight": codes,
            "scale": torch.from_numpy(scales).view(torch.float8_e8m0fnu),
        }, numbers
    x = weight.numpy()
    scales = exponents(x, (128, 128), 448)
    spread = (2.0 ** (scales.astype(np.float32) - 127))[per_block((128, 128), x)]
    codes = nearest(x / spread, E4M3)
    return {
        "weight": torch.from_numpy(codes).view(torch.float8_e4m3fn),
        "scale": torch.from_numpy(scales).view(torch.float8_e8m0fnu),
    }, torch.from_numpy((E4M3[codes] * spread).astype(np.float32))


def modelopt_nvfp4(weight: Tensor) -> Stored:
    """e2m1 in groups of 16 with an e4m3 scale, and one fp32 number that multiplies these."""
    x = weight.numpy()
    overall = np.float32(np.abs(x).max() / (6 * 448))
    scales = nearest(largest(x, (1, 16)) / 6 / overall, E4M3)
    spread = (E4M3[scales] * overall)[per_block((1, 16), x)]
    codes = nearest(x / np.where(spread == 0, 1, spread), E2M1)
    return {
        "weight": torch.from_numpy(pairs(codes)),
        "weight_scale": torch.from_numpy(scales).view(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(overall),
        "input_scale": torch.tensor(1.0),
    }, torch.from_numpy(E2M1[codes] * spread)


def words(codes: NDArray[np.int64], axis: int, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Eight four-bit codes along `axis` in an int32: the first of `order` in the lowest bits."""
    codes = np.moveaxis(codes, axis, -1)
    parts = codes.reshape(*codes.shape[:-1], -1, 8).astype(np.uint64)
    out = sum(parts[..., column] << np.uint64(4 * place) for place, column in enumerate(order))
    packed = np.asarray(out).astype(np.uint32).view(np.int32)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(packed, -1, axis)))


def asymmetric(
    x: NDArray[np.float32], group: int, symmetric: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float16]]:
    """Codes [R, C] of 0 to 15, zeros and fp16 scales [R, C / group]."""
    grouped = x.reshape(x.shape[0], -1, group)
    low, high = np.minimum(grouped.min(-1), 0), np.maximum(grouped.max(-1), 0)
    scales = ((high - low) / 15).astype(np.float16)
    zeros = np.clip(np.round(-low / scales.astype(np.float32)), 1, 15)
    if symmetric:
        scales, zeros = (np.abs(grouped).max(-1) / 7).astype(np.float16), np.full_like(zeros, 8)
    codes = np.round(grouped / scales[..., None].astype(np.float32)) + zeros[..., None]
    return np.clip(codes, 0, 15).reshape(x.shape).astype(np.int64), zeros.astype(np.int64), scales


def awq(weight: Tensor) -> Stored:
    x = weight.numpy()
    codes, zeros, scales = asymmetric(x, 32)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    rows, groups = np.arange(x.shape[0])[:, None], np.arange(x.shape[1])[None] // 32
    numbers = (codes - zeros[rows, groups]) * scales.astype(np.float32)[rows, groups]
    return {
        "qweight": words(codes.T, 1, order),
        "qzeros": words(zeros.T, 1, order),
        "scales": torch.from_numpy(scales.T.copy()),
    }, torch.from_numpy(numbers.astype(np.float32))


def gptq(version: int, symmetric: bool, act_order: bool) -> Callable[..., Stored]:
    """The first version stores zeros less one; with `act_order` columns are grouped by `g_idx`."""

    def write(weight: Tensor) -> Stored:
        x, (_, n_columns) = weight.numpy(), weight.shape
        generator = np.random.default_rng(0)
        order = generator.permutation(n_columns) if act_order else np.arange(n_columns)
        codes_in_order, zeros, scales = asymmetric(x[:, order], 32, symmetric)
        g_idx, codes = np.empty(n_columns, np.int32), np.empty_like(codes_in_order)
        g_idx[order], codes[:, order] = np.arange(n_columns) // 32, codes_in_order
        numbers = (codes - zeros[:, g_idx]) * scales.astype(np.float32)[:, g_idx]
        return {
            "qweight": words(codes.T, 0),
            "qzeros": words(zeros.T - (version == 1), 1),
            "scales": torch.from_numpy(scales.T.copy()),
            "g_idx": torch.from_numpy(g_idx),
        }, torch.from_numpy(numbers.astype(np.float32))

    return write


def without(stored: Stored, end: str) -> Stored:
    tensors, numbers = stored
    return {key: tensor for key, tensor in tensors.items() if key != end}, numbers


def by_compressed_tensors(
    form: str, **arguments: Any
) -> tuple[dict[str, Any], Callable[..., Stored]]:
    """The library's own compressor and decompressor, and its config."""
    weights = QuantizationArgs(**arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    compressor = BaseCompressor.get_value_from_registry(form)
    config = {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": scheme.model_dump(mode="json")},
        "ignore": ["lm_head"],
    }

    def write(weight: Tensor) -> Stored:
        grouped = weight.reshape(len(weight), -1, weights.group_size or weight.shape[1])
        low, high = grouped.amin(-1), grouped.amax(-1)
        state = {"weight": weight.clone()}
        overall = generate_gparam(weight.min(), weight.max()) if form.startswith("nvfp4") else None
        scale, zero = calculate_qparams(low, high, weights, overall)
        scale = scale.bfloat16().float()  # so that the library, which rounds to it, is exact
        state |= {"weight_scale": scale, "weight_zero_point": zero}
        if overall is not None:
            state["weight_global_scale"] = overall.reshape(1)
        stored = compressor.compress(state, scheme)
        if overall is None:
            numbers = compressor.decompress(stored, scheme)["weight"].float()
            stored["weight_scale"] = scale.bfloat16()
        else:  # the library computes in bf16
            spread = stored["weight_scale"].float().repeat_interleave(16, dim=1) / overall
            packed = stored["weight_packed"].numpy()
            codes = np.stack((packed & 15, packed >> 4), axis=-1).reshape(weight.shape)
            numbers = torch.from_numpy(E2M1[codes]) * spread
        return {end: tensor.contiguous() for end, tensor in stored.items()}, numbers

    return config, write


@dataclass(frozen=True)
class Source:
    """An architecture, a `quantization_config` and how one weight is written.

    `becomes` is what --expert-dtype auto makes of its experts.
    """

    model: Callable[[], PreTrainedConfig]
    config: dict[str, Any]
    write: Callable[..., Stored]
    becomes: str
    files: int = field(default=1)


def _mixtral() -> PreTrainedConfig:
    return tiny_models.mixtral(hidden_size=64, intermediate_size=96)


def _qwen3() -> PreTrainedConfig:
    return tiny_models.qwen3_moe(hidden_size=64, moe_intermediate_size=96)


def _int4(**changes: Any) -> tuple[dict[str, Any], Callable[..., Stored]]:
    arguments = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    return by_compressed_tensors("pack-quantized", **{**arguments, **changes})


_FP8: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
_GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
SOURCES: dict[str, Source] = {
    "mxfp4": Source(
        lambda: tiny_models.gpt_oss(hidden_size=64, intermediate_size=96),
        {"quant_method": "mxfp4"}, gpt_oss_experts, "mxfp4", files=3,
    ),
    "fp8-transposed": Source(
        lambda: tiny_models.gpt_oss(hidden_size=64, intermediate_size=96),
        {**_FP8, "weight_block_size": [16, 32]}, fp8_experts, "bf16",
    ),
    "fp8-blocks": Source(
        lambda: tiny_models.deepseek_v3(hidden_size=64), {**_FP8, "weight_block_size": [16, 32]},
        fp8((16, 32), torch.float32, "weight_scale_inv"), "fp8",
    ),
    "fp8-bf16-scales": Source(
        lambda: tiny_models.qwen2_moe(hidden_size=64), {**_FP8, "weight_block_size": [8, 32]},
        fp8((8, 32), torch.bfloat16, "weight_scale_inv"), "fp8",
    ),
    "fp8-per-tensor": Source(
        _mixtral, {"quant_method": "modelopt", "quant_algo": "FP8"},
        fp8(None, torch.float32, "weight_scale"), "fp8",
    ),
    "mxfp8": Source(_qwen3, {**_FP8, "quant_method": "mxfp8"}, mxfp8, "fp8"),
    "deepseek-v4": Source(
        lambda: architectures.tiny_config("deepseek_v4"),
        {**_FP8, "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}, deepseek_v4, "mxfp4",
    ),
    "nvfp4-modelopt": Source(
        _qwen3, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, modelopt_nvfp4, "bf16"
    ),
    "awq": Source(
        _mixtral, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"},
        awq, "int4",
    ),
    "gptq": Source(_mixtral, {**_GPTQ, "sym": True}, gptq(1, True, False), "int4"),
    "gptq-v2": Source(
        _qwen3, {**_GPTQ, "checkpoint_format": "gptq_v2"}, gptq(2, False, False), "int4"
    ),
    "gptq-act-order": Source(_mixtral, {**_GPTQ, "desc_act": True}, gptq(1, False, True), "bf16"),
    "auto-round": Source(
        _qwen3,
        {
            "quant_method": "auto-round", "packing_format": "auto_round", "bits": 4,
            "data_type": "int", "group_size": 32, "sym": False,
        },
        lambda weight: without(gptq(2, False, False)(weight), "g_idx"), "int4",
    ),
    "int4": Source(_mixtral, *_int4(), "int4"),
    "int4-asymmetric": Source(_qwen3, *_int4(symmetric=False), "int4"),
    "int8": Source(
        _mixtral,
        *by_compressed_tensors("int-quantized", num_bits=8, type="int", strategy="channel"),
        "int8",
    ),
    "fp8-channels": Source(
        _qwen3,
        *by_compressed_tensors(
            "float-quantized", num_bits=8, type="float", strategy="channel", symmetric=True
        ),
        "fp8",
    ),
    "nvfp4": Source(
        _mixtral,
        *by_compressed_tensors(
            "nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group",
            group_size=16, symmetric=True,
        ),
        "bf16",
    ),
}  # fmt: skip


def write(name: str, folder: Path) -> tuple[Path, Path]:
    """`<folder>/quantised` and `<folder>/plain`, both under the hub's names."""
    source = SOURCES[name]
    model = tiny_models.build_model(source.model())
    plain: dict[str, Tensor] = {}
    quantised: dict[str, Tensor] = {}
    for key, tensor in tiny_models.hub_state_dict(model).items():
        stem, _, leaf = key.rpartition(".")
        if source.write in (gpt_oss_experts, fp8_experts):
            if leaf in ("gate_up_proj", "down_proj"):
                stored, plain[key] = source.write(tensor)
                quantised |= {key + end: part for end, part in stored.items()}
                continue
        elif leaf == "weight" and tensor.dim() == 2 and not _is_left_alone(stem):
            more = (".experts." in stem,) if source.write is deepseek_v4 else ()
            stored, plain[key] = source.write(tensor, *more)
            quantised |= {f"{stem}.{end}": part for end, part in stored.items()}
            continue
        plain[key] = quantised[key] = tensor
    assert len(quantised) > len(plain)
    config = json.loads(model.config.to_json_string())
    config["architectures"] = [type(model).__name__]
    _save(folder / "plain", plain, config, 1)
    config["quantization_config"] = source.config
    _save(folder / "quantised", quantised, config, source.files)
    return folder / "quantised", folder / "plain"


def _is_left_alone(stem: str) -> bool:
    return any(part in stem for part in ("embed", "head", "router", "shared_expert_gate")) or (
        stem.rpartition(".")[2] == "gate"
    )


def _save(folder: Path, state: dict[str, Tensor], config: dict[str, Any], n_files: int) -> None:
    """One file, or several with every layer's tensors spread over all of them."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    state = {name: tensor.contiguous().clone() for name, tensor in state.items()}
    if n_files == 1:
        save_file(state, folder / "model.safetensors")
        return
    names, weight_map = sorted(state), {}
    for position in range(n_files):
        file = f"model-{position + 1:05d}-of-{n_files:05d}.safetensors"
        part = {name: state[name] for name in names[position::n_files]}
        save_file(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
