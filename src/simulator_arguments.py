"""The command line of `simulator.py`: flags, their defaults and their help, and nothing else."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from argument_parser import ArgumentParser
from autotune import FORMATS
from replacement_policies import POLICIES

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
        type=Path,
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
    routing.add_argument("--write-trace", type=Path, metavar="FILE", help="save it as JSON lines")
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
    machine.add_argument("--hardware", type=Path, metavar="FILE", help="see hardware/*.yaml")
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
        type=Path,
        metavar="FILE",
        help="measure this machine with experts of --model and write its hardware file",
    )
    tasks.add_argument("--paper", action="store_true", help="the paper's table beside predictions")
    tasks.add_argument("--output-dir", type=Path, default=Path(), metavar="DIR")
    tasks.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, help="for --sweep (default: all)"
    )
    return parser.parse_args(argv)  # fmt: skip
