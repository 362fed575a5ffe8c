"""Every figure of the project and how all of them look and are saved.

A `draw_*` function gives a Drawing, or None where the runs have no data for it. First the figures
of one run, then those that set runs beside each other, then the pattern analysis.
"""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import fill
from typing import Any, TypeVar

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from moe_offload.errors import UserError, plain
from moe_offload.files import write_together
from moe_offload.report.patterns import Patterns
from moe_offload.report.read_back import Floats, RunFiles

# Okabe and Ito's palette: told apart with any kind of colour vision.
BLUE, SKY, YELLOW, ORANGE = "#0072B2", "#56B4E9", "#F0E442", "#E69F00"
RED, PURPLE, GREEN, GREY = "#D55E00", "#CC79A7", "#009E73", "#7F7F7F"
CYCLE = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, YELLOW, GREY)
MARKERS = "osD^v<>P"
HEAT_MAP = "cividis"
SUFFIXES = ("png", "pdf", "svg")

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
    "svg.fonttype": "none",
    "svg.hashsalt": "figures",  # the same figure is the same file
    "text.parse_math": False,  # a folder may have dollars in its name
}
# Dates would make two files of one figure differ.
_METADATA = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}

Rows = list[tuple[Any, ...]]
T = TypeVar("T")


@dataclass(frozen=True)
class Drawing:
    """A figure, its file name without suffix, and the numbers in it as a table."""

    name: str
    figure: Figure = field(repr=False)
    header: tuple[str, ...]
    rows: Rows = field(repr=False)


@contextmanager
def house_style() -> Iterator[None]:
    """Inside, figures are drawn in the project's style."""
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        yield


def save_drawing(drawing: Drawing, folder: Path, prefix: str = "") -> list[Path]:
    """Write the figure as PNG, PDF and SVG, and its numbers as CSV; returns the paths.

    Raises UserError where they cannot be written; then none is.
    """
    contents: dict[Path, list[bytes | str]] = {}
    with house_style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name in letters that the font has not
        for suffix in SUFFIXES:
            file = io.BytesIO()
            drawing.figure.savefig(file, format=suffix, metadata=_METADATA[suffix])
            contents[folder / f"{prefix}{drawing.name}.{suffix}"] = [file.getvalue()]
            drawing.figure.set_layout_engine("none")  # laid out once, which is most of the work
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(drawing.header)
    writer.writerows([_cell(value) for value in row] for row in drawing.rows)
    contents[folder / f"{prefix}{drawing.name}.csv"] = [table.getvalue()]
    try:
        write_together(contents)
    except OSError as error:
        raise UserError(
            f"expected to write figures to {folder}, but found at {error.filename}: "
            f"{error.strerror}: choose another folder"
        ) from error
    return list(contents)


def _cell(value: object) -> object:
    """Six digits; empty for what is missing (None, not a number)."""
    if isinstance(value, float):
        return "" if value != value else f"{value:.6g}"
    return "" if value is None else value


def _new_figure(width: float, height: float, *subjects: str) -> Figure:
    """A figure, in inches, that says over its panels what was measured."""
    figure = Figure(figsize=(width, height))
    known = plain(", ".join(filter(None, subjects)))
    if known:
        wrapped = fill(known[:400], int(16 * width))
        figure.suptitle(wrapped, x=0.01, ha="left", size=8, color=GREY)
    return figure


def _label(run: RunFiles) -> str:
    """The run's name, its end where it would leave no room for the figure."""
    label = plain(run.label)
    return label if len(label) <= 40 else f"...{label[-37:]}"


def _subject(runs: Sequence[RunFiles]) -> str:
    """The models and machines of these runs, each once."""
    models, machines = (
        " and ".join(dict.fromkeys(filter(None, names)))
        for names in ([run.model for run in runs], [run.machine for run in runs])
    )
    return " on ".join(filter(None, (models, machines)))


def _settings(run: RunFiles) -> str:
    """How the run was set, as far as it is known."""
    n, m = run.cache
    cache = f"cache {n} x {m} {run.policy}".rstrip() if n else "no cache"
    return ", ".join(filter(None, (_count(run.n_threads, "thread"), _batch(run), cache)))


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}" if n else ""


def _batch(run: RunFiles) -> str:
    return f"batch {run.batch_size}" if run.batch_size > 1 else ""


