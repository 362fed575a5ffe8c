"""The two commands that draw what runs left behind: `plots.py`, `patterns.py`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from moe_offload.commands.arguments import ArgumentParser, a_path, run_command
from moe_offload.errors import UserError, plain
from moe_offload.machine.terminal import show
from moe_offload.report.drawing import Drawing, house_style, save_drawing
from moe_offload.report.figures import (
    draw_breakdown,
    draw_comparison,
    draw_energy,
    draw_experts,
    draw_hits,
    draw_tokens,
)
from moe_offload.report.patterns import analyse, draw_patterns, format_patterns
from moe_offload.report.read_back import RunFiles, read_runs
from moe_offload.simulation.trace_files import read_trace


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
            for by in ("cache", "threads", "policy"):
                reason = f"no two runs differ in their {by} alone"
                keep(f"comparison by {by}", draw_comparison(runs, by), reason)
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
    trace = read_trace(arguments.trace, arguments.n_experts)
    found = analyse(trace)
    subject = trace.info.model + (" (synthetic routing)" if trace.info.synthetic else "")
    with house_style():
        paths = save_drawing(draw_patterns(found, subject), arguments.output_dir)
    _print([*format_patterns(found, trace.info), *map(str, paths)])
