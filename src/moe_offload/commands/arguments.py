"""How every command reads its arguments and ends, and the command line that generates text.

Flags that set a field of `config` are made from it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar, get_args, get_origin

from moe_offload.checkpoint.folders import require_prepared, require_tokenizer
from moe_offload.config import (
    CacheOptions,
    Config,
    GenerationOptions,
    ModelOptions,
    OutputOptions,
    PromptOptions,
    choices_of,
    flag_of,
    kind_of,
)
from moe_offload.errors import UserError
from moe_offload.kernels.library import (
    default_threads,
    open_library,
    refused_cpus,
    require_isa,
)
from moe_offload.machine.terminal import answer

_Options = TypeVar("_Options")


def a_path(text: str) -> Path:
    """The path that an argument names; an empty text, such as a variable unset, names none."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, found an empty text")
    return Path(text)


def a_text(text: str) -> str:
    """The UTF-8 text of an argument, whatever the locale takes its bytes for."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:  # bytes that the locale has no character for
        with suppress(UnicodeDecodeError):
            return os.fsencode(text).decode()
        raise argparse.ArgumentTypeError("expected UTF-8 text, found other bytes") from None


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, but a mistake raises UserError instead of printing the usage and exiting.

    `prog` is the script that starts the command from a checkout; a command that was installed is
    called by its own name, moe-run and so on.
    """

    def __init__(self, prog: str | None = None, **more: Any) -> None:
        super().__init__(started_as(prog) if prog else None, **more)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def run_command(
    parser: ArgumentParser,
    work: Callable[[argparse.Namespace], int | None],
    argv: Sequence[str] | None,
) -> int:
    """The exit code of a command: its arguments (default: the command line's) parsed, and its work.

    What ends it early is told in one sentence; --debug, which every command has, shows where.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return answer(lambda: work(parser.parse_args(argv)) or 0, "--debug" in argv)


def make_writable(folder: Path, flag: str) -> None:
    """Make a folder and try it; UserError, with the flag to change, if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror
        raise UserError(
            f"cannot write results to {folder.resolve()} ({reason}): choose another {flag}"
        ) from error


def require_model(options: ModelOptions) -> None:
    """UserError for what can be found wrong with these options while torch is not loaded."""
    if options.model_path is not None:
        require_prepared(options.model_path)
        require_tokenizer(options.model_path)
    if options.attention == "xformers" and options.device == "cpu":
        raise UserError("--attention xformers needs an NVIDIA GPU: use --attention sdpa here")
    default_threads()
    cpus = options.cpu_affinity or ()
    if not set(cpus) <= os.sched_getaffinity(0):
        raise refused_cpus(cpus)
    if options.cpu_isa != "auto" and options.cpu_kernel != "torch":
        require_isa(open_library(), options.cpu_isa)


def started_as(script: str) -> str:
    """What the user has started: an installed command, else `script`."""
    name = Path(sys.argv[0]).name
    return name if name.startswith("moe-") else script


_MOST_CPUS = 1 << 16  # a list of more is a slip, and would take all memory
CALIBRATION_SHAPE = "mixtral-8x7b"  # where no model is named: its experts outgrow any CPU cache

_EPILOG = """examples:
  python3 src/main.py --model-path M --prompt "Explain quantum computing" --max-tokens 256
  python3 src/main.py --model-path M --prompt "..." --max-tokens 512 \\
      --cache-nblocks 14 --cache-nways 4 --cache-replace-policy LRU
  python3 src/main.py --model-path M --prompt-path prompts.txt --n-prompts 100 --max-tokens 256

OMP_NUM_THREADS sets the number of CPU kernel threads. M is a folder that
weights_preprocessor.py has prepared."""

# The groups of --help in their order, and the options whose flags are in them.
_GROUPS: Final[dict[str, Any]] = {
    "model": ModelOptions,
    "prompts (exactly one of the first two)": PromptOptions,
    "generation": GenerationOptions,
    "expert cache": CacheOptions,
    "results": OutputOptions,
}


