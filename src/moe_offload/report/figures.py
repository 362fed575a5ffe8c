"""Figures over one or several runs: where time goes, throughput by configuration, energy.

The figures of one run: time per token, cache hits, expert choices.

How every figure of the project looks and is saved: PNG, PDF, and its numbers as CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moe_offload.errors import UserError
from moe_offload.report.patterns import Patterns
from moe_offload.report.read_back import RunFiles

# Okabe and Ito's palette: told apart with any kind of colour vision.
BLUE, SKY, YELLOW, ORANGE = "#0072B2", "#56B4E9", "#F0E442", "#E69F00"
RED, PURPLE, GREEN, GREY = "#D55E00", "#CC79A7", "#009E73", "#7F7F7F"
CYCLE = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, YELLOW, GREY)
LINE_STYLES = ("-", "--", "-.", ":")
HEAT_MAP = "cividis"

_STYLE: dict[str, object] = {
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
    "pdf.fonttype": 42,  # text stays text in papers
    "svg.hashsalt": "figures",
}


@contextmanager
def house_style() -> Iterator[None]:
    """Inside, figures are drawn in the project's style."""
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        yield


def save_figure(
    figure: Figure,
    folder: Path,
    name: str,
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
) -> list[Path]:
    """Write NAME.png, NAME.pdf and the drawn numbers as NAME.csv; returns the three paths.

    Raises UserError where `folder` cannot be written.
    """
    paths = [folder / f"{name}.{suffix}" for suffix in ("png", "pdf", "csv")]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with house_style():
            figure.savefig(paths[0])
            figure.savefig(paths[1], metadata={"CreationDate": None})
        with paths[2].open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            writer.writerows([_cell(value) for value in row] for row in rows)
    except OSError as error:
        raise UserError(
            f"expected to write figures to {folder}, but {error.strerror}: choose another folder"
        ) from error
    return paths


def _cell(value: object) -> object:
    """Six digits; empty for what is missing (None, not a number)."""
    if isinstance(value, float):
        return "" if value != value else f"{value:.6g}"
    return "" if value is None else value


Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Drawing:
    """A figure, its file name without suffix, and the numbers in it as a table."""

    name: str
    figure: Figure = field(repr=False)
    header: tuple[str, ...]
    rows: list[tuple[Any, ...]] = field(repr=False)


def draw_tokens(run: RunFiles) -> Drawing | None:
    """Time of each generated token, running throughput, CPU frequency and temperature.

    None for a run that generated no token after its prompts' first.
    """
    tokens = run.tokens
    n_tokens = len(tokens["Time"])
    if not n_tokens:
        return None
    index, time_ms = tokens["Index"], tokens["Time"] * 1e3
    throughput = tokens["Accumulated Generation Throughput (tokens/s)"]
    mhz, celsius = tokens["CPU Frequency"], tokens["CPU Temperature"]
    figure = Figure(figsize=(6.4, 5.4))
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[3, 2, 2])
    top.plot(index, time_ms, ".", color=BLUE, markersize=3)
    top.axhline(float(np.median(time_ms)), color=RED, linestyle="--", linewidth=1)
    top.set_title(f"Time per output token: median {np.median(time_ms):.3g} ms (dashed)")
    top.set_ylabel("time (ms)")
    # A pause of the machine must not flatten all else: the axis ends a little above most tokens.
    limit_ms = float(np.percentile(time_ms, 99)) * 1.3
    above = int((time_ms > limit_ms).sum())
    top.set_ylim(0, limit_ms)
    if above:
        top.text(0.995, 0.97, f"{above} above", transform=top.transAxes, ha="right", va="top")
    middle.plot(index, throughput, color=GREEN)
    middle.set_title("Throughput so far")
    middle.set_ylabel("tokens/s")
    middle.set_ylim(0, float(np.nanmax(throughput)) * 1.1)
    _draw_sensors(bottom, index, mhz, celsius)
    bottom.set_xlabel("generated token")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    header = ("Index", "Time (ms)", "Throughput (tokens/s)", "CPU Frequency", "CPU Temperature")
    columns = (index.astype(int), time_ms, throughput, mhz, celsius)
    return Drawing("tokens", figure, header, _rows(*columns))


def _draw_sensors(axes: Axes, index: Floats, mhz: Floats, celsius: Floats) -> None:
    has_mhz, has_celsius = not np.isnan(mhz).all(), not np.isnan(celsius).all()
    names = [
        name for name, present in (("frequency", has_mhz), ("temperature", has_celsius)) if present
    ]
    axes.set_title(f"CPU {' and '.join(names)}" if names else "CPU: no sensor on this machine")
    if has_mhz:
        axes.plot(index, mhz, color=BLUE)
        axes.set_ylabel("frequency (MHz)", color=BLUE)
        axes.set_ylim(0, float(np.nanmax(mhz)) * 1.15)
    else:
        axes.set_yticks([])
    if has_celsius:
        right = axes.twinx()
        right.spines["right"].set_visible(True)
        right.grid(False)
        right.plot(index, celsius, color=RED, linestyle="--")
        right.set_ylabel("temperature (°C), dashed", color=RED)
        right.set_ylim(0, float(np.nanmax(celsius)) * 1.25)


