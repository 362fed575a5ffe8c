"""Figures of one run or several: `python3 src/plots.py RUN_DIR... [--output-dir DIR]`.

Each figure is written as PNG and PDF, and its numbers as CSV: time breakdown, time per token with
throughput and sensors, cache hits by layer and over time, expert choices and their reuse by lag;
over several runs also throughput over cache sizes and CPU threads; energy per token where sensors
exist.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from moe_offload.commands.argument_parser import ArgumentParser, a_path
from moe_offload.errors import UserError
from moe_offload.report.comparison_figures import (
    draw_breakdown,
    draw_cache_sizes,
    draw_cores,
    draw_energy,
)
from moe_offload.report.figures import house_style, save_figure
from moe_offload.report.routing_patterns import analyse
from moe_offload.report.run_figures import Drawing, draw_experts, draw_hits, draw_tokens
from moe_offload.report.run_files import RunFiles, read_runs
from moe_offload.simulation.trace_reader import read_trace


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = ArgumentParser(
        description="Draw the figures of one run or several, with their numbers as CSV."
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=a_path,
        metavar="RUN_DIR",
        help="folder of src/main.py --output-dir (or a run.partial.json)",
    )
    parser.add_argument(
        "--output-dir",
        type=a_path,
        help="where the figures go (default: RUN_DIR/figures; with several runs: figures)",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    try:
        arguments = parser.parse_args(argv)
        runs = read_runs(arguments.runs)
        default = runs[0].folder / "figures" if len(runs) == 1 else Path("figures")
        written, left_out = draw_all(runs, arguments.output_dir or default)
    except UserError as error:
        if "--debug" in argv:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in left_out:
        print(line)
    for path in written:
        print(path)
    return 0


def draw_all(runs: Sequence[RunFiles], folder: Path) -> tuple[list[Path], list[str]]:
    """Draw every figure that the runs have data for; returns the files and what was left out."""
    written: list[Path] = []
    left_out: list[str] = []

    def keep(what: str, drawing: Drawing | None, reason: str, prefix: str = "") -> None:
        if drawing is None:
            left_out.append(f"left out: {what} ({reason})")
            return
        name = prefix + drawing.name
        written.extend(save_figure(drawing.figure, folder, name, drawing.header, drawing.rows))

    with house_style():
        keep("time breakdown", draw_breakdown(runs), "")
        keep("energy per token", draw_energy(runs), "no run had an energy sensor")
        if len(runs) > 1:
            keep(
                "throughput over cache sizes",
                draw_cache_sizes(runs),
                "no two comparable runs differ in cache size",
            )
            keep("throughput over cores", draw_cores(runs), "the runs have one number of threads")
        for run in runs:
            prefix = run.label.replace("/", "_") + "-" if len(runs) > 1 else ""
            named = f"{{}} of {run.label}" if len(runs) > 1 else "{}"
            keep(named.format("tokens"), draw_tokens(run), "no token after the first", prefix)
            keep(named.format("cache hits"), draw_hits(run), "the run had no cache", prefix)
            keep(named.format("expert choices"), *_experts(run), prefix)
    return written, left_out


def _experts(run: RunFiles) -> tuple[Drawing | None, str]:
    try:
        n_experts = run.fact("model", "n_experts")
        known = max(n_experts) if isinstance(n_experts, list) and n_experts else None
        return draw_experts(analyse(read_trace(run.choices, known))), ""
    except UserError as error:
        if not run.choices.exists():
            raise
        return None, str(error)
