"""Generate text with a Mixture-of-Experts model that does not fit in the GPU: the command line.

Parses and checks what can be checked at once: the flags, the model's folder, the prompts, and that
each result has a file of its own that can be written. Then loads and runs (`run.py`).
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from moe_offload import VERSION
from moe_offload.commands.answers import Answers
from moe_offload.commands.arguments import (
    build_parser,
    make_writable,
    parse_config,
    require_model,
    run_command,
    started_as,
)
from moe_offload.commands.imports import importing
from moe_offload.commands.prompts import LeftOut, read_prompts
from moe_offload.config import Config
from moe_offload.errors import UserError
from moe_offload.kernels.library import describe_kernels
from moe_offload.machine.terminal import (
    EXIT_USER_ERROR,
    Interruption,
    complain,
    say,
    show,
)
from moe_offload.report.files import ReportPaths, same_file_as, versions
from moe_offload.simulation.shapes import shape_config
from moe_offload.simulation.trace_files import TraceReader

_FLAGS = {"breakdown": "--breakdown-csv", "cachehit": "--cachehit-csv"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    with Interruption() as interruption:

        def work(arguments: Namespace) -> int:
            command = [started_as("src/main.py"), *argv]
            try:
                return _generate(arguments, command, interruption)
            except KeyboardInterrupt:
                say(f"interrupted ({interruption.name}) before any token: no file was written")
                return interruption.exit_code
            except BrokenPipeError:  # such as `| head`: there is nobody left to tell
                return EXIT_USER_ERROR

        return run_command(parser, work, argv)


def _generate(arguments: Namespace, command: list[str], interruption: Interruption) -> int:
    if arguments.version:
        libraries = [f"{name} {number}" for name, number in versions().items() if number]
        lines = [f"moe-cpu-gpu-inference {VERSION}", *describe_kernels(), *libraries]
        show("\n".join(lines))
        return 0
    config = parse_config(arguments)
    if config.model.ray is not None:
        config = replace(config, output=replace(config.output, record=False))
    _check_sources(config)
    # The imports below are not at the top because torch and transformers take seconds to load:
    # help, versions and what is found wrong so far need not wait for them.
    if arguments.show_calibration:
        say("loading, then measuring ...")
        with importing():
            from moe_offload.commands.measure import show_calibration

        show_calibration(config)
        return 0
    prompts, left_out = read_prompts(config.prompts, config.generation)
    output = config.output
    paths = ReportPaths.in_folder(output.output_dir, output.breakdown_csv, output.cachehit_csv)
    check_destinations(config, paths)
    with ExitStack() as stack:
        answers = None
        if output.responses_jsonl is not None:
            answers = stack.enter_context(Answers(output.responses_jsonl, config))
            prompts = answers.unanswered(prompts)
            answers.write_left_out(left_out)
            if not prompts and answers.n_before:
                say(f"all {answers.n_before} prompts are answered in {answers.path}")
                return _left_out_code(left_out)
        left_out.require_some(prompts)
        if not prompts:  # of fewer prompts than shards
            say(f"no prompt of {config.prompts.path} is in shard {config.prompts.shard}")
            return 0
        if config.model.ray is not None and answers is not None:
            from moe_offload.commands.cluster import run_on_cluster

            code = run_on_cluster(config, prompts, left_out, answers, interruption)
            return code or _left_out_code(left_out)
        if not output.quiet:
            say(f"loading {config.model.model_path or config.model.dummy_shape} ...")
        with importing():
            from moe_offload.commands.run import run

        code = run(config, prompts, left_out, answers, paths, command, interruption)
    return code or _left_out_code(left_out)


def _left_out_code(left_out: LeftOut) -> int:
    """The exit code of a run that did all the others."""
    if not left_out.reasons:
        return 0
    n_lines = len(left_out.reasons)
    complain(
        f"{n_lines} line{'s'[: n_lines > 1]} of {left_out.path} could not be answered (left out, "
        "see above); all others are"
    )
    return EXIT_USER_ERROR


def _check_sources(config: Config) -> None:
    """UserError where the model, a trace or Ray is not there, or is not one."""
    if config.model.ray is not None and find_spec("ray") is None:
        raise UserError(
            "--ray needs Ray: pip install -r requirements-ray.txt, or pip install '.[ray]'"
        )
    require_model(config.model)
    if config.model.dummy_shape is not None:
        shape_config(config.model.dummy_shape, config.model.dummy_layers)
    for trace in (config.model.routing_trace, config.cache.trace):
        if trace is not None:
            any(one.ids for one in TraceReader(trace))  # reads up to the first choices


def check_destinations(config: Config, paths: ReportPaths) -> None:
    """Make the folders of all results and try them; no file is left in them.

    UserError names the flag to change: for a folder that cannot be written, a folder in a file's
    place, two results in one file, a result in the place of what the run reads (the model, the
    prompts, a trace: under whatever name), and responses in a folder that neither is there nor is
    one of the other results'.
    """
    wanted: list[tuple[str, Path]] = []
    if config.output.record:
        # The names that nobody chose first: what takes one of them was asked for by its flag.
        named = sorted(paths.items(), key=lambda one: one[0] in _FLAGS)
        wanted += [(_FLAGS.get(name, "--output-dir"), path) for name, path in named]
    if config.output.responses_jsonl is not None:
        folder = config.output.responses_jsonl.parent
        made = {path.parent.resolve() for _, path in wanted}
        if not folder.exists() and folder.resolve() not in made:
            raise UserError(
                f"expected --responses-jsonl in a folder that is there, found no {folder}: make it "
                "or correct the path"
            )
        wanted.append(("--responses-jsonl", config.output.responses_jsonl))
    read = (
        ("the model is", config.model.model_path),
        ("the prompts are", config.prompts.path),
        ("a trace is", config.model.routing_trace),
        ("a trace is", config.cache.trace),
    )
    taken: set[Path] = set()
    for flag, path in wanted:
        another = f"choose another file with {flag}"
        if path.is_dir():
            raise UserError(f"cannot write {path}: it is a folder; name a file with {flag}")
        if path.exists() and not path.is_file() and flag != "--responses-jsonl":
            raise UserError(  # the finished file would take the device's place
                f"cannot write {path}: it is a device or pipe, not a file; name a file with {flag}"
                ", or --no-record"
            )
        for what, source in read:
            if source is not None and (same := same_file_as(path, [source])) is not None:
                also = "" if same == path else f", the same file as {same}"
                raise UserError(f"{what} read from {path}{also}: {another}")
        if path.resolve() in taken or same_file_as(path, taken) is not None:
            raise UserError(f"another of the run's files goes to {path}: {another}")
        taken.add(path.resolve())
        remedy = "" if flag == "--responses-jsonl" else ", or --no-record"
        make_writable(path.parent, flag + remedy)
