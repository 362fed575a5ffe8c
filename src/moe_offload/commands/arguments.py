"""The command line of `main.py`: flags, their defaults and their help, and nothing else.

Prompts from the command line or a file, one per line.

How every entry point reads its command line: a mistake in it is one sentence."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import NoReturn

from moe_offload.config import (
    FAST_FORMATS,
    POLICIES,
    CacheOptions,
    Config,
    GenerationOptions,
    ModelOptions,
    OutputOptions,
    PromptOptions,
)
from moe_offload.errors import UserError


def a_path(text: str) -> Path:
    """The path that an argument names; an empty text, such as a variable unset, names none."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, found an empty text")
    return Path(text)


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, but a mistake raises UserError instead of printing the usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


_LARGEST_FILE_BYTES = 64 << 20  # a million long prompts; more is a wrong file


def read_prompts(options: PromptOptions) -> list[str]:
    """The prompts to run, in order; more than the file has cycles through it.

    A line ends at a line feed, a carriage return or both, and keeps its spaces; lines without text
    are skipped. UserError for an empty prompt, and for a file that is missing,
    empty, binary or too large to be a list of prompts.
    """
    if options.prompt is not None:
        if not options.prompt.strip():
            raise UserError("the prompt is empty: give --prompt some text")
        return [options.prompt] * (options.n_prompts or 1)
    assert options.path is not None
    lines = _lines(options.path)
    return list(islice(cycle(lines), options.n_prompts or len(lines)))


def _lines(path: Path) -> list[str]:
    try:
        size = path.stat().st_size
        if size > _LARGEST_FILE_BYTES:
            raise UserError(
                f"{path} has {size / 1e6:.0f} MB, expected a text file of prompts of at most "
                f"{_LARGEST_FILE_BYTES / 1e6:.0f} MB: split it"
            )
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read the prompt file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not a UTF-8 text file (byte {error.start}): expected one prompt per line"
        ) from error
    if "\0" in text:
        raise UserError(f"{path} is a binary file: expected text, one prompt per line")
    lines = [line for line in text.split("\n") if line.strip()]  # reading made all ends that
    if not lines:
        raise UserError(f"{path} holds no prompt: expected one per line")
    return lines


CALIBRATION_SHAPE = "mixtral-8x7b"  # where no model is named: its experts outgrow any CPU cache