def draw_hits(run: RunFiles) -> Drawing | None:
    """Cache hit rate by layer, and over the run's decode steps; None without a cache."""
    decode = run.decode & (run.cachehit["Pairs"] > 0)
    if not decode.any():
        return None
    hits, tokens = run.hits[decode], run.cachehit["Tokens"][decode]
    choices = (run.cachehit["Hits"] + run.cachehit["Misses"])[decode]
    pairs = run.cachehit["Pairs"][decode]
    top_k, n_cached = round(choices[0] / pairs[0]), round(pairs[0] / tokens[0])
    by_layer = 100 * hits.sum(axis=0) / (tokens.sum() * top_k)
    over_time = 100 * run.cachehit["Hits"][decode] / choices
    window = int(min(32, len(over_time)))
    smooth = _running_mean(over_time, window)
    mean = 100 * run.cachehit["Hits"][decode].sum() / choices.sum()

    figure = Figure(figsize=(6.4, 4.6))
    top, bottom = figure.subplots(2, 1)
    layers = np.arange(run.n_layers)
    top.bar(layers[:n_cached], by_layer[:n_cached], color=BLUE, width=0.8)
    if n_cached < run.n_layers:
        top.axvspan(n_cached - 0.5, run.n_layers - 0.5, color=GREY, alpha=0.15, linewidth=0)
        top.text(
            (n_cached + run.n_layers - 1) / 2,
            50,
            "not cached",
            ha="center",
            va="center",
            color=GREY,
        )
    top.axhline(mean, color=RED, linestyle="--", linewidth=1)
    top.set_title(f"Per-expert hit rate by layer, decode: {mean:.1f}% over cached layers (dashed)")
    top.set_xlabel("MoE layer")
    top.set_xlim(-0.6, run.n_layers - 0.4)
    top.xaxis.set_major_locator(MaxNLocator(integer=True))
    bottom.plot(over_time, ".", color=GREY, markersize=2.5, label="one step")
    steps = np.arange(window - 1, len(over_time))
    bottom.plot(steps, smooth, color=BLUE, label=f"mean of {window} steps")
    bottom.set_title("Over the run")
    bottom.set_xlabel("decode step")
    bottom.legend(loc="lower right", ncols=2)
    for axes in (top, bottom):
        axes.set_ylabel("hit rate (%)")
        axes.set_ylim(-3, 103)  # points at 0 and 100 stay whole
    rows: list[tuple[Any, ...]] = [
        ("layer", layer, float(by_layer[layer]) if layer < n_cached else None)
        for layer in range(run.n_layers)
    ]
    rows += [("step", step, float(rate)) for step, rate in enumerate(over_time)]
    return Drawing("hits", figure, ("Axis", "Index", "Hit Rate (%)"), rows)


def _running_mean(values: Floats, window: int) -> Floats:
    return np.asarray(np.convolve(values, np.ones(window) / window, mode="valid"))


def draw_experts(patterns: Patterns) -> Drawing:
    """How often each expert of each layer was chosen, and reuse by lag beside chance."""
    figure = Figure(figsize=(6.4, 5.6))
    top, bottom = figure.subplots(2, 1, height_ratios=[3, 2])
    percent = 100 * patterns.popularity
    image = top.imshow(
        percent, aspect="auto", cmap=HEAT_MAP, interpolation="nearest", origin="lower", vmin=0
    )
    top.grid(False)
    even = 100 * patterns.top_k / patterns.n_experts
    top.set_title(f"How often each expert is chosen (even use: {even:.3g}%)")
    top.set_xlabel("expert")
    top.set_ylabel("MoE layer")
    for axis in (top.xaxis, top.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=top, label="tokens that choose it (%)")
    lags = np.arange(1, len(patterns.lags) + 1)
    measured = [100 * reuse.measured for reuse in patterns.lags]
    bottom.plot(lags, measured, "o-", color=BLUE, markersize=4, label="measured")
    skewed = 100 * patterns.shared_by_popularity
    bottom.axhline(skewed, color=GREEN, linestyle="-.", label="popularity alone")
    bottom.axhline(even, color=RED, linestyle="--", label="chance (K/E)")
    bottom.set_title("Experts shared with the token this far back")
    bottom.set_xlabel("lag (tokens)")
    bottom.set_ylabel("experts shared (%)")
    bottom.set_ylim(0, max(*measured, even, skewed) * 1.25)
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    bottom.legend(loc="upper right", ncols=3)
    rows: list[tuple[Any, ...]] = [
        ("popularity", layer, expert, float(percent[layer, expert]), even, None)
        for layer in range(patterns.n_layers)
        for expert in range(patterns.n_experts)
    ]
    rows += [
        ("lag", int(lag), None, value, even) for lag, value in zip(lags, measured, strict=True)
    ]
    header = (
        *("Kind", "Layer or Lag", "Expert", "Measured (%)", "Chance (%)"),
        "Popularity Alone (%)",
    )
    return Drawing("experts", figure, header, rows)


def _rows(*columns: Any) -> list[tuple[Any, ...]]:
    return list(zip(*(column.tolist() for column in columns), strict=True))


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
