"""Every figure of the project and how all of them look and are saved.

A `draw_*` function gives a Drawing, or None where the runs have no data for it. First the figures
of one run, then those that set runs beside each other, then the pattern analysis, then a
simulator's sweep.
"""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field, fields
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
from moe_offload.simulation.tuning import BELADY, SweepRow

# Okabe and Ito's palette: told apart with any kind of colour vision.
BLUE, SKY, YELLOW, ORANGE = "#0072B2", "#56B4E9", "#F0E442", "#E69F00"
RED, PURPLE, GREEN, GREY = "#D55E00", "#CC79A7", "#009E73", "#7F7F7F"
_CYCLE = list(zip("osD^v<>P", (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, YELLOW, GREY), strict=True))
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
    "svg.fonttype": "none",
    "svg.hashsalt": "figures",  # the same figure is the same file
    "text.parse_math": False,  # a folder may have dollars in its name
}
# Dates would make two files of one figure differ.
_METADATA = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}

_SIZE = ("Cache Indexes N", "Ways M")

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
    contents: dict[str, bytes | str] = {}
    with house_style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name in letters that the font has not
        for suffix, metadata in _METADATA.items():
            image = io.BytesIO()
            drawing.figure.savefig(image, format=suffix, metadata=metadata)
            contents[suffix] = image.getvalue()
            drawing.figure.set_layout_engine("none")  # laid out once, which is most of the work
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(drawing.header)
    writer.writerows(map(_cell, row) for row in drawing.rows)
    contents["csv"] = table.getvalue()
    of_path = {folder / f"{prefix}{drawing.name}.{end}": [one] for end, one in contents.items()}
    try:
        write_together(of_path)
    except OSError as error:
        raise UserError(
            f"expected to write figures to {folder}, but found at {error.filename}: "
            f"{error.strerror}: choose another folder"
        ) from error
    return list(of_path)


def _cell(value: object) -> object:
    """Six digits; empty for what is not a number."""
    if isinstance(value, float):
        return f"{value:.6g}" if value == value else ""
    return value


def _new_figure(width: float, height: float, *subjects: str) -> Figure:
    """A figure, in inches, that says over its panels what was measured."""
    figure = Figure(figsize=(width, height))
    wrapped = fill(plain(_joined(*subjects))[:400], int(16 * width))
    figure.suptitle(wrapped, x=0.01, ha="left", size=8, color=GREY)
    return figure


def _joined(*facts: str) -> str:
    """The facts that are known."""
    return ", ".join(filter(None, facts))


def _label(run: RunFiles) -> str:
    """The run's name, its end where it would leave no room for the figure."""
    label = plain(run.label)
    return label if len(label) <= 40 else f"...{label[-37:]}"


def _subject(runs: Sequence[RunFiles]) -> str:
    """The models and machines of these runs, each once."""
    of_run = ([run.model for run in runs], [run.machine for run in runs])
    each_once = (" and ".join(dict.fromkeys(filter(None, names))) for names in of_run)
    return " on ".join(filter(None, each_once))


def _settings(run: RunFiles, *more: str) -> str:
    """How the run was set, as far as it is known."""
    n = run.n_threads
    threads = f"{n} thread{'s' * (n != 1)}" if n else ""
    return _joined(threads, _batch(run), *more)


def _batch(run: RunFiles) -> str:
    return f"batch {run.batch_size}" if run.batch_size > 1 else ""


def _cache(run: RunFiles, with_policy: bool = True) -> str:
    n, m = run.cache
    policy = run.policy if with_policy else ""
    return f"cache {n} x {m} {policy}".rstrip() if n else "no cache"


def _top(values: npt.ArrayLike, room: float) -> float:
    """Where an axis from 0 ends: `room` times the highest value, NaN left out."""
    return room * float(np.nanmax(values, initial=0.0)) or 1.0


def _whole_numbers(*axes: Any) -> None:
    for axis in axes:
        axis.set_major_locator(MaxNLocator(integer=True))


def _style(number: int) -> dict[str, Any]:
    """Marker and colour of the line with this number."""
    marker, colour = _CYCLE[number % len(_CYCLE)]
    return {"marker": marker, "color": colour}


