"""Reuse of experts across layers and tokens: `python3 src/patterns.py expert_choices.csv`.

Prints the paper's pattern analysis as a table and writes it, with a figure, to --output-dir: each
measured figure stands beside the exact value that chance alone gives for that E and K.

Figures of one run or several: `python3 src/plots.py RUN_DIR... [--output-dir DIR]`.

Each figure is written as PNG and PDF, and its numbers as CSV: time breakdown, time per token with
throughput and sensors, cache hits by layer and over time, expert choices and their reuse by lag;
over several runs also throughput over cache sizes and CPU threads; energy per token where sensors
exist.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moe_offload.commands.arguments import ArgumentParser, a_path
from moe_offload.errors import UserError
from moe_offload.report.figures import (
    BLUE,
    GREEN,
    PURPLE,
    RED,
    Drawing,
    draw_breakdown,
    draw_cache_sizes,
    draw_cores,
    draw_energy,
    draw_experts,
    draw_hits,
    draw_tokens,
    house_style,
    save_figure,
)
from moe_offload.report.patterns import Patterns, analyse
from moe_offload.report.read_back import RunFiles, read_runs
from moe_offload.simulation.trace_files import read_trace
from moe_offload.simulation.traces import TraceInfo


def plots(argv: Sequence[str] | None = None) -> int:
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


HEADER = ("Reuse", "Layer", "Measured (%)", "Chance (%)", "Pairs")


def patterns(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
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
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    try:
        arguments = parser.parse_args(argv)
        if arguments.n_experts is not None and arguments.n_experts < 1:
            raise UserError(f"expected --n-experts of at least 1, found {arguments.n_experts}")
        trace = read_trace(arguments.trace, arguments.n_experts)
        patterns = analyse(trace)
        with house_style():
            figure = draw_patterns(patterns)
            paths = save_figure(
                figure, arguments.output_dir, "patterns", HEADER, pattern_rows(patterns)
            )
    except UserError as error:
        if "--debug" in argv:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        print(format_patterns(patterns, trace.info), *paths, sep="\n", flush=True)
    except BrokenPipeError:  # as with `| head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def format_patterns(patterns: Patterns, info: TraceInfo) -> str:
    """The table for people."""
    synthetic = " (synthetic routing: no model chose it)" if info.synthetic else ""
    lines = [
        f"{info.model}{synthetic}: {patterns.n_layers} layers, top-{patterns.top_k} of "
        f"{patterns.n_experts} experts, {patterns.n_tokens} decoded tokens",
        *info.notes,
        "",
        f"{'reuse, % of pairs':60}{'measured':>10}{'chance':>10}{'pairs':>10}",
    ]
    lines += [
        f"{reuse.name:60}{_percent(reuse.measured):>10}{_percent(reuse.chance):>10}"
        f"{reuse.n_pairs:>10}"
        for reuse in patterns.reuses
    ]
    return "\n".join([*lines, ""])


def _percent(share: float) -> str:
    """Two decimals, or two digits where those would be zeros; '-' where there is no pair."""
    if share != share:
        return "-"
    return f"{100 * share:.2f}" if share == 0 or share >= 1e-4 else f"{100 * share:.1e}"


def pattern_rows(patterns: Patterns) -> list[tuple[Any, ...]]:
    """The figure's numbers: each reuse over all layers, then by layer."""
    rows: list[tuple[Any, ...]] = []
    for reuse in patterns.reuses:
        rows.append((reuse.name, "all", 100 * reuse.measured, 100 * reuse.chance, reuse.n_pairs))
        n_pairs = reuse.n_pairs // max(len(reuse.by_layer), 1)
        rows += [
            (reuse.name, layer, 100 * share, 100 * reuse.chance, n_pairs)
            for layer, share in enumerate(reuse.by_layer)
        ]
    return rows


def draw_patterns(patterns: Patterns) -> Figure:
    """All kinds of reuse beside chance, and two of them by layer."""
    figure = Figure(figsize=(6.8, 6.2))
    top, bottom = figure.subplots(2, 1, height_ratios=[3, 2])
    places = np.arange(len(patterns.reuses))
    measured = [100 * reuse.measured for reuse in patterns.reuses]
    chance = [100 * reuse.chance for reuse in patterns.reuses]
    top.barh(places - 0.2, measured, height=0.36, color=BLUE, label="measured")
    top.barh(places + 0.2, chance, height=0.36, color=RED, hatch="///", alpha=0.6, label="chance")
    for place, reuse in enumerate(patterns.reuses):
        for offset, share in ((-0.2, reuse.measured), (0.2, reuse.chance)):
            if share == share:
                top.text(100 * share, place + offset, f" {_percent(share)}", va="center", size=7)
    top.set_yticks(places, [_wrapped(reuse.name) for reuse in patterns.reuses], size=8)
    top.invert_yaxis()
    top.margins(x=0.12)
    top.grid(False, axis="y")
    top.set_xlabel("pairs that show it (%)")
    top.set_title(
        f"Reuse of experts: top-{patterns.top_k} of {patterns.n_experts}, "
        f"{patterns.n_layers} layers, {patterns.n_tokens} tokens"
    )
    top.legend(loc="lower right")
    by_name = {reuse.name: reuse for reuse in patterns.reuses}
    lines = (
        ("previous token: at least one", BLUE, "o"),
        ("previous token: all", GREEN, "s"),
        ("next layer: at least one same index", PURPLE, "^"),
    )
    for name, colour, marker in lines:
        shares = [100 * share for share in by_name[name].by_layer]
        bottom.plot(shares, color=colour, marker=marker, markersize=3.5, label=name)
    one = 100 * by_name["previous token: at least one"].chance
    bottom.axhline(one, color=RED, linestyle="--", label="chance: at least one")
    bottom.set_title("By layer")
    bottom.set_xlabel("MoE layer")
    bottom.set_ylabel("pairs that show it (%)")
    bottom.set_ylim(0, 105)
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*bottom.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _wrapped(name: str) -> str:
    head, colon, tail = name.partition(": ")
    if colon:
        return f"{head}:\n{tail}"
    head, preposition, tail = name.partition(" with ")
    return f"{head}\nwith {tail}" if preposition else name