def build_parser() -> ArgumentParser:
    """The parser; mistakes raise UserError instead of exiting.

    What it parses has an attribute for each field whose flag was given, and none for the others.
    """
    parser = ArgumentParser(
        prog="main.py",
        description="Generate text with a Mixture-of-Experts model that does not fit in the GPU.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.epilog = _EPILOG
    if parser.prog != "main.py":
        parser.epilog = _EPILOG.replace("python3 src/main.py", parser.prog).replace(
            "weights_preprocessor.py", "moe-prepare"
        )
    for title, options in _GROUPS.items():
        names = [one.name for one in fields(options) if flag_of(one).help]
        add_flags(parser.add_argument_group(title), options, *names)
    parser.add_argument(
        "--show-calibration",
        action="store_true",
        help="measure this machine, show it and exit; without a model: on one layer of the shape "
        f"that --dummy-weights names (default {CALIBRATION_SHAPE})",
    )
    parser.add_argument(
        "--version", action="store_true", help="show versions and CPU kernels, exit"
    )
    return parser


def add_flags(group: argparse._ActionsContainer, options: type, *names: str) -> None:
    """The flags of these fields; one that is not given leaves no attribute (see `chosen`)."""
    for one in fields(options):
        if one.name in names:
            flag = flag_of(one)
            group.add_argument(
                flag.name, dest=one.name, default=argparse.SUPPRESS, help=flag.help, **_reading(one)
            )


def _reading(one: Field[Any]) -> dict[str, Any]:
    """How argparse reads the flag."""
    kind = get_origin(kind_of(one)) or kind_of(one)
    if kind is bool:
        return {"action": "store_false" if one.default else "store_true"}
    if choices := choices_of(one):
        return {"choices": choices, "type": str.upper if kind is str else str}
    metavar = flag_of(one).usage.split()[1]
    if kind is tuple and str in get_args(one.type):
        return {"action": "append", "type": a_text, "metavar": metavar}
    readers = {str: a_text, Path: a_path, tuple: parse_cpu_list}
    return {"type": readers.get(kind, kind), "metavar": metavar}


def parse_config(arguments: argparse.Namespace) -> Config:
    """The checked configuration; UserError for values that make no sense."""
    given = dict(vars(arguments))
    has_prompt, has_model = given.keys() & {"prompt", "path"}, given.keys() & {"model_path"}
    if arguments.show_calibration:
        given.setdefault("max_tokens", 1)
        if not has_model:
            given.setdefault("dummy_shape", CALIBRATION_SHAPE)
    if not has_prompt and (arguments.show_calibration or "dummy_shape" in given):
        given["prompt"] = "Random weights have nothing to say."
    missing = [
        flag
        for flag, is_there in (
            ("--model-path DIR", given.keys() & {"model_path", "dummy_shape"}),
            ("--prompt TEXT or --prompt-path FILE", given.keys() & {"prompt", "path"}),
            ("--max-tokens N", "max_tokens" in given),
        )
        if not is_there
    ]
    if missing:
        raise UserError(
            f"missing: {', '.join(missing)}; --help has examples, and make demo shows all of it, "
            "from preparing a small model on"
        )
    parts: Any = fields(Config)
    return Config(**{part.name: chosen(part.type, given) for part in parts})


def chosen(options: Callable[..., _Options], given: dict[str, Any]) -> _Options:
    """The checked options whose flags were given, the others as they are by default."""
    names = {one.name for one in fields(options)} & given.keys()  # type: ignore[arg-type]
    lists = {name: tuple(given[name]) for name in names if isinstance(given[name], list)}
    return options(**{name: given[name] for name in names} | lists)


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """CPU numbers from a list such as `0-7,16`; UserError when it is not one."""
    cpus: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            end = int(last or first) + 1
            if end > _MOST_CPUS:
                raise ValueError
            cpus.extend(range(int(first), end))
    except ValueError:
        cpus = []
    if not cpus:
        raise UserError(f"expected --cpu-affinity as a list such as 0-7,16, found '{text}'")
    return tuple(cpus)
