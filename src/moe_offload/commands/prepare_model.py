"""Preparing one checkpoint from the first look at it to the manifest."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Literal

import torch
import transformers

from moe_offload import VERSION
from moe_offload.checkpoint.folders import MANIFEST_NAME
from moe_offload.checkpoint.prepared import Manifest, read_manifest
from moe_offload.checkpoint.quantization import BY_TORCH, Packer
from moe_offload.checkpoint.source import SourceCheckpoint, copy_companions, open_source
from moe_offload.checkpoint.writer import (
    Formats,
    Preparation,
    claim,
    exclusive,
    read_record,
    size_text,
    tidy,
)
from moe_offload.config import WEIGHT_FORMATS, WeightFormat
from moe_offload.errors import UserError
from moe_offload.kernels.bindings import load_kernels
from moe_offload.kernels.cpu_quantise import KernelPacker
from moe_offload.machine.terminal import byte_bar, say
from moe_offload.model.sample_text import (
    FEWEST_INPUTS,
    N_WINDOWS,
    WINDOW,
    compensated,
    default_text,
    expert_bytes,
    windows_of,
)
from moe_offload.model.tokenization import check_tokenizer, load_tokenizer


def prepare_model(
    input_path: Path,
    output_path: Path,
    hf: bool = False,
    expert_dtype: WeightFormat | Literal["auto"] = "auto",
    dense_dtype: WeightFormat | Literal["auto"] = "auto",
    force: bool = False,
    debug: bool = False,
    calibration_text: Path | None = None,
) -> str:
    """Prepare a folder, or find that it is prepared; returns the sentence to tell the user.

    The arguments are the command line's: `expert_dtype` auto is the smallest format that holds a
    quantised source exactly, else bf16; `dense_dtype` auto is bf16, or fp32 with fp32 experts;
    `debug` shows the libraries' warnings; with `calibration_text` int4 is rounded for what the
    experts see in that file, or in the default text where it is `Path()`. Shows progress on a
    terminal's stderr. UserError for a bad checkpoint or folder; OSError of the disk passes through.
    """
    started_s = time.monotonic()
    text, digest = _sample(calibration_text)
    if not debug:
        transformers.logging.set_verbosity_error()
    if dense_dtype == "auto":
        dense_dtype = "fp32" if expert_dtype == "fp32" else "bf16"
    model_dtype = torch.float32 if dense_dtype == "fp32" else torch.bfloat16
    source = open_source(input_path, hf, model_dtype)
    exact, scales = expert_dtype == "auto", None
    if expert_dtype == "auto":
        expert_dtype, scales, rounded = source.find_format()
        if rounded is not None:
            say(
                f"note: no format here holds the experts exactly as they are (such as {rounded}), "
                "so that they are rounded to bf16"
            )
    exact = exact or bool(digest)
    formats = Formats(expert_dtype, dense_dtype, model_dtype, exact, scales, digest)
    if not source.made_files:
        check_tokenizer(source.folder, source.config.model_type)
    output_path.mkdir(parents=True, exist_ok=True)
    with exclusive(output_path):
        if (output_path / MANIFEST_NAME).exists() and not force:
            _require_same(read_manifest(output_path), source, formats)
            tidy(output_path)
            return f"{output_path} is already prepared; --force prepares it again"
        claim(output_path, source.folder)
        if digest:
            source = _compensate(source, output_path, text)
        manifest = _prepare(source, output_path, formats)
    return _summary(manifest, time.monotonic() - started_s)


def _sample(path: Path | None) -> tuple[str, str]:
    """The calibration text and its checksum; two empty texts without one."""
    if path is None:
        return "", ""
    if path == Path():
        text = default_text()
    else:
        text = path.read_text(encoding="utf-8", errors="replace")
    return text, hashlib.sha256(text.encode()).hexdigest()


def _compensate(source: SourceCheckpoint, output: Path, text: str) -> SourceCheckpoint:
    copy_companions(source, output)  # a GGUF file's tokenizer is in no file yet
    ids = load_tokenizer(output, source.config.model_type).encode(text, raw=True)
    if len(ids) < FEWEST_INPUTS:
        raise UserError(
            f"the calibration text has {len(ids)} tokens, expected at least {FEWEST_INPUTS}: "
            f"choose a longer one, best of {WINDOW * N_WINDOWS} tokens or more"
        )
    with byte_bar("reading the text", expert_bytes(source)) as advance:
        return compensated(source, windows_of(ids), advance)


def _prepare(source: SourceCheckpoint, output: Path, formats: Formats) -> Manifest:
    if source.unused:
        say(
            f"note: the model has no place for {len(source.unused)} tensors of the checkpoint, "
            f"such as {source.unused[0]}; they are left out"
        )
    preparation = Preparation(source, output, formats, _packer(formats))
    if read_record(output).get("key"):
        say("found an interrupted preparation: keeping its finished files")
    created_with = {
        "tool": VERSION,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }
    if formats.calibration:
        created_with["calibration_text"] = formats.calibration
    with byte_bar("preparing", preparation.total_bytes, leave=True) as advance:
        return preparation.run(created_with, on_bytes=advance)


def _packer(formats: Formats) -> Packer:
    """What makes tiles here: the C++ kernels, or torch where nothing can be compiled."""
    if not any(WEIGHT_FORMATS[one].group for one in (formats.weight_format, formats.dense_format)):
        return BY_TORCH
    try:
        kernels = load_kernels("native")
    except UserError as error:
        say(f"preparing with torch, which takes several times as long: {error}")
        return BY_TORCH
    assert kernels is not None
    return KernelPacker(kernels)


def _require_same(manifest: Manifest, source: SourceCheckpoint, formats: Formats) -> None:
    """UserError unless the folder holds just what was asked for."""
    calibration = manifest.created_with.get("calibration_text", "")
    for flag, found, wanted in (
        ("--expert-dtype", manifest.weight_format, formats.weight_format),
        ("--dense-dtype", manifest.dense_format, formats.dense_format),
        ("a --calibration-text of checksum", calibration or "none", formats.calibration or "none"),
    ):
        if found != wanted:
            raise UserError(
                f"{manifest.folder} is prepared with {flag} {found}, this command asks for "
                f"{wanted}; add --force to replace it or choose another --output-path"
            )
    layouts = {
        module.name: module.block_layout(formats.weight_format, formats.scales)
        for module in source.experts
    }
    if any(layer.layout != layouts.get(layer.module) for layer in manifest.moe_layers):
        raise UserError(
            f"{manifest.folder} is prepared in {formats.weight_format} with other scales than this "
            "command asks for: auto keeps the source's own, a format that is named rounds to its "
            "own; add --force to replace it or choose another --output-path"
        )
    if manifest.source_fingerprint != source.fingerprint:
        raise UserError(
            f"{manifest.folder} was prepared from {manifest.source}, whose files were other than "
            f"those now in {source.path}; add --force to replace it or choose another "
            "--output-path"
        )


def _summary(manifest: Manifest, duration_s: float) -> str:
    n_experts = sorted({layer.n_experts for layer in manifest.moe_layers})
    return (
        f"prepared {manifest.folder} in {duration_s:.1f} s: {len(manifest.moe_layers)} MoE layers "
        f"of {'/'.join(map(str, n_experts))} experts in {manifest.weight_format} "
        f"({size_text(manifest.expert_bytes)}), the rest in {manifest.dense_format} "
        f"({size_text(manifest.dense_bytes)})"
    )