def _heat_map(axes: Axes, values: Floats, label: str, **options: Any) -> None:
    image = axes.imshow(values, aspect="auto", cmap=HEAT_MAP, origin="lower", **options)
    axes.grid(False)
    axes.figure.colorbar(image, ax=axes, label=label)


def _bars(axes: Axes, names: Sequence[str], parts: Floats, colours: Iterable[str]) -> None:
    """A bar for each name, downwards; `parts` [parts, bars] lie end to end in it."""
    places, left = np.arange(parts.shape[1]), np.zeros(parts.shape[1])
    for lengths, colour in zip(parts, colours, strict=True):
        axes.barh(places, lengths, left=left, color=colour, height=0.6)
        left += lengths
    axes.set_yticks(places[: len(names)], names)
    axes.set_ylim(len(places) - 0.4, -0.6)
    axes.grid(False, axis="y")


def _name_colours(figure: Figure, colours: dict[str, str], shown: Floats, n_columns: int) -> None:
    """A legend of the colours that the figure shows: `shown` [rows, colours] is not all 0 there."""
    handles = [
        Patch(color=colour, label=name.replace("_", " "))
        for (name, colour), values in zip(colours.items(), shown.T, strict=True)
        if values.any()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=n_columns)


def draw_tokens(run: RunFiles) -> Drawing | None:
    """Time of each generated token, running throughput, CPU frequency and temperature.

    None for a run that generated no token after its prompts' first.
    """
    tokens = run.tokens
    if not len(tokens["Time"]):
        return None
    index, time_ms, median_ms = (
        tokens["Index"],
        tokens["Time"] * 1e3,
        1e3 * np.median(tokens["Time"]),
    )
    throughput = tokens["Accumulated Generation Throughput (tokens/s)"]
    mhz, celsius = tokens["CPU Frequency"], tokens["CPU Temperature"]
    figure = _new_figure(6.4, 5.4, _subject([run]), _settings(run, _cache(run)))
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[3, 2, 2])
    top.plot(index, time_ms, ".", color=BLUE, markersize=3)
    top.axhline(median_ms, color=RED, linestyle="--", linewidth=1)
    # A pause of the machine must not flatten all else: the axis ends a little above most tokens.
    limit_ms = _top(np.percentile(time_ms, 99), 1.3)
    title = f"Time per output token: median {median_ms:.3g} ms (dashed)"
    top.set(title=title, ylabel="time (ms)", ylim=(0, limit_ms))
    above = int((time_ms > limit_ms).sum())
    if above:
        top.text(0.995, 0.97, f"{above} above", transform=top.transAxes, ha="right", va="top")
    middle.plot(index, throughput, color=GREEN)
    middle.set(title="Throughput so far", ylabel="tokens/s", ylim=(0, _top(throughput, 1.1)))
    _draw_sensors(bottom, index, mhz, celsius)
    bottom.set_xlabel("generated token")
    _whole_numbers(bottom.xaxis)
    header = ("Index", "Time (ms)", "Throughput (tokens/s)", "CPU Frequency", "CPU Temperature")
    columns = (index.astype(int), time_ms, throughput, mhz, celsius)
    return Drawing("tokens", figure, header, list(zip(*(c.tolist() for c in columns), strict=True)))


