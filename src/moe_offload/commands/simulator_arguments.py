"""The command line of `simulator.py`: flags, defaults and help, and the cache they ask for."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from moe_offload.commands.argument_parser import ArgumentParser, a_path
from moe_offload.errors import UserError
from moe_offload.experts.replacement_policies import POLICIES
from moe_offload.simulation.autotune import FORMATS
from moe_offload.simulation.sweep import Setting
from moe_offload.simulation.traces import Trace

_EPILOG = """examples:
  python3 src/simulator.py expert_choices.csv --cache-nblocks 14 --cache-nways 4
  python3 src/simulator.py expert_choices.csv --sweep --output-dir sweeps
  python3 src/simulator.py --model mixtral-8x7b --hardware hardware/rtx4080.yaml --cores 8 --tune
  python3 src/simulator.py --paper --hardware hardware/rtx4090.yaml"""


def parse_simulation(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; raises UserError for a mistake in it."""
    parser = ArgumentParser(
        prog="simulator.py",
        description="Replay a routing trace through the expert cache: which N, which M, which "
        "policy, on which hardware, and how fast?",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    routing = parser.add_argument_group("routing")
    routing.add_argument(
        "trace",
        nargs="?",
        type=a_path,
        metavar="TRACE",
        help="expert_choices.csv, *.route.csv, JSON lines, or a JSON file of expert popularity",
    )
    routing.add_argument(
        "--synthetic",
        type=int,
        metavar="TOKENS",
        help="replay so many made-up tokens: fitted to TRACE, or typical for --model",
    )
    routing.add_argument("--seed", type=int, default=0, help="of synthetic routing (default 0)")
    routing.add_argument("--write-trace", type=a_path, metavar="FILE", help="save it as JSON lines")
    cache = parser.add_argument_group("cache")
    cache.add_argument("--cache-nblocks", type=int, metavar="N", help="indexes")
    cache.add_argument("--cache-nways", type=int, metavar="M", help="ways")
    cache.add_argument(
        "--cache-replace-policy",
        default="FIFO",
        metavar="P",
        help=f"{', '.join(POLICIES)} (default FIFO)",
    )
    cache.add_argument(
        "--cache-quota",
        type=int,
        default=64,
        metavar="Q",
        help="most background fetches of one forward pass (default 64)",
    )
    cache.add_argument(
        "--one-index",
        action="store_true",
        help="one index for all layers, as other tools cache: with --cache-nways",
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument("--hardware", type=a_path, metavar="FILE", help="see hardware/*.yaml")
    machine.add_argument("--cores", type=int, help="CPU cores, instead of the file's")
    machine.add_argument("--pcie", type=int, metavar="GEN", help="PCIe generation, likewise")
    machine.add_argument("--model", metavar="SHAPE", help="the expert's shape: mixtral-8x7b, ...")
    machine.add_argument("--expert-dtype", choices=FORMATS, default="bf16")
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument(
        "--sweep", action="store_true", help="N x M x policy to sweep.csv and sweep.png"
    )
    tasks.add_argument("--tune", action="store_true", help="the fastest cache and its Pareto front")
    tasks.add_argument("--memory-gb", type=float, help="for --tune; default: the GPU's free memory")
    tasks.add_argument(
        "--calibrate",
        type=a_path,
        metavar="FILE",
        help="measure this machine with experts of --model and write its hardware file",
    )
    tasks.add_argument("--paper", action="store_true", help="the paper's table beside predictions")
    tasks.add_argument("--output-dir", type=a_path, default=Path(), metavar="DIR")
    tasks.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, help="for --sweep (default: all)"
    )
    return parser.parse_args(argv)  # fmt: skip


def asked_setting(options: argparse.Namespace) -> Setting:
    """The cache that the flags ask for; raises UserError with the flag that is missing or wrong."""
    flags = {
        "--cache-nblocks": (options.cache_nblocks, 1),
        "--cache-nways": (options.cache_nways, 1),
        "--cache-quota": (options.cache_quota, 0),
    }
    for flag, (value, least) in flags.items():
        if value is None:
            raise UserError(
                f"expected {flag} of at least {least}, found none; give it, or --sweep, --tune or "
                "--paper"
            )
        if value < least:
            raise UserError(f"expected {flag} of at least {least}, found {value}")
    return Setting(
        options.cache_nblocks,
        options.cache_nways,
        options.cache_replace_policy,
        options.cache_quota,
    )


def cut_to_model(setting: Setting, trace: Trace) -> Setting:
    """The part of a cache that the trace's model can use, as the engine cuts it; says so."""
    fitted = replace(
        setting,
        n_indexes=min(setting.n_indexes, trace.n_layers),
        n_ways=min(setting.n_ways, trace.n_experts),
    )
    if fitted != setting:
        print(
            f"note: cache {setting.n_indexes} x {setting.n_ways} cut to {fitted.n_indexes} x "
            f"{fitted.n_ways}: the trace has {trace.n_layers} MoE layers of {trace.n_experts} "
            "experts"
        )
    return fitted
