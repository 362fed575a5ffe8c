"""Generate text with a Mixture-of-Experts model that does not fit in the GPU: the command line.

Parses, checks what can be checked at once, then loads and runs (`run.py`).
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from moe_offload import VERSION
from moe_offload.checkpoint.model_folders import require_prepared
from moe_offload.commands.arguments import build_parser, parse, parse_config
from moe_offload.commands.destinations import check_destinations
from moe_offload.commands.prompts import read_prompts
from moe_offload.config import Config
from moe_offload.errors import UserError
from moe_offload.kernels.kernel_library import describe_kernels
from moe_offload.machine.interruption import Interruption
from moe_offload.machine.terminal import say
from moe_offload.report.provenance import versions
from moe_offload.report.report_paths import ReportPaths
from moe_offload.simulation.model_shapes import shape_config
from moe_offload.simulation.trace_reader import TraceReader

EXIT_USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    debug = "--debug" in argv
    with Interruption() as interruption:
        try:
            return _main(argv, interruption)
        except KeyboardInterrupt:
            say(f"interrupted ({interruption.name}) before any token: no file was written")
            return interruption.exit_code
        except BrokenPipeError:  # such as `| head`: there is nobody left to tell
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_USER_ERROR
        except (UserError, OSError) as error:
            if debug:
                traceback.print_exc()
            say(f"error: {' '.join(str(error).split())}")
            return EXIT_USER_ERROR


def _main(argv: Sequence[str], interruption: Interruption) -> int:
    arguments = parse(argv)
    if arguments.version:
        print(_version_text())
        return 0
    if not argv:
        build_parser().print_usage(sys.stderr)
    config = parse_config(arguments)
    _check_sources(config)
    # The imports below are not at the top because torch and transformers take seconds to load:
    # help, versions and what is found wrong so far need not wait for them.
    if arguments.show_calibration:
        from moe_offload.commands.machine_measurement import show_calibration

        show_calibration(config)
        return 0
    texts = read_prompts(config.prompts)
    paths = ReportPaths.in_folder(
        config.output.output_dir, config.output.breakdown_csv, config.output.cachehit_csv
    )
    check_destinations(config, paths)
    from moe_offload.commands.run import run

    return run(config, texts, paths, argv, interruption)


def _check_sources(config: Config) -> None:
    """UserError where the model or a trace is not there, or is not one."""
    if config.model.model_path is not None:
        require_prepared(config.model.model_path)
    if config.model.dummy_shape is not None:
        shape_config(config.model.dummy_shape, config.model.dummy_layers)
    for trace in (config.model.routing_trace, config.cache.trace):
        if trace is not None:
            TraceReader(trace)


def _version_text() -> str:
    lines = [f"moe-cpu-gpu-inference {VERSION}", *describe_kernels()]
    lines += [f"{name} {number}" for name, number in versions().items() if number]
    return "\n".join(lines)
