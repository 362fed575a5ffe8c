"""weights_preprocessor.py's command line: a checkpoint as users have it -> a prepared folder."""

from __future__ import annotations

import errno
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from moe_offload import VERSION
from moe_offload.checkpoint.folders import is_hub_name, require_source
from moe_offload.commands.arguments import ArgumentParser, a_path, run_command
from moe_offload.commands.imports import importing
from moe_offload.config import DENSE_FORMATS, PACKED_FORMATS, WEIGHT_FORMATS
from moe_offload.errors import UserError
from moe_offload.files import LARGEST_JSON_BYTES, require_regular
from moe_offload.machine.terminal import say, show


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0 done or already done, 2 a user mistake, a bad file or a full disk, 130 interrupted.
    """
    parser = ArgumentParser(
        prog="weights_preprocessor.py",
        description="Prepare a Mixture-of-Experts checkpoint for src/main.py. The source is only "
        "read; an interrupted run goes on where it stopped when it is started again.",
    )
    parser.add_argument(
        "--input-path",
        type=a_path,
        required=True,
        help="the checkpoint's folder, a GGUF file, or a model's name on the hub, such as "
        "openai/gpt-oss-20b, which huggingface_hub then downloads into its cache",
    )
    parser.add_argument(
        "--revision", help="with a name of the hub: a branch, tag or commit (default main)"
    )
    parser.add_argument(
        "--output-path",
        type=a_path,
        required=True,
        help="the prepared folder; may be the same as --input-path",
    )
    parser.add_argument(
        "--hf",
        action="store_true",
        help="the input is a Hugging Face folder (config.json with safetensors or "
        "pytorch_model*.bin); without it: Mistral's native one (params.json with consolidated*); "
        "a GGUF file is known by its name",
    )
    parser.add_argument(
        "--expert-dtype",
        choices=("auto", *WEIGHT_FORMATS),
        default="auto",
        help="how the experts are stored, in bits per weight: "
        + ", ".join(f"{name} {facts.bits_per_weight:g}" for name, facts in WEIGHT_FORMATS.items())
        + "; auto (default): the smallest that holds a quantised checkpoint exactly, else bf16",
    )
    parser.add_argument(
        "--dense-dtype",
        choices=("auto", *DENSE_FORMATS),
        default="auto",
        help="how the rest is stored: auto is bf16, or fp32 with --expert-dtype fp32; "
        f"{' and '.join(PACKED_FORMATS)} pack the matrices of attention, shared experts and LM "
        "head, for runs without a GPU",
    )
    parser.add_argument(
        "--calibration-text",
        type=a_path,
        nargs="?",
        const=Path(),
        metavar="FILE",
        help="round int4 for what the experts see while the model reads this text, or without FILE "
        "docstrings of Python's library: better answers for hours of preparing a large model",
    )
    parser.add_argument(
        "--force", action="store_true", help="prepare again although the folder is prepared"
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {VERSION}")
    return run_command(parser, _prepare, argv)


def _prepare(arguments: Namespace) -> int:
    options = vars(arguments)
    source, revision = arguments.input_path, options.pop("revision")
    from_hub = is_hub_name(source)
    _require_calibration(arguments.calibration_text, arguments.expert_dtype)
    if not from_hub:
        require_source(source, arguments.hf)
        if revision is not None:
            raise UserError(
                f"expected --revision with a name of the hub as --input-path, found the folder "
                f"{source}"
            )
    elif source == arguments.output_path:
        raise UserError(f"expected a folder as --output-path, found the hub's name {source}")
    try:
        # Here and not at the top: torch and transformers take seconds to load. --help and a wrong
        # path need not wait for them, and Ctrl-C while they load is one line as well.
        with importing():
            from moe_offload.commands.prepare_model import prepare_model

        if from_hub:
            from moe_offload.checkpoint.hub import download

            options["input_path"] = download(str(source), revision, arguments.hf)
        done = prepare_model(**options)
    except OSError as error:
        raise UserError(_explain(error, arguments.output_path)) from error
    except KeyboardInterrupt:
        say("interrupted; run the same command again to go on")
        return 130
    with suppress(OSError):  # nobody reads it; prepared is prepared
        show(done)
    return 0


def _require_calibration(text: Path | None, expert_dtype: str) -> None:
    if text is None:
        return
    if expert_dtype != "int4":
        raise UserError(
            f"--calibration-text rounds int4, found --expert-dtype {expert_dtype}: leave it out, "
            "or ask for --expert-dtype int4"
        )
    if text != Path():
        try:
            require_regular(text, LARGEST_JSON_BYTES)
        except OSError as error:
            raise UserError(
                f"cannot read {text}: {error.strerror}; correct --calibration-text"
            ) from error


def _explain(error: OSError, output: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk of {output} is full; free some space and run the same command again, "
            "finished files are kept"
        )
    where = output if error.filename is None else error.filename
    in_the_way = isinstance(error, (FileExistsError, NotADirectoryError))
    reason = "a file is where a folder should be" if in_the_way else error.strerror or error
    return f"cannot write {where}: {reason}; choose another --output-path"
