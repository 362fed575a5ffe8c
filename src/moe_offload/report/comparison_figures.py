"""Figures over one or several runs: where time goes, throughput by configuration, energy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moe_offload.report.figures import (
    BLUE,
    CYCLE,
    GREEN,
    GREY,
    HEAT_MAP,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    YELLOW,
)
from moe_offload.report.run_figures import Drawing
from moe_offload.report.run_files import RunFiles

PARTS = {
    "attention": BLUE,
    "router": SKY,
    "plan": YELLOW,
    "cpu": RED,
    "copy_wait": PURPLE,
    "combine": GREEN,
    "rest": GREY,
}


def draw_breakdown(runs: Sequence[RunFiles]) -> Drawing:
    """Mean forward pass of each run split into its parts, ms; decode and prefill apart."""
    figure = Figure(figsize=(6.4, 1.9 + 0.7 * len(runs)))
    panels = figure.subplots(1, 2)
    rows: list[tuple[Any, ...]] = []
    for axes, phase in zip(panels, ("decode", "prefill"), strict=True):
        for place, run in enumerate(runs):
            parts_ms, gpu_ms = _mean_parts_ms(run, phase)
            rows.append((run.label, phase, *parts_ms.values(), gpu_ms))
            left = 0.0
            for part, colour in PARTS.items():
                axes.barh(place, parts_ms[part], left=left, color=colour, height=0.6)
                left += parts_ms[part]
            if gpu_ms > 0:
                axes.plot(
                    [0, gpu_ms], [place - 0.38] * 2, color="black", linewidth=2.5,
                    solid_capstyle="butt",
                )  # fmt: skip
        axes.set_title(f"{phase}: mean forward pass")
        axes.set_xlabel("time (ms)")
        axes.set_yticks(range(len(runs)), [run.label for run in runs] if phase == "decode" else [])
        axes.set_ylim(len(runs) - 0.4, -0.6)
        axes.grid(False, axis="y")
    handles: list[Any] = [
        panels[0].barh(0, 0, color=colour, label=part.replace("_", " "))
        for part, colour in PARTS.items()
    ]
    handles += panels[0].plot([], [], color="black", linewidth=2.5, label="accelerator (beside)")
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    header = ("Run", "Phase", *(f"{part} (ms)" for part in PARTS), "gpu (ms)")
    return Drawing("breakdown", figure, header, rows)


def _mean_parts_ms(run: RunFiles, phase: str) -> tuple[dict[str, float], float]:
    wanted = run.decode if phase == "decode" else ~run.decode
    if not wanted.any():
        return dict.fromkeys(PARTS, 0.0), 0.0
    mean = {
        part: float(run.breakdown[part][wanted].mean()) * run.n_layers
        for part in (*PARTS, "gpu")
        if part != "rest"
    }
    gpu_ms = mean.pop("gpu")
    # Below zero by rounding alone, or where device time was counted twice: then nothing is left.
    mean["rest"] = max(0.0, float(run.breakdown["rest_ms"][wanted].mean()))
    return mean, gpu_ms


def draw_cache_sizes(runs: Sequence[RunFiles]) -> Drawing | None:
    """Throughput over N x M; None unless comparable runs have at least two cache sizes.

    Comparable are runs of one model, number of threads and batch size; of several such groups the
    one with the most cache sizes is drawn.
    """
    groups: dict[tuple[str, int, int], dict[tuple[int, int], list[float]]] = {}
    for run in runs:
        size = (run.fact("model", "cache_nblocks") or 0, run.fact("model", "cache_nways") or 0)
        kind = (
            str(run.fact("model", "name") or ""),
            int(run.document.get("n_threads") or 0),
            run.batch_size,
        )
        groups.setdefault(kind, {}).setdefault(size, []).append(_throughput(run))
    (_, threads, batch_size), points = max(groups.items(), key=lambda group: len(group[1]))
    if len(points) < 2:
        return None
    median = {size: float(np.median(values)) for size, values in sorted(points.items())}
    n_values, m_values = (sorted({size[axis] for size in median}) for axis in (0, 1))
    grid = np.full((len(m_values), len(n_values)), np.nan)
    for (n, m), value in median.items():
        grid[m_values.index(m), n_values.index(n)] = value
    figure = Figure(figsize=(2.6 + 0.75 * len(n_values), 2.0 + 0.5 * len(m_values)))
    axes = figure.subplots()
    image = axes.imshow(grid, aspect="auto", cmap=HEAT_MAP, origin="lower")
    axes.grid(False)
    middle = (float(np.nanmin(grid)) + float(np.nanmax(grid))) / 2
    for (row, column), value in np.ndenumerate(grid):
        if not np.isnan(value):
            colour = "black" if value > middle else "white"
            axes.text(column, row, f"{value:.3g}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(n_values)), [str(n) for n in n_values])
    axes.set_yticks(range(len(m_values)), [str(m) for m in m_values])
    axes.set_title(f"Generation throughput, {threads} threads, batch {batch_size}")
    axes.set_xlabel("cache indexes N")
    axes.set_ylabel("ways M")
    figure.colorbar(image, ax=axes, label="tokens/s")
    header = ("Cache Indexes N", "Ways M", "Throughput (tokens/s)", "Runs")
    rows = [(*size, value, len(points[size])) for size, value in median.items()]
    return Drawing("throughput_cache", figure, header, rows)


def draw_cores(runs: Sequence[RunFiles]) -> Drawing | None:
    """Throughput over CPU threads, one line per cache size; None with one thread count."""
    lines: dict[str, dict[int, list[float]]] = {}
    for run in runs:
        threads = run.document.get("n_threads")
        if isinstance(threads, int):
            n, m = (run.fact("model", name) or 0 for name in ("cache_nblocks", "cache_nways"))
            name = f"cache {n} x {m}" if n else "no cache"
            name += f", batch {run.batch_size}" if run.batch_size > 1 else ""
            series = lines.setdefault(name, {})
            series.setdefault(threads, []).append(_throughput(run))
    if len({threads for series in lines.values() for threads in series}) < 2:
        return None
    figure = Figure(figsize=(5.2, 3.6))
    axes = figure.subplots()
    rows: list[tuple[Any, ...]] = []
    for number, (name, series) in enumerate(sorted(lines.items())):
        median = {t: float(np.median(values)) for t, values in sorted(series.items())}
        marker = "osD^v<>P"[number % 8]
        colour = CYCLE[number % len(CYCLE)]
        axes.plot(list(median), list(median.values()), marker=marker, color=colour, label=name)
        rows += [(name, threads, value, len(series[threads])) for threads, value in median.items()]
    axes.set_title("Generation throughput by CPU threads")
    axes.set_xlabel("CPU threads")
    axes.set_ylabel("tokens/s")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    return Drawing(
        "throughput_cores", figure, ("Cache", "Threads", "Throughput (tokens/s)", "Runs"), rows
    )


def draw_energy(runs: Sequence[RunFiles]) -> Drawing | None:
    """Joules per generated token, CPU package and GPU; None where no run had a sensor."""
    rows = [(run.label, _mean(run, "CPU Energy (J)"), _mean(run, "GPU Energy (J)")) for run in runs]
    if all(cpu is None and gpu is None for _, cpu, gpu in rows):
        return None
    figure = Figure(figsize=(6.4, 1.5 + 0.45 * len(runs)))
    axes = figure.subplots()
    for place, (_, cpu_j, gpu_j) in enumerate(rows):
        _bar(axes, place, 0.0, cpu_j, ORANGE)
        _bar(axes, place, cpu_j or 0.0, gpu_j, BLUE)
        total = (cpu_j or 0.0) + (gpu_j or 0.0)
        axes.text(total, place, f" {total:.3g}", va="center")
    axes.barh(0, 0, color=ORANGE, label="CPU package")
    axes.barh(0, 0, color=BLUE, label="GPU")
    axes.set_title("Energy per generated token")
    axes.set_xlabel("J/token")
    axes.margins(x=0.12)
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(False, axis="y")
    figure.legend(loc="outside lower center", ncols=2)
    return Drawing("energy", figure, ("Run", "CPU (J/token)", "GPU (J/token)"), list(rows))


def _bar(axes: Axes, place: int, left: float, joules: float | None, colour: str) -> None:
    if joules is not None:
        axes.barh(place, joules, left=left, color=colour, height=0.6)


def _mean(run: RunFiles, column: str) -> float | None:
    values = run.tokens.get(column)
    if values is None or not len(values) or np.isnan(values).any():
        return None
    return float(values.mean())


def _throughput(run: RunFiles) -> float:
    return float(run.summary.get("generation_throughput") or 0.0)