def _top(values: npt.ArrayLike, room: float) -> float:
    """Where an axis from 0 ends: `room` times the highest value, NaN left out."""
    return room * float(np.nanmax(values, initial=0.0)) or 1.0


def _whole_numbers(*axes: Any) -> None:
    for axis in axes:
        axis.set_major_locator(MaxNLocator(integer=True))


def draw_tokens(run: RunFiles) -> Drawing | None:
    """Time of each generated token, running throughput, CPU frequency and temperature.

    None for a run that generated no token after its prompts' first.
    """
    tokens = run.tokens
    if not len(tokens["Time"]):
        return None
    index, time_ms = tokens["Index"], tokens["Time"] * 1e3
    throughput = tokens["Accumulated Generation Throughput (tokens/s)"]
    mhz, celsius = tokens["CPU Frequency"], tokens["CPU Temperature"]
    figure = _new_figure(6.4, 5.4, _subject([run]), _settings(run))
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[3, 2, 2])
    top.plot(index, time_ms, ".", color=BLUE, markersize=3)
    top.axhline(float(np.median(time_ms)), color=RED, linestyle="--", linewidth=1)
    top.set_title(f"Time per output token: median {np.median(time_ms):.3g} ms (dashed)")
    top.set_ylabel("time (ms)")
    # A pause of the machine must not flatten all else: the axis ends a little above most tokens.
    limit_ms = _top(np.percentile(time_ms, 99), 1.3)
    above = int((time_ms > limit_ms).sum())
    top.set_ylim(0, limit_ms)
    if above:
        top.text(0.995, 0.97, f"{above} above", transform=top.transAxes, ha="right", va="top")
    middle.plot(index, throughput, color=GREEN)
    middle.set_title("Throughput so far")
    middle.set_ylabel("tokens/s")
    middle.set_ylim(0, _top(throughput, 1.1))
    _draw_sensors(bottom, index, mhz, celsius)
    bottom.set_xlabel("generated token")
    _whole_numbers(bottom.xaxis)
    header = ("Index", "Time (ms)", "Throughput (tokens/s)", "CPU Frequency", "CPU Temperature")
    columns = (index.astype(int), time_ms, throughput, mhz, celsius)
    return Drawing("tokens", figure, header, list(zip(*(c.tolist() for c in columns), strict=True)))


def _draw_sensors(axes: Axes, index: Floats, mhz: Floats, celsius: Floats) -> None:
    has_mhz, has_celsius = not np.isnan(mhz).all(), not np.isnan(celsius).all()
    present = (("frequency", has_mhz), ("temperature", has_celsius))
    names = [name for name, there in present if there]
    axes.set_title(f"CPU {' and '.join(names)}" if names else "CPU: no sensor on this machine")
    if has_mhz:
        axes.plot(index, mhz, color=BLUE)
        axes.set_ylabel("frequency (MHz)", color=BLUE)
        axes.set_ylim(0, _top(mhz, 1.15))
    else:
        axes.set_yticks([])
    if has_celsius:
        right = axes.twinx()
        right.spines["right"].set_visible(True)
        right.grid(False)
        right.plot(index, celsius, color=RED, linestyle="--")
        right.set_ylabel("temperature (°C), dashed", color=RED)
        right.set_ylim(0, _top(celsius, 1.25))


