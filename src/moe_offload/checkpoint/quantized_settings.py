"""What a `quantization_config` says, of those that are read, beside what its tensors say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from moe_offload.errors import UserError

_READABLE: Final = (
    "MXFP4, FP8, MXFP8, NVFP4, compressed-tensors, AWQ, GPTQ and AutoRound are read; download the "
    "model in one of these, or its unquantised version"
)


@dataclass(frozen=True)
class Settings:
    """What a `quantization_config` says that no tensor does.

    `bits` of an integer code, `block` of rows and columns that share a scale, where it says one;
    `zeros_less_one` are stored so (GPTQ's first format).
    """

    method: str
    bits: int = 4
    block: tuple[int, int] | None = None
    zeros_less_one: bool = False
    zeros_required: bool = False


def read_settings(found: Any, folder: str) -> Settings:
    """The settings of `quantization_config`; UserError, with a remedy, for what is not read.

    `folder` is what a message calls the checkpoint.
    """
    config = found if isinstance(found, Mapping) else {}
    method = str(config.get("quant_method", "an unknown method"))
    read = _METHODS.get(method)
    if read is None:
        raise UserError(f"{folder} is quantised with {method:.40}, which is not read: {_READABLE}")
    try:
        settings = read(method, config)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{folder} is quantised ({method}), and its quantization_config is not as {method} "
            f"writes it ({type(error).__name__}: {error!s:.100}); download config.json again"
        ) from error
    if isinstance(settings, str):
        raise UserError(
            f"{folder} is quantised with {method} in a way that is not read ({settings:.80}): "
            f"{_READABLE}"
        )
    return settings


def _from_fp8(method: str, config: Mapping[str, Any]) -> Settings | str:
    return Settings(method, block=_block(config.get("weight_block_size")))


def _block(found: Any) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None where the config does not say."""
    if found is None:
        return None
    rows, columns = (int(one) for one in found)
    if rows < 1 or columns < 1:
        raise ValueError(f"blocks of {found}")
    return rows, columns


def _group(columns: Any) -> tuple[int, int] | None:
    """The same of a "group_size", which is -1 or missing where whole rows share one."""
    return _block((1, columns)) if columns not in (None, -1) else None


def _from_gptq(method: str, config: Mapping[str, Any]) -> Settings | str:
    bits = int(config["bits"])
    form = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
    if bits not in (4, 8) or form not in ("gptq", "gptq_v2"):
        return f"{bits} bits, format {form}"
    block = _group(config["group_size"])
    return Settings(method, bits, block, zeros_less_one=form == "gptq", zeros_required=True)


def _from_awq(method: str, config: Mapping[str, Any]) -> Settings | str:
    bits = int(config.get("bits") or config["w_bit"])
    form = str(config.get("version") or config.get("format") or "gemm").lower()
    if bits != 4 or form != "gemm":
        return f"{bits} bits, version {form}"
    block = _group(config.get("group_size") or config["q_group_size"])
    return Settings(method, bits, block, zeros_required=True)


def _from_auto_round(_: str, config: Mapping[str, Any]) -> Settings | str:
    """The layout of AWQ or of GPTQ; what it calls its own is GPTQ's second."""
    packing = str(config.get("packing_format") or config.get("backend") or "auto_round")
    kind = str(config.get("data_type") or "int")
    if kind != "int" or not packing.startswith(("auto_round", "auto_gptq", "auto_awq")):
        return f"{kind}, {packing}"
    if "awq" in packing:
        return _from_awq("awq", {**config, "version": "gemm"})
    form = "gptq" if "gptq" in packing else "gptq_v2"
    return _from_gptq("gptq", {**config, "checkpoint_format": form})


def _from_compressed_tensors(method: str, config: Mapping[str, Any]) -> Settings | str:
    form = str(config.get("format"))
    if "24" in form or "mxfp6" in form:
        return f"format {form}"
    if config.get("transform_config"):
        return "transform_config: its activations are rotated"
    sparsity = config.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        return f"sparsity {sparsity['format']}"
    weights = [group["weights"] for group in config["config_groups"].values() if group["weights"]]
    bits = {int(one["num_bits"]) for one in weights if one.get("type", "int") == "int"}
    if bits - {4, 8} or len(bits) > 1:
        return f"{' and '.join(map(str, sorted(bits)))} bits"
    blocks = {
        _block(one.get("block_structure")) or _group(one.get("group_size")) for one in weights
    }
    return Settings(
        method,
        bits=min(bits, default=4),
        block=blocks.pop() if len(blocks) == 1 else None,
        zeros_required=bool(weights) and not any(one.get("symmetric", True) for one in weights),
    )


_METHODS: Final[Mapping[str, Callable[[str, Mapping[str, Any]], Settings | str]]] = {
    **dict.fromkeys(("fp8", "mxfp8", "fbgemm_fp8"), _from_fp8),
    **dict.fromkeys(
        ("mxfp4", "modelopt", "modelopt_fp4", "modelopt_mixed"),
        lambda method, config: Settings(method),
    ),
    "gptq": _from_gptq,
    "awq": _from_awq,
    **dict.fromkeys(("auto-round", "intel/auto-round"), _from_auto_round),
    "compressed-tensors": _from_compressed_tensors,
}
