"""The two commands that draw what runs left behind.

`python3 src/plots.py RUN_DIR... [--output-dir DIR]`: the figures of one run or several, each as
PNG, PDF and SVG, and its numbers as CSV. Time breakdown, time per token with throughput and
sensors, cache hits by layer and over time, expert choices and their reuse by lag; over several runs
also throughput over cache sizes and CPU threads, and policies beside each other; energy per token
where sensors exist.

`python3 src/patterns.py expert_choices.csv`: the paper's analysis of how often routing repeats
itself, as a printed table and a figure; each measured figure stands beside the exact value that
chance alone gives for that E and K.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from moe_offload.commands.arguments import ArgumentParser, a_path, run_command
from moe_offload.config import LARGEST, require_range
from moe_offload.errors import UserError, plain
from moe_offload.machine.terminal import show
from moe_offload.report.figures import (
    Drawing,
    draw_breakdown,
    draw_cache_sizes,
    draw_cores,
    draw_energy,
    draw_experts,
    draw_hits,
    draw_patterns,
    draw_policies,
    draw_tokens,
    house_style,
    save_drawing,
)
from moe_offload.report.patterns import Patterns, analyse
from moe_offload.report.read_back import RunFiles, read_runs
from moe_offload.simulation.trace_files import read_trace
from moe_offload.simulation.traces import TraceInfo


def plots(argv: Sequence[str] | None = None) -> int:
    """The figures of runs; returns the exit code."""
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
    return run_command(parser, _plots, argv)


def patterns(argv: Sequence[str] | None = None) -> int:
    """The pattern analysis of a trace; returns the exit code."""
    parser = ArgumentParser(
        description="How much expert routing repeats across layers and tokens, beside chance."
    )
    parser.add_argument(
        "trace", type=a_path, help="expert_choices.csv, *.route.csv or JSON lines of a run"
    )
    parser.add_argument(
        "--n-experts", type=int, help="experts per layer, where the trace does not say (CSV)"
    )
    parser.add_argument(
        "--output-dir", type=a_path, default=Path("figures"), help="default: figures"
    )
    return run_command(parser, _patterns, argv)


def _plots(arguments: Namespace) -> None:
    runs = read_runs(arguments.runs)
    default = runs[0].folder / "figures" if len(runs) == 1 else Path("figures")
    written, left_out = draw_all(runs, arguments.output_dir or default)
    _print([*left_out, *map(str, written)])


def _print(lines: Sequence[str]) -> None:
    show("\n".join(map(plain, lines)))


def draw_all(runs: Sequence[RunFiles], folder: Path) -> tuple[list[Path], list[str]]:
    """Draw every figure that the runs have data for; returns the files and what was left out."""
    written: list[Path] = []
    left_out: list[str] = []

    def keep(what: str, drawing: Drawing | None, reason: str, prefix: str = "") -> None:
        if drawing is None:
            left_out.append(f"left out: {what} ({reason})")
        else:
            written.extend(save_drawing(drawing, folder, prefix))

    with house_style():
        keep("time breakdown", draw_breakdown(runs), "")
        keep("energy per token", draw_energy(runs), "no run had an energy sensor")
        if len(runs) > 1:
            reason = "no two comparable runs differ in cache size"
            keep("throughput over cache sizes", draw_cache_sizes(runs), reason)
            keep("throughput over cores", draw_cores(runs), "the runs have one number of threads")
            reason = "no two comparable runs of one cache size differ in policy"
            keep("policies", draw_policies(runs), reason)
        for run in runs:
            prefix = run.label.replace("/", "_") + "-" if len(runs) > 1 else ""
            of_run = f" of {run.label}" if len(runs) > 1 else ""
            keep(f"tokens{of_run}", draw_tokens(run), "no token after the first", prefix)
            keep(f"cache hits{of_run}", draw_hits(run), "the run had no cache", prefix)
            keep(f"expert choices{of_run}", *_experts(run), prefix)
    return written, left_out


def _experts(run: RunFiles) -> tuple[Drawing | None, str]:
    try:
        return draw_experts(analyse(read_trace(run.choices, run.n_experts)), run), ""
    except UserError as error:
        return None, str(error)


def _patterns(arguments: Namespace) -> None:
    if arguments.n_experts is not None:
        require_range("--n-experts", arguments.n_experts, 1, LARGEST)
    trace = read_trace(arguments.trace, arguments.n_experts)
    found = analyse(trace)
    with house_style():
        paths = save_drawing(draw_patterns(found, trace.info.model), arguments.output_dir)
    _print([*format_patterns(found, trace.info), *map(str, paths)])


def format_patterns(patterns: Patterns, info: TraceInfo) -> list[str]:
    """The table for people, in lines."""
    synthetic = " (synthetic routing: no model chose it)" if info.synthetic else ""
    return [
        f"{info.model}{synthetic}: {patterns.n_layers} layers, top-{patterns.top_k} of "
        f"{patterns.n_experts} experts, {patterns.n_tokens} decoded tokens",
        *info.notes,
        "",
        f"{'reuse, % of pairs':60}{'measured':>10}{'chance':>10}{'pairs':>10}",
        *(
            f"{reuse.name:60}{_percent(reuse.measured):>10}{_percent(reuse.chance):>10}"
            f"{reuse.n_pairs:>10}"
            for reuse in patterns.reuses
        ),
        "",
    ]


def _percent(share: float) -> str:
    """Two decimals, or two digits where those would be zeros; '-' where there is no pair."""
    if share != share:
        return "-"
    return f"{100 * share:.2f}" if share == 0 or share >= 1e-4 else f"{100 * share:.1e}"