def _draw_sensors(axes: Axes, index: Floats, mhz: Floats, celsius: Floats) -> None:
    names = []
    if np.isnan(mhz).all():
        axes.set_yticks([])
    else:
        names.append("frequency")
        axes.plot(index, mhz, color=BLUE)
        axes.set_ylabel("frequency (MHz)", color=BLUE)
        axes.set_ylim(0, _top(mhz, 1.15))
    if not np.isnan(celsius).all():
        names.append("temperature")
        right = axes.twinx()
        right.spines["right"].set_visible(True)
        right.grid(False)
        right.plot(index, celsius, color=RED, linestyle="--")
        right.set_ylabel("temperature (°C), dashed", color=RED)
        right.set_ylim(0, _top(celsius, 1.25))
    axes.set_title(f"CPU {' and '.join(names)}" if names else "CPU: no sensor on this machine")


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
    figure = _new_figure(6.4, 4.6, _subject([run]), _settings(run, _cache(run)))
    top, bottom = figure.subplots(2, 1)
    top.bar(np.arange(n_cached), by_layer[:n_cached], color=BLUE, width=0.8)
    if n_cached < run.n_layers:
        left, right = n_cached - 0.5, run.n_layers - 0.5
        top.axvspan(left, right, color=GREY, alpha=0.15, linewidth=0)
        top.text((left + right) / 2, 50, "not cached", ha="center", va="center", color=GREY)
    top.axhline(mean, color=RED, linestyle="--", linewidth=1)
    title = f"Per-expert hit rate by layer, decode: {mean:.1f}% over cached layers (dashed)"
    top.set(title=title, xlabel="MoE layer", xlim=(-0.6, run.n_layers - 0.4))
    window = max(1, min(32, len(over_time) // 4))
    smooth = np.convolve(over_time, np.ones(window) / window, mode="valid")
    bottom.plot(over_time, ".", color=GREY, markersize=2.5, label="one step")
    steps = np.arange(window - 1, len(over_time))
    bottom.plot(steps, smooth, color=BLUE, label=f"mean of {window} steps")
    bottom.set(title="Over the run", xlabel="decode step")
    bottom.legend(loc="lower right", ncols=2)
    for axes in (top, bottom):
        axes.set(ylabel="hit rate (%)", ylim=(-3, 103))  # points at 0 and 100 stay whole
        _whole_numbers(axes.xaxis)
    by_layer[n_cached:] = np.nan
    rows: Rows = [("layer", layer, rate) for layer, rate in enumerate(by_layer.tolist())]
    rows += [("step", step, rate) for step, rate in enumerate(over_time.tolist())]
    return Drawing("hits", figure, ("Axis", "Index", "Hit Rate (%)"), rows)


def draw_experts(patterns: Patterns, run: RunFiles) -> Drawing:
    """How often each expert of each layer was chosen, and reuse by lag beside chance."""
    figure = _new_figure(6.4, 5.6, _subject([run]))
    top, bottom = figure.subplots(2, 1, height_ratios=[3, 2])
    percent = 100 * patterns.popularity
    even = 100 * patterns.top_k / patterns.n_experts
    _heat_map(top, percent, "tokens that choose it (%)", interpolation="nearest", vmin=0)
    title = f"How often each expert is chosen (even use: {even:.3g}%)"
    top.set(title=title, xlabel="expert", ylabel="MoE layer")
    lags = range(1, len(patterns.lags) + 1)
    measured = [100 * reuse.measured for reuse in patterns.lags]
    bottom.plot(lags, measured, "o-", color=BLUE, markersize=4, label="measured")
    skewed = 100 * patterns.shared_by_popularity
    bottom.axhline(skewed, color=GREEN, linestyle="-.", label="popularity alone")
    bottom.axhline(even, color=RED, linestyle="--", label="chance (K/E)")
    bottom.set(
        title="Experts shared with the token this far back",
        xlabel="lag (tokens)",
        ylabel="experts shared (%)",
        ylim=(0, max(*measured, even, skewed) * 1.25),
    )
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
    names = [f"{_label(run)}\n" + _settings(run, _cache(run)).replace(", ", ",\n") for run in runs]
    all_ms, rows = [], []
    for axes, phase in zip(figure.subplots(1, 2), ("decode", "prefill"), strict=True):
        means_ms = np.array([_mean_parts_ms(run, phase) for run in runs])
        all_ms += [means_ms]
        rows += [(run.label, phase, *ms) for run, ms in zip(runs, means_ms.tolist(), strict=True)]
        _bars(axes, names if phase == "decode" else [], means_ms[:, :-1].T, PARTS.values())
        # The accelerator works beside the CPU: a thin bar above.
        axes.barh(np.arange(len(runs)) - 0.38, means_ms[:, -1], height=0.07, color="black")
        axes.set(title=f"{phase}: mean forward pass", xlabel="time (ms)")
    colours = PARTS | {"accelerator (beside)": "black"}
    _name_colours(figure, colours, np.concatenate(all_ms), 4)
    header = ("Run", "Phase", *(f"{part} (ms)" for part in PARTS), "gpu (ms)")
    return Drawing("breakdown", figure, header, rows)


def _mean_parts_ms(run: RunFiles, phase: str) -> list[float]:
    """The PARTS of a mean forward pass, then the accelerator's time."""
    wanted = run.decode if phase == "decode" else ~run.decode
    if not wanted.any():
        return [0.0] * (len(PARTS) + 1)
    *parts_ms, gpu_ms = (
        float(run.breakdown[part][wanted].mean()) * run.n_layers
        for part in (*PARTS, "gpu")
        if part != "rest"
    )
    # Below zero by rounding alone, or where device time was counted twice: then nothing is left.
    rest_ms = max(0.0, float(run.breakdown["rest_ms"][wanted].mean()))
    return [*parts_ms, rest_ms, gpu_ms]


def _grouped(runs: Iterable[RunFiles], key: Callable[[RunFiles], T]) -> dict[T, list[RunFiles]]:
    groups: dict[T, list[RunFiles]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


def _by_size(runs: Iterable[RunFiles]) -> dict[tuple[int, int], list[RunFiles]]:
    return dict(sorted(_grouped(runs, lambda run: run.cache).items()))


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
        _by_size(run for run in group if run.policy in (policy, ""))
        for group in _grouped(runs, _comparable).values()
        for policy in {run.policy for run in group}
    ]
    sizes = max(candidates, key=len)
    if len(sizes) < 2:
        return None
    median = {size: _median_throughput(group) for size, group in sizes.items()}
    cached = {size: value for size, value in median.items() if size != (0, 0)}
    n_values, m_values = (sorted({size[axis] for size in cached}) for axis in (0, 1))
    first, last = min(sizes.values(), key=len)[0], list(sizes.values())[-1][0]
    settings = (_subject([first]), _settings(first, last.policy))
    title = "Generation throughput by cache size"
    if len(n_values) > 1 < len(m_values) and len(cached) == len(n_values) * len(m_values):
        width = max(4.4, 2.6 + 0.75 * len(n_values))
        figure = _new_figure(width, 2.2 + 0.5 * len(m_values), *settings)
        axes = figure.subplots()
        grid = np.array([[cached[n, m] for n in n_values] for m in m_values])
        _heat_map(axes, grid, "tokens/s")
        for (row, column), value in np.ndenumerate(grid):
            colour = "black" if value > (grid.min() + grid.max()) / 2 else "white"
            axes.text(column, row, f"{value:.3g}", ha="center", va="center", color=colour)
        axes.set_xticks(range(len(n_values)), map(str, n_values))
        axes.set_yticks(range(len(m_values)), map(str, m_values))
        axes.set(xlabel="cache indexes N", ylabel="ways M")
        title += f" (no cache: {median[0, 0]:.3g})" if (0, 0) in median else ""
    else:
        figure = _new_figure(5.2, 1.6 + 0.32 * len(median), *settings)
        axes = figure.subplots()
        names = [f"{n} x {m}" if n else "no cache" for n, m in median]
        _bars(axes, names, np.array([list(median.values())]), [BLUE])
        for place, value in enumerate(median.values()):
            axes.text(value, place, f" {value:.3g}", va="center")
        axes.margins(x=0.12)
        axes.set(xlabel="tokens/s", ylabel="cache N x M")
    axes.set_title(title)
    header = (*_SIZE, "Throughput (tokens/s)", "Runs")
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
        model = run.model if several_models else ""
        return _joined(model, _cache(run, several_policies), _batch(run))

    figure = _new_figure(5.2, 3.8, _subject(known))
    axes = figure.subplots()
    rows: Rows = []
    for number, (line, group) in enumerate(sorted(_grouped(known, name).items())):
        by_threads = sorted(_grouped(group, lambda run: run.n_threads).items())
        points = [(n, _median_throughput(of_n), len(of_n)) for n, of_n in by_threads]
        threads, throughput, _ = zip(*points, strict=True)
        axes.plot(threads, throughput, label=line, **_style(number))
        rows += [(line, *point) for point in points]
    axes.set(title="Generation throughput by CPU threads", xlabel="CPU threads", ylabel="tokens/s")
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
    groups = [
        {size: same for size, same in _by_size(group).items() if len({r.policy for r in same}) > 1}
        for group in _grouped([run for run in runs if run.policy], _comparable).values()
    ]
    sizes = max(groups, key=lambda sizes: sum(map(len, sizes.values())), default={})
    if not sizes:
        return None
    policies = sorted({run.policy for same in sizes.values() for run in same})
    first = next(iter(sizes.values()))[0]
    figure = _new_figure(6.4, 3.6, _subject([first]), _settings(first))
    panels = figure.subplots(1, 2)
    handles, rows = [], []
    for number, policy in enumerate(policies):
        # Side by side within a size, so that policies that are equally good stay apart.
        shift = 0.6 * ((number + 0.5) / len(policies) - 0.5)
        style = _style(number)
        handles.append(Line2D([], [], linestyle="", label=policy, **style))
        for place, (size, same) in enumerate(sizes.items()):
            measured = [(_hit_percent(run), run.throughput) for run in same if run.policy == policy]
            if measured:
                for axes, values in zip(panels, zip(*measured, strict=True), strict=True):
                    axes.plot([place + shift] * len(values), values, **style)
                medians = np.median(measured, axis=0).tolist()
                rows.append((policy, *size, *medians, len(measured)))
    panels[0].set(title="Experts hit in decode", ylabel="%")
    panels[1].set(title="Generation throughput", ylabel="tokens/s")
    for axes in panels:
        axes.set_xticks(range(len(sizes)), [f"{n} x {m}" for n, m in sizes])
        axes.set(xlabel="cache N x M", xlim=(-0.5, len(sizes) - 0.5))
        axes.set_ylim(0, _top(axes.dataLim.y1, 1.1))
    figure.legend(handles=handles, loc="outside lower center", ncols=5)
    header = ("Policy", *_SIZE, "Hit Rate (%)", "Throughput (tokens/s)", "Runs")
    return Drawing("policies", figure, header, rows)


def _hit_percent(run: RunFiles) -> float:
    hits, misses = (run.cachehit[name][run.decode].sum() for name in ("Hits", "Misses"))
    return float(100 * hits / (hits + misses)) if hits + misses else 0.0


def draw_energy(runs: Sequence[RunFiles]) -> Drawing | None:
    """Joules per generated token, CPU package and GPU; None where no run had a sensor."""
    sides = {"CPU package": ORANGE, "GPU": BLUE}
    energies_j = [
        [_mean(run.tokens, f"{side} Energy (J)") for side in ("CPU", "GPU")] for run in runs
    ]
    shown_j = np.nan_to_num(energies_j)
    if not shown_j.any():
        return None
    figure = _new_figure(6.4, 1.7 + 0.45 * len(runs), _subject(runs))
    axes = figure.subplots()
    _bars(axes, [*map(_label, runs)], shown_j.T, sides.values())
    for place, sum_j in enumerate(shown_j.sum(axis=1)):
        axes.text(sum_j, place, f" {sum_j:.3g}" if sum_j else " no sensor", va="center")
    axes.margins(x=0.12)
    axes.set(title="Energy per generated token", xlabel="J/token")
    _name_colours(figure, sides, shown_j, 2)
    rows = [(run.label, *of_run) for run, of_run in zip(runs, energies_j, strict=True)]
    return Drawing("energy", figure, ("Run", "CPU (J/token)", "GPU (J/token)"), rows)


def _mean(tokens: dict[str, Floats], column: str) -> float:
    """NaN for a column that is not there, or not whole."""
    values = tokens.get(column, np.array([]))
    return float(values.mean()) if len(values) else np.nan


def draw_patterns(patterns: Patterns, model: str) -> Drawing:
    """All kinds of reuse beside chance, and three of them by layer."""
    figure = _new_figure(6.8, 6.4, model)
    top, bottom = figure.subplots(2, 1, height_ratios=[3, 2])
    places = np.arange(len(patterns.reuses))
    for offset, name, colour, look in (
        (-0.2, "measured", BLUE, {}),
        (0.2, "chance", RED, {"hatch": "///", "alpha": 0.6}),
    ):
        percents = [100 * getattr(reuse, name) for reuse in patterns.reuses]
        top.barh(places + offset, percents, height=0.36, color=colour, label=name, **look)
        for place, percent in enumerate(percents):
            if percent == percent:
                text = f" {percent:.2f}" if percent == 0 or percent >= 0.01 else " below 0.01"
                top.text(percent, place + offset, text, va="center", size=7)
    # Long names take two lines.
    names = [r.name.replace(": ", ":\n").replace(" with ", "\nwith ") for r in patterns.reuses]
    top.set_yticks(places, names, size=8)
    top.invert_yaxis()
    top.margins(x=0.12)
    top.grid(False, axis="y")
    title = (
        f"Reuse of experts: top-{patterns.top_k} of {patterns.n_experts}, "
        f"{patterns.n_layers} layers, {patterns.n_tokens} tokens"
    )
    top.set(title=title, xlabel="pairs that show it (%)")
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
    bottom.set(title="By layer", xlabel="MoE layer", ylabel="pairs that show it (%)", ylim=(0, 105))
    _whole_numbers(bottom.xaxis)
    figure.legend(*bottom.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    rows: Rows = []
    for reuse in patterns.reuses:
        layers = list(enumerate(reuse.by_layer))
        n_pairs = [reuse.n_pairs] + [reuse.n_pairs // len(layers) for _ in layers]
        rows += [
            (reuse.name, layer, 100 * share, 100 * reuse.chance, n)
            for (layer, share), n in zip([("all", reuse.measured), *layers], n_pairs, strict=True)
        ]
    header = ("Reuse", "Layer", "Measured (%)", "Chance (%)", "Pairs")
    return Drawing("patterns", figure, header, rows)


def draw_sweep(rows: Sequence[SweepRow], subject: str) -> Drawing:
    """A column of panels for each N of which a cache fits: hits above, tokens/s below.

    `subject` names the model and the machine. What does not fit is in the table alone.
    """
    drawn = [row for row in rows if row.fits is not False]
    indexes, ways = (sorted({getattr(row, n) for row in drawn}) for n in ("n_indexes", "n_ways"))
    with_speed = any(row.tokens_per_s for row in drawn)
    figure = _new_figure(1.2 + 2.5 * len(indexes), 5.4 if with_speed else 3.2, subject)
    panels = figure.subplots(1 + with_speed, len(indexes), sharex=True, sharey="row", squeeze=False)
    for column, n in zip(panels.T, indexes, strict=True):
        of_n = [row for row in drawn if row.n_indexes == n]
        _draw_policies(column[0], of_n, "hit_expert", "bound_bypass")
        if with_speed:
            _draw_policies(column[1], of_n, "tokens_per_s", "bound_tokens_per_s")
        column[0].set_title(f"N = {n}")
        column[-1].set_xscale("log", base=2)
        column[-1].set_xticks(ways, [str(m) for m in ways])
        column[-1].minorticks_off()
        column[-1].set_xlabel("ways M")
    panels[0, 0].set(ylabel="experts hit in decode (%)", ylim=(-3, 103))
    if with_speed:
        panels[1, 0].set_ylabel("tokens/s (predicted)")
        panels[1, 0].set_ylim(bottom=0)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    header = tuple(field.name for field in fields(SweepRow))
    return Drawing("sweep", figure, header, [astuple(row) for row in rows])


def _draw_policies(axes: Axes, rows: Sequence[SweepRow], name: str, bound: str) -> None:
    """A line for each policy, and over them what no policy can exceed.

    Policies that agree lie on each other: each marker is smaller than the one before and hollow,
    so that all are seen.
    """
    policies = list(dict.fromkeys(row.policy for row in rows))
    for place, policy in enumerate(policies):
        axes.plot(
            *_points((row for row in rows if row.policy == policy), name),
            markersize=3.5 + 1.1 * (len(policies) - 1 - place),
            fillstyle="none",
            linewidth=1,
            label="Belady's optimum" if policy == BELADY else policy,
            **_style(place),
        )
    axes.plot(*_points(rows, bound), "--", color=GREY, linewidth=1, label="bound of all")


def _points(rows: Iterable[SweepRow], name: str) -> tuple[list[int], list[float]]:
    """The ways and what was found with them, each once."""
    value_of = {row.n_ways: getattr(row, name) for row in rows}
    return list(value_of), list(value_of.values())
