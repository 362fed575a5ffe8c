"""Entry point of weights_preprocessor.py: a checkpoint as users have it -> a prepared folder."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

import torch
import transformers
from tqdm import tqdm

from checkpoint import MANIFEST_NAME, Manifest, read_manifest
from companion_files import copy_companions
from errors import UserError
from output_folder import exclusive, read_record, remove_prepared, tidy
from preparation import Formats, Preparation
from source_checkpoint import SourceCheckpoint, open_source
from version import VERSION

_DTYPES: Final = ("bf16", "fp32", "int8", "int4")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="weights_preprocessor.py",
        description="Prepare a Mixture-of-Experts checkpoint for src/main.py. The source is only "
        "read; an interrupted run goes on where it stopped when it is started again.",
    )
    parser.add_argument("--input-path", type=Path, required=True, help="the checkpoint's folder")
    parser.add_argument(
        "--output-path",
        type=Path,
        required=True,
        help="the prepared folder; may be the same as --input-path",
    )
    parser.add_argument(
        "--hf",
        action="store_true",
        help="the input is a Hugging Face folder (config.json with safetensors or "
        "pytorch_model*.bin); without it: Mistral's native one (params.json with consolidated*)",
    )
    parser.add_argument(
        "--expert-dtype",
        choices=_DTYPES,
        default="bf16",
        help="how the experts are stored: bf16 and fp32 as they are, int8 and int4 in groups of 32 "
        "(8.5 and 4.5 bits per weight); default bf16",
    )
    parser.add_argument(
        "--dense-dtype",
        choices=("auto", *_DTYPES),
        default="auto",
        help="how the rest is stored: auto is bf16, or fp32 with --expert-dtype fp32; int8 and "
        "int4 pack the matrices of attention, shared experts and LM head, for runs without a GPU",
    )
    parser.add_argument(
        "--force", action="store_true", help="prepare again although the folder is prepared"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks and library warnings")
    parser.add_argument("--version", action="version", version=f"%(prog)s {VERSION}")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with these arguments (default: the command line's); returns the exit code.

    0 done or already done, 2 a user mistake, a bad file or a full disk, 130 interrupted.
    """
    options = build_parser().parse_args(arguments)
    if not options.debug:
        transformers.logging.set_verbosity_error()
    try:
        return _run(options)
    except (UserError, OSError, KeyboardInterrupt) as error:
        if options.debug:
            traceback.print_exc()
        if isinstance(error, KeyboardInterrupt):
            print("interrupted; run the same command again to go on", file=sys.stderr)
            return 130
        reason = _explain(error, options.output_path) if isinstance(error, OSError) else error
        print(f"error: {reason}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    started_s = time.monotonic()
    dense_format = options.dense_dtype
    if dense_format == "auto":
        dense_format = "fp32" if options.expert_dtype == "fp32" else "bf16"
    formats = Formats(
        weight_format=options.expert_dtype,
        dense_format=dense_format,
        model_dtype=torch.float32 if dense_format == "fp32" else torch.bfloat16,
    )
    source = open_source(options.input_path, options.hf, formats.model_dtype)
    output: Path = options.output_path
    output.mkdir(parents=True, exist_ok=True)
    with exclusive(output):
        if (output / MANIFEST_NAME).exists():
            if not options.force:
                _require_same(read_manifest(output), source, formats)
                tidy(output)
                print(f"{output} is already prepared; --force prepares it again")
                return 0
            remove_prepared(output)
        manifest = _prepare(source, output, formats)
    print(_summary(manifest, time.monotonic() - started_s))
    return 0


def _prepare(source: SourceCheckpoint, output: Path, formats: Formats) -> Manifest:
    if source.unused:
        print(
            f"note: the model has no place for {len(source.unused)} tensors of the checkpoint, "
            f"such as {source.unused[0]}; they are left out",
            file=sys.stderr,
        )
    preparation = Preparation(source, output, formats)
    if read_record(output):
        print("found an interrupted preparation: keeping its finished files", file=sys.stderr)
    copy_companions(source.folder, output, source.config)
    with tqdm(
        total=preparation.total_bytes,
        unit="B",
        unit_scale=True,
        desc="preparing",
        disable=not sys.stderr.isatty(),
    ) as bar:
        created_with = {
            "tool": VERSION,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        }
        return preparation.run(created_with, on_bytes=lambda n_bytes: _advance(bar, n_bytes))


def _advance(bar: tqdm[NoReturn], n_bytes: int) -> None:
    bar.update(n_bytes)


def _require_same(manifest: Manifest, source: SourceCheckpoint, formats: Formats) -> None:
    """UserError unless the folder holds just what was asked for."""
    for flag, found, wanted in (
        ("--expert-dtype", manifest.weight_format, formats.weight_format),
        ("--dense-dtype", manifest.dense_format, formats.dense_format),
    ):
        if found != wanted:
            raise UserError(
                f"{manifest.folder} is prepared with {flag} {found}, this command asks for "
                f"{wanted}; add --force to replace it or choose another --output-path"
            )
    if manifest.source_fingerprint != source.fingerprint:
        raise UserError(
            f"{manifest.folder} was prepared from {manifest.source}, whose files were other than "
            f"those now in {source.folder}; add --force to replace it or choose another "
            "--output-path"
        )


def _summary(manifest: Manifest, duration_s: float) -> str:
    n_experts = sorted({layer.n_experts for layer in manifest.moe_layers})
    return (
        f"prepared {manifest.folder} in {duration_s:.1f} s: {len(manifest.moe_layers)} MoE layers "
        f"of {'/'.join(map(str, n_experts))} experts in {manifest.weight_format} "
        f"({manifest.expert_bytes / 1e9:.2f} GB), the rest in {manifest.dense_format} "
        f"({manifest.dense_bytes / 1e9:.2f} GB)"
    )


def _explain(error: OSError, output: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk of {output} is full; free some space and run the same command again, "
            "finished files are kept"
        )
    where = error.filename if error.filename is not None else output
    reason = os.strerror(error.errno) if error.errno is not None else str(error)
    return f"cannot write {where}: {reason}; choose another --output-path or mend its permissions"


if __name__ == "__main__":
    sys.exit(main())