_EPILOG = """examples:
  python3 src/main.py --model-path M --prompt "Explain quantum computing" --max-tokens 256
  python3 src/main.py --model-path M --prompt "..." --max-tokens 512 \\
      --cache-nblocks 14 --cache-nways 4 --cache-replace-policy LRU
  python3 src/main.py --model-path M --prompt-path prompts.txt --n-prompts 100 --max-tokens 256

OMP_NUM_THREADS sets the number of CPU kernel threads. M is a folder that
weights_preprocessor.py has prepared."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of `main.py`; mistakes raise UserError instead of exiting."""
    parser = ArgumentParser(
        prog="main.py",
        description="Generate text with a Mixture-of-Experts model that does not fit in the GPU.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_model(parser.add_argument_group("model"))
    _add_prompts(parser.add_argument_group("prompts (exactly one of the first two)"))
    _add_generation(parser.add_argument_group("generation"))
    _add_cache(parser.add_argument_group("expert cache"))
    _add_cpu(parser.add_argument_group("CPU experts"))
    _add_output(parser.add_argument_group("results"))
    other = parser.add_argument_group("other")
    other.add_argument(
        "--show-calibration",
        action="store_true",
        help="measure this machine, show it and exit; without a model: on one layer of the shape "
        f"that --dummy-weights names (default {CALIBRATION_SHAPE})",
    )
    other.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    other.add_argument("--version", action="store_true", help="show versions and CPU kernels, exit")
    return parser


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model-path", type=a_path, metavar="DIR", help="prepared model folder")
    group.add_argument(
        "--device", choices=("auto", "cuda", "cpu"), default="auto",
        help="where attention runs; auto: the GPU when there is one",
    )  # fmt: skip
    group.add_argument(
        "--attention", choices=("sdpa", "xformers"), default="sdpa", help="attention kernels"
    )
    group.add_argument(
        "--verify", action="store_true", help="check every byte of the folder before loading"
    )
    group.add_argument(
        "--dummy-weights", metavar="SHAPE",
        help="instead of a folder: random weights of a known model's shape (speed only; "
        "the text is meaningless)",
    )  # fmt: skip
    group.add_argument(
        "--dummy-layers", type=int, metavar="L", help="fewer layers than the shape has"
    )
    group.add_argument(
        "--dummy-format", choices=FAST_FORMATS, default="bf16",
        help="weight format of the random experts (default bf16)",
    )  # fmt: skip
    group.add_argument(
        "--routing-trace", type=a_path, metavar="FILE",
        help="with --dummy-weights: force the routing recorded in this trace",
    )  # fmt: skip


def _add_prompts(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--prompt", metavar="TEXT", help="one prompt")
    group.add_argument("--prompt-path", type=a_path, metavar="FILE", help="prompts, one per line")
    group.add_argument(
        "--n-prompts", type=int, metavar="N", help="how many; cycles through the file (default all)"
    )
    group.add_argument(
        "--raw-prompt", action="store_true", help="no chat template around the prompt"
    )


def _add_generation(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--max-tokens", type=int, metavar="N", help="tokens per prompt (required)")
    group.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="0 is greedy (default)"
    )
    group.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling mass (default 1)"
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="sampling seed (default 0)")
    group.add_argument(
        "--batch-size", type=int, default=1, metavar="B", help="prompts at a time (default 1)"
    )


def _add_cache(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--cache-nblocks", type=int, default=0, metavar="N",
        help="cache indexes: the first N MoE layers are cached (default 0)",
    )  # fmt: skip
    group.add_argument(
        "--cache-nways", type=int, default=0, metavar="M", help="experts per index (default 0)"
    )
    group.add_argument(
        "--cache-quota", type=int, default=64, metavar="Q",
        help="most background fetches of one forward pass (default 64)",
    )  # fmt: skip
    group.add_argument(
        "--cache-replace-policy", choices=POLICIES, default="FIFO", type=str.upper,
        help="which expert gives up its place (default FIFO)",
    )  # fmt: skip
    group.add_argument(
        "--cache-auto", action="store_true", help="choose N and M from free GPU memory and speeds"
    )
    group.add_argument(
        "--cache-memory-gb", type=float, metavar="X", help="with --cache-auto: use at most X GB"
    )
    group.add_argument(
        "--trace",
        type=a_path,
        metavar="FILE",
        help="with --cache-auto: a routing trace to tune on",
    )
    group.add_argument(
        "--miss-policy", choices=("cpu", "fetch", "auto"), default="cpu",
        help="a miss is computed on the CPU (default), waits for its copy, or whichever "
        "measures faster",
    )  # fmt: skip
    group.add_argument(
        "--prefetch", choices=("off", "next-layer"), default="off",
        help="fetch the experts the next layer's router is expected to choose",
    )  # fmt: skip
    group.add_argument(
        "--emulate-pcie-gbps", type=float, metavar="X",
        help="with --device cpu: slow the emulated accelerator's copies to X GB/s",
    )  # fmt: skip


def _add_cpu(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--cpu-kernel", choices=("auto", "native", "torch"), default="auto",
        help="own kernels, or plain torch as a reference",
    )  # fmt: skip
    group.add_argument(
        "--cpu-isa", default="auto", metavar="ISA",
        help="force an instruction set: scalar, avx2, avx512, ... (--version lists this CPU's)",
    )  # fmt: skip
    group.add_argument(
        "--cpu-affinity", metavar="LIST", help="pin kernel threads to CPUs, such as 0-7,16"
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--breakdown-csv", type=a_path, default=Path("out.csv"), metavar="FILE",
                       help="time per forward pass (default out.csv)")  # fmt: skip
    group.add_argument("--cachehit-csv", type=a_path, default=Path("cache.csv"), metavar="FILE",
                       help="hits per forward pass and layer (default cache.csv)")  # fmt: skip
    group.add_argument("--output-dir", type=a_path, metavar="DIR", help="put all CSVs there")
    group.add_argument("--responses-jsonl", type=a_path, metavar="FILE",
                       help="one line per prompt, written as soon as it is done")  # fmt: skip
    group.add_argument("--hide-resp", action="store_true", help="do not print responses")
    group.add_argument("--no-record", action="store_true", help="no events, no CSVs, no hit rates")
    group.add_argument("--nvtx", action="store_true", help="NVTX ranges for Nsight Systems")


def parse_config(arguments: argparse.Namespace) -> Config:
    """The checked configuration; UserError for values that make no sense."""
    prompt, prompt_path, max_tokens = arguments.prompt, arguments.prompt_path, arguments.max_tokens
    if prompt is None and prompt_path is None:
        if arguments.dummy_weights is not None:
            prompt = "Random weights have nothing to say."
        elif arguments.show_calibration:
            prompt = "Nothing is generated."
    if arguments.show_calibration:
        max_tokens = max_tokens or 1
        if arguments.model_path is None and arguments.dummy_weights is None:
            arguments.dummy_weights = CALIBRATION_SHAPE
    if max_tokens is None:
        raise UserError("--max-tokens is missing: say how many tokens to generate per prompt")
    if arguments.model_path is None and arguments.dummy_weights is None:
        raise UserError("--model-path is missing: name a folder weights_preprocessor.py prepared")
    if arguments.routing_trace is not None and arguments.dummy_weights is None:
        raise UserError("--routing-trace needs --dummy-weights: a real model routes for itself")
    if arguments.dummy_weights is None:
        for flag, given in (
            ("--dummy-layers", arguments.dummy_layers is not None),
            ("--dummy-format", arguments.dummy_format != "bf16"),
        ):
            if given:
                raise UserError(f"{flag} needs --dummy-weights: a real model has its own shape")
    if arguments.trace is not None and not arguments.cache_auto:
        raise UserError("--trace needs --cache-auto, which tunes the cache on it")
    return Config(
        model=ModelOptions(
            model_path=arguments.model_path,
            device=arguments.device,
            attention=arguments.attention,
            cpu_kernel=arguments.cpu_kernel,
            cpu_isa=arguments.cpu_isa,
            cpu_affinity=parse_cpu_list(arguments.cpu_affinity),
            verify=arguments.verify,
            dummy_shape=arguments.dummy_weights,
            dummy_layers=arguments.dummy_layers,
            dummy_format=arguments.dummy_format,
            routing_trace=arguments.routing_trace,
        ),
        cache=CacheOptions(
            n_indexes=arguments.cache_nblocks,
            n_ways=arguments.cache_nways,
            quota=arguments.cache_quota,
            policy=arguments.cache_replace_policy,
            auto=arguments.cache_auto,
            miss_policy=arguments.miss_policy,
            prefetch=arguments.prefetch,
            emulate_pcie_gbps=arguments.emulate_pcie_gbps,
            trace=arguments.trace,
            memory_gb=arguments.cache_memory_gb,
            seed=arguments.seed,
        ),
        generation=GenerationOptions(
            max_tokens=max_tokens,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            seed=arguments.seed,
            batch_size=arguments.batch_size,
        ),
        prompts=PromptOptions(
            prompt=prompt,
            path=prompt_path,
            n_prompts=arguments.n_prompts,
            raw=arguments.raw_prompt,
        ),
        output=OutputOptions(
            breakdown_csv=arguments.breakdown_csv,
            cachehit_csv=arguments.cachehit_csv,
            output_dir=arguments.output_dir,
            responses_jsonl=arguments.responses_jsonl,
            hide_responses=arguments.hide_resp,
            record=not arguments.no_record,
            nvtx=arguments.nvtx,
        ),
    )


def parse_cpu_list(text: str | None) -> tuple[int, ...] | None:
    """CPU numbers from a list such as `0-7,16`; UserError when it is not one."""
    if text is None:
        return None
    cpus: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            cpus.extend(range(int(first), int(last or first) + 1))
    except ValueError:
        cpus = []
    if not cpus:
        raise UserError(f"expected --cpu-affinity as a list such as 0-7,16, found '{text}'")
    return tuple(cpus)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The raw arguments; UserError for unknown or malformed flags."""
    return build_parser().parse_args(argv)