def draw_hits(run: RunFiles) -> Drawing | None:
    """Cache hit rate by layer, and over the run's decode steps; None without a cache."""
    decode = run.decode & (run.cachehit["Pairs"] > 0)
    if not decode.any():
        return None
    tokens, pairs, n_hits, n_misses = (
        run.cachehit[name][decode] for name in ("Tokens", "Pairs", "Hits", "Misses")
    )
    choices = n_hits + n_misses
    top_k, n_cached = round(choices[0] / pairs[0]), round(pairs[0] / tokens[0])
    by_layer = 100 * run.hits[decode].sum(axis=0) / (tokens.sum() * top_k)
    over_time = 100 * n_hits / choices
    mean = 100 * n_hits.sum() / choices.sum()
    figure = _new_figure(6.4, 4.6, _subject([run]), _settings(run))
    top, bottom = figure.subplots(2, 1)
    top.bar(np.arange(n_cached), by_layer[:n_cached], color=BLUE, width=0.8)
    if n_cached < run.n_layers:
        left, right = n_cached - 0.5, run.n_layers - 0.5
        top.axvspan(left, right, color=GREY, alpha=0.15, linewidth=0)
        top.text((left + right) / 2, 50, "not cached", ha="center", va="center", color=GREY)
    top.axhline(mean, color=RED, linestyle="--", linewidth=1)
    top.set_title(f"Per-expert hit rate by layer, decode: {mean:.1f}% over cached layers (dashed)")
    top.set_xlabel("MoE layer")
    top.set_xlim(-0.6, run.n_layers - 0.4)
    _whole_numbers(top.xaxis, bottom.xaxis)
    window = max(1, min(32, len(over_time) // 4))
    smooth = np.convolve(over_time, np.ones(window) / window, mode="valid")
    bottom.plot(over_time, ".", color=GREY, markersize=2.5, label="one step")
    steps = np.arange(window - 1, len(over_time))
    bottom.plot(steps, smooth, color=BLUE, label=f"mean of {window} steps")
    bottom.set_title("Over the run")
    bottom.set_xlabel("decode step")
    bottom.legend(loc="lower right", ncols=2)
    for axes in (top, bottom):
        axes.set_ylabel("hit rate (%)")
        axes.set_ylim(-3, 103)  # points at 0 and 100 stay whole
    rows: Rows = [
        ("layer", layer, float(rate) if layer < n_cached else None)
        for layer, rate in enumerate(by_layer)
    ]
    rows += [("step", step, float(rate)) for step, rate in enumerate(over_time)]
    return Drawing("hits", figure, ("Axis", "Index", "Hit Rate (%)"), rows)


def draw_experts(patterns: Patterns, run: RunFiles) -> Drawing:
    """How often each expert of each layer was chosen, and reuse by lag beside chance."""
    figure = _new_figure(6.4, 5.6, _subject([run]))
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
    figure.colorbar(image, ax=top, label="tokens that choose it (%)")
    lags = list(range(1, len(patterns.lags) + 1))
    measured = [100 * reuse.measured for reuse in patterns.lags]
    bottom.plot(lags, measured, "o-", color=BLUE, markersize=4, label="measured")
    skewed = 100 * patterns.shared_by_popularity
    bottom.axhline(skewed, color=GREEN, linestyle="-.", label="popularity alone")
    bottom.axhline(even, color=RED, linestyle="--", label="chance (K/E)")
    bottom.set_title("Experts shared with the token this far back")
    bottom.set_xlabel("lag (tokens)")
    bottom.set_ylabel("experts shared (%)")
    bottom.set_ylim(0, max(*measured, even, skewed) * 1.25)
    bottom.legend(loc="upper right", ncols=3)
    _whole_numbers(top.xaxis, top.yaxis, bottom.xaxis)
    rows: Rows = [
        ("popularity", layer, expert, float(share), even)
        for (layer, expert), share in np.ndenumerate(percent)
    ]
    rows += [("lag", lag, None, value, even) for lag, value in zip(lags, measured, strict=True)]
    header = ("Kind", "Layer or Lag", "Expert", "Measured (%)", "Chance (%)")
    return Drawing("experts", figure, header, rows)


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
    figure = _new_figure(6.4, 2.2 + 0.7 * len(runs), _subject(runs))
    panels = figure.subplots(1, 2)
    rows: Rows = []
    for axes, phase in zip(panels, ("decode", "prefill"), strict=True):
        for place, run in enumerate(runs):
            parts_ms, gpu_ms = _mean_parts_ms(run, phase)
            rows.append((run.label, phase, *parts_ms.values(), gpu_ms))
            left = 0.0
            for part, colour in PARTS.items():
                axes.barh(place, parts_ms[part], left=left, color=colour, height=0.6)
                left += parts_ms[part]
            if gpu_ms > 0:  # beside the CPU's work: a thin bar above
                axes.barh(place - 0.38, gpu_ms, height=0.07, color="black")
        axes.set_title(f"{phase}: mean forward pass")
        axes.set_xlabel("time (ms)")
        names = [f"{_label(run)}\n" + _settings(run).replace(", ", ",\n") for run in runs]
        axes.set_yticks(range(len(runs)), names if phase == "decode" else [])
        axes.set_ylim(len(runs) - 0.4, -0.6)
        axes.grid(False, axis="y")
    colours = PARTS | {"accelerator (beside)": "black"}
    handles = [
        Patch(color=colour, label=part.replace("_", " "))
        for column, (part, colour) in enumerate(colours.items(), 2)
        if any(row[column] for row in rows)
    ]
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


def _grouped(runs: Iterable[RunFiles], key: Callable[[RunFiles], T]) -> dict[T, list[RunFiles]]:
    groups: dict[T, list[RunFiles]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


def _comparable(run: RunFiles) -> Hashable:
    """Runs with the same differ in their caches alone."""
    return run.model, run.machine, run.n_threads, run.batch_size


def _median_throughput(runs: Iterable[RunFiles]) -> float:
    return float(np.median([run.throughput for run in runs]))


def draw_cache_sizes(runs: Sequence[RunFiles]) -> Drawing | None:
    """Throughput over N x M; None unless comparable runs have at least two cache sizes.

    Comparable are runs of one model, machine, number of threads, batch size and policy; of several
    such groups the one with the most cache sizes is drawn. A heat map where every N was run with
    every M, else bars.
    """
    candidates = [
        _grouped([run for run in group if run.policy in (policy, "")], lambda run: run.cache)
        for group in _grouped(runs, _comparable).values()
        for policy in {run.policy for run in group}
    ]
    sizes = dict(sorted(max(candidates, key=len).items()))
    if len(sizes) < 2:
        return None
    median = {size: _median_throughput(group) for size, group in sizes.items()}
    cached = {size: value for size, value in median.items() if size != (0, 0)}
    n_values, m_values = (sorted({size[axis] for size in cached}) for axis in (0, 1))
    first, last = min(sizes.values(), key=len)[0], list(sizes.values())[-1][0]
    settings = (_count(first.n_threads, "thread"), _batch(first), last.policy)
    is_grid = len(n_values) > 1 < len(m_values) and len(cached) == len(n_values) * len(m_values)
    width = max(4.4, 2.6 + 0.75 * len(n_values)) if is_grid else 5.2
    height = 2.2 + 0.5 * len(m_values) if is_grid else 1.6 + 0.32 * len(median)
    figure = _new_figure(width, height, _subject([first]), *settings)
    axes = figure.subplots()
    if is_grid:
        grid = np.array([[cached[n, m] for n in n_values] for m in m_values])
        image = axes.imshow(grid, aspect="auto", cmap=HEAT_MAP, origin="lower")
        for (row, column), value in np.ndenumerate(grid):
            colour = "black" if value > (grid.min() + grid.max()) / 2 else "white"
            axes.text(column, row, f"{value:.3g}", ha="center", va="center", color=colour)
        axes.grid(False)
        axes.set_xticks(range(len(n_values)), map(str, n_values))
        axes.set_yticks(range(len(m_values)), map(str, m_values))
        axes.set_xlabel("cache indexes N")
        axes.set_ylabel("ways M")
        figure.colorbar(image, ax=axes, label="tokens/s")
    else:
        axes.barh(range(len(median)), list(median.values()), color=BLUE, height=0.6)
        for place, value in enumerate(median.values()):
            axes.text(value, place, f" {value:.3g}", va="center")
        names = [f"{n} x {m}" if n else "no cache" for n, m in median]
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.grid(False, axis="y")
        axes.set_xlabel("tokens/s")
        axes.set_ylabel("cache N x M")
    without = f" (no cache: {median[0, 0]:.3g})" if is_grid and (0, 0) in median else ""
    axes.set_title(f"Generation throughput by cache size{without}")
    header = ("Cache Indexes N", "Ways M", "Throughput (tokens/s)", "Runs")
    rows = [(*size, value, len(sizes[size])) for size, value in median.items()]
    return Drawing("throughput_cache", figure, header, rows)


def draw_cores(runs: Sequence[RunFiles]) -> Drawing | None:
    """Throughput over CPU threads, one line per cache; None with one thread count."""
    known = [run for run in runs if run.n_threads]
    if len({run.n_threads for run in known}) < 2:
        return None
    several_models = len({run.model for run in known}) > 1
    several_policies = len({run.policy for run in known if run.policy}) > 1

    def name(run: RunFiles) -> str:
        (n, m), policy = run.cache, run.policy if several_policies else ""
        cache = f"cache {n} x {m} {policy}".rstrip() if n else "no cache"
        model = run.model if several_models else ""
        return ", ".join(filter(None, (model, cache, _batch(run))))

    figure = _new_figure(5.2, 3.8, _subject(known))
    axes = figure.subplots()
    rows: Rows = []
    for number, (line, group) in enumerate(sorted(_grouped(known, name).items())):
        by_threads = sorted(_grouped(group, lambda run: run.n_threads).items())
        points = [(n, _median_throughput(of_n), len(of_n)) for n, of_n in by_threads]
        marker, colour = MARKERS[number % len(MARKERS)], CYCLE[number % len(CYCLE)]
        threads, throughput, _ = zip(*points, strict=True)
        axes.plot(threads, throughput, marker=marker, color=colour, label=line)
        rows += [(line, *point) for point in points]
    axes.set_title("Generation throughput by CPU threads")
    axes.set_xlabel("CPU threads")
    axes.set_ylabel("tokens/s")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    _whole_numbers(axes.xaxis)
    axes.legend()
    header = ("Cache", "Threads", "Throughput (tokens/s)", "Runs")
    return Drawing("throughput_cores", figure, header, rows)


def draw_policies(runs: Sequence[RunFiles]) -> Drawing | None:
    """Hit rate and throughput of replacement policies at each cache size; a point is a run.

    None unless comparable runs of one cache size have at least two policies; of several such groups
    the one with the most runs is drawn.
    """
    groups = []
    for group in _grouped([run for run in runs if run.policy], _comparable).values():
        by_size = sorted(_grouped(group, lambda run: run.cache).items())
        groups.append({n: same for n, same in by_size if len({run.policy for run in same}) > 1})
    sizes = max(groups, key=lambda sizes: sum(map(len, sizes.values())), default={})
    if not sizes:
        return None
    policies = sorted({run.policy for same in sizes.values() for run in same})
    first = next(iter(sizes.values()))[0]
    settings = (_count(first.n_threads, "thread"), _batch(first))
    figure = _new_figure(6.4, 3.6, _subject([first]), *settings)
    panels = figure.subplots(1, 2)
    handles: list[Any] = []
    rows: Rows = []
    for number, policy in enumerate(policies):
        # Side by side within a size, so that policies that are equally good stay apart.
        shift = 0.6 * ((number + 0.5) / len(policies) - 0.5)
        style: dict[str, Any] = {
            "marker": MARKERS[number % len(MARKERS)],
            "color": CYCLE[number % len(CYCLE)],
        }
        handles.append(Line2D([], [], linestyle="", label=policy, **style))
        for place, (size, same) in enumerate(sizes.items()):
            measured = [(_hit_percent(run), run.throughput) for run in same if run.policy == policy]
            if measured:
                for axes, values in zip(panels, zip(*measured, strict=True), strict=True):
                    axes.plot([place + shift] * len(values), values, **style)
                medians = np.median(measured, axis=0).tolist()
                rows.append((policy, *size, *medians, len(measured)))
    for axes, title, label in zip(
        panels, ("Experts hit in decode", "Generation throughput"), ("%", "tokens/s"), strict=True
    ):
        axes.set_title(title)
        axes.set_ylabel(label)
        axes.set_ylim(0, _top(axes.dataLim.y1, 1.1))
        axes.set_xlabel("cache N x M")
        axes.set_xticks(range(len(sizes)), [f"{n} x {m}" for n, m in sizes])
        axes.set_xlim(-0.5, len(sizes) - 0.5)
    figure.legend(handles=handles, loc="outside lower center", ncols=5)
    header = (
        "Policy",
        "Cache Indexes N",
        "Ways M",
        "Hit Rate (%)",
        "Throughput (tokens/s)",
        "Runs",
    )
    return Drawing("policies", figure, header, rows)


def _hit_percent(run: RunFiles) -> float:
    hits, misses = (run.cachehit[name][run.decode].sum() for name in ("Hits", "Misses"))
    return float(100 * hits / (hits + misses)) if hits + misses else 0.0


def draw_energy(runs: Sequence[RunFiles]) -> Drawing | None:
    """Joules per generated token, CPU package and GPU; None where no run had a sensor."""
    rows: Rows = [
        (run.label, *(_mean(run.tokens, f"{side} Energy (J)") for side in ("CPU", "GPU")))
        for run in runs
    ]
    if not any(cpu_j or gpu_j for _, cpu_j, gpu_j in rows):
        return None
    figure = _new_figure(6.4, 1.7 + 0.45 * len(runs), _subject(runs))
    axes = figure.subplots()
    sides = (("CPU package", ORANGE), ("GPU", BLUE))
    for place, (_, *energies_j) in enumerate(rows):
        left = 0.0
        for energy_j, (_, colour) in zip(energies_j, sides, strict=True):
            axes.barh(place, energy_j or 0.0, left=left, color=colour, height=0.6)
            left += energy_j or 0.0
        axes.text(left, place, f" {left:.3g}" if left else " no sensor", va="center")
    axes.set_title("Energy per generated token")
    axes.set_xlabel("J/token")
    axes.margins(x=0.12)
    axes.set_yticks(range(len(rows)), map(_label, runs))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(False, axis="y")
    handles = [
        Patch(color=colour, label=side)
        for number, (side, colour) in enumerate(sides, 1)
        if any(row[number] for row in rows)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return Drawing("energy", figure, ("Run", "CPU (J/token)", "GPU (J/token)"), rows)


def _mean(tokens: dict[str, Floats], column: str) -> float | None:
    values = tokens.get(column)
    if values is None or not len(values) or np.isnan(values).any():
        return None
    return float(values.mean())


def draw_patterns(patterns: Patterns, model: str) -> Drawing:
    """All kinds of reuse beside chance, and three of them by layer."""
    figure = _new_figure(6.8, 6.4, model)
    top, bottom = figure.subplots(2, 1, height_ratios=[3, 2])
    places = np.arange(len(patterns.reuses))
    for offset, name, colour, hatch in (
        (-0.2, "measured", BLUE, None),
        (0.2, "chance", RED, "///"),
    ):
        percents = [100 * getattr(reuse, name) for reuse in patterns.reuses]
        top.barh(places + offset, percents, height=0.36, color=colour, hatch=hatch, label=name,
                 alpha=0.6 if hatch else 1)  # fmt: skip
        for place, percent in enumerate(percents):
            if percent == percent:
                text = f" {percent:.2f}" if percent == 0 or percent >= 0.01 else " below 0.01"
                top.text(percent, place + offset, text, va="center", size=7)
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
    for name, colour, marker in (
        ("previous token: at least one", BLUE, "o"),
        ("previous token: all", GREEN, "s"),
        ("next layer: at least one same index", PURPLE, "^"),
    ):
        shares = [100 * share for share in by_name[name].by_layer]
        bottom.plot(shares, color=colour, marker=marker, markersize=3.5, label=name)
    one = 100 * by_name["previous token: at least one"].chance
    bottom.axhline(one, color=RED, linestyle="--", label="chance: at least one")
    bottom.set_title("By layer")
    bottom.set_xlabel("MoE layer")
    bottom.set_ylabel("pairs that show it (%)")
    bottom.set_ylim(0, 105)
    _whole_numbers(bottom.xaxis)
    figure.legend(*bottom.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    header = ("Reuse", "Layer", "Measured (%)", "Chance (%)", "Pairs")
    return Drawing("patterns", figure, header, _pattern_rows(patterns))


def _pattern_rows(patterns: Patterns) -> Rows:
    """Each reuse over all layers, then by layer."""
    rows: Rows = []
    for reuse in patterns.reuses:
        rows.append((reuse.name, "all", 100 * reuse.measured, 100 * reuse.chance, reuse.n_pairs))
        n_pairs = reuse.n_pairs // max(len(reuse.by_layer), 1)
        rows += [
            (reuse.name, layer, 100 * share, 100 * reuse.chance, n_pairs)
            for layer, share in enumerate(reuse.by_layer)
        ]
    return rows


def _wrapped(name: str) -> str:
    head, colon, tail = name.partition(": ")
    if colon:
        return f"{head}:\n{tail}"
    head, preposition, tail = name.partition(" with ")
    return f"{head}\nwith {tail}" if preposition else name
