"""Every figure of the project, each with its numbers.

A `draw_*` function gives a Drawing, or None where the runs have no data for it. First the figures
of one run, then those that set runs beside each other, then a simulator's sweep.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, fields
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from moe_offload.errors import plain
from moe_offload.report.drawing import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    YELLOW,
    Drawing,
    Rows,
    bars,
    heat_map,
    joined,
    line_style,
    name_colours,
    new_figure,
    top_of,
    whole_numbers,
)
from moe_offload.report.patterns import Patterns
from moe_offload.report.read_back import Floats, RunFiles
from moe_offload.simulation.tuning import SweepRow


def _label(run: RunFiles) -> str:
    """The run's name, its end where it would leave no room for the figure."""
    label = plain(run.label)
    return label if len(label) <= 40 else f"...{label[-37:]}"


def _subject(runs: Sequence[RunFiles]) -> str:
    """The models and machines of these runs, each once."""
    of_run = ([run.model for run in runs], [run.machine for run in runs])
    each_once = (" and ".join(dict.fromkeys(filter(None, names))) for names in of_run)
    return " on ".join(filter(None, each_once))


def _set(run: RunFiles) -> dict[str, str]:
    """What the run was, and how it was set, as far as it is known."""
    n, (n_indexes, n_ways) = run.n_threads, run.cache
    return {
        "model": run.model,
        "machine": run.machine,
        "threads": f"{n} thread{'s' * (n != 1)}" if n else "",
        "batch": f"batch {run.batch_size}" if run.batch_size > 1 else "",
        "cache": f"cache {n_indexes} x {n_ways}" if n_indexes else "no cache",
        "policy": run.policy,
    }


def _settings(run: RunFiles) -> str:
    _, _, threads, batch, cache, policy = _set(run).values()
    return joined(threads, batch, f"{cache} {policy}".rstrip())


def draw_tokens(run: RunFiles) -> Drawing | None:
    """Time of each generated token, running throughput, CPU frequency and temperature.

    Without a panel for a sensor that is not there. None for a run that generated no token after its
    prompts' first.
    """
    index, time_ms = run.tokens["Index"], 1e3 * run.tokens["Time"]
    if not len(index):
        return None
    columns = {
        "Throughput (tokens/s)": run.tokens["Accumulated Generation Throughput (tokens/s)"],
        "CPU Frequency": run.tokens["CPU Frequency"],
        "CPU Temperature": run.tokens["CPU Temperature"],
    }
    titles = ("Throughput so far (tokens/s)", "CPU frequency (MHz)", "CPU temperature (°C)")
    shown = [
        (title, values)
        for title, values in zip(titles, columns.values(), strict=True)
        if not np.isnan(values).all()
    ]
    n = len(shown)
    figure = new_figure(6.4, 2.4 + 1.5 * n, _subject([run]), _settings(run))
    panels = figure.subplots(1 + n, 1, sharex=True, squeeze=False, height_ratios=[3] + n * [2])
    top, *others = panels[:, 0]
    median_ms = float(np.median(time_ms))
    top.plot(index, time_ms, ".", color=BLUE, markersize=3)
    top.axhline(median_ms, color=RED, linestyle="--", linewidth=1)
    # A pause of the machine must not flatten all else: the axis ends a little above most tokens.
    limit_ms = top_of(np.percentile(time_ms, 99), 1.3)
    title = f"Time per output token (ms): median {median_ms:.3g} (dashed)"
    top.set(title=title, ylim=(0, limit_ms))
    above = int((time_ms > limit_ms).sum())
    if above:
        top.text(0.995, 0.97, f"{above} above", transform=top.transAxes, ha="right", va="top")
    for axes, (title, values) in zip(others, shown, strict=True):
        axes.plot(index, values, color=GREEN)
        axes.set(title=title, ylim=(0, top_of(values, 1.15)))
    panels[-1, 0].set_xlabel("generated token")
    whole_numbers(top.xaxis)
    rows = zip(*(c.tolist() for c in (index.astype(int), time_ms, *columns.values())), strict=True)
    return Drawing("tokens", figure, ("Index", "Time (ms)", *columns), list(rows))


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
    figure = new_figure(6.4, 4.6, _subject([run]), _settings(run))
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
        whole_numbers(axes.xaxis)
    by_layer[n_cached:] = np.nan
    rows: Rows = [("layer", layer, rate) for layer, rate in enumerate(by_layer.tolist())]
    rows += [("step", step, rate) for step, rate in enumerate(over_time.tolist())]
    return Drawing("hits", figure, ("Axis", "Index", "Hit Rate (%)"), rows)


def draw_experts(patterns: Patterns, run: RunFiles) -> Drawing:
    """How often each expert of each layer was chosen, and reuse by lag beside chance."""
    figure = new_figure(6.4, 5.6, _subject([run]))
    top, bottom = figure.subplots(2, 1, height_ratios=[3, 2])
    percent = 100 * patterns.popularity
    even = 100 * patterns.top_k / patterns.n_experts
    heat_map(top, percent, "tokens that choose it (%)", interpolation="nearest", vmin=0)
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
    whole_numbers(top.xaxis, top.yaxis, bottom.xaxis)
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
    figure = new_figure(6.4, 2.2 + 0.7 * len(runs), _subject(runs))
    names = [f"{_label(run)}\n" + _settings(run).replace(", ", ",\n") for run in runs]
    all_ms, rows = [], []
    for axes, phase in zip(figure.subplots(1, 2), ("decode", "prefill"), strict=True):
        means_ms = np.array([_mean_parts_ms(run, phase) for run in runs])
        all_ms += [means_ms]
        rows += [(run.label, phase, *ms) for run, ms in zip(runs, means_ms.tolist(), strict=True)]
        bars(axes, names if phase == "decode" else [], means_ms[:, :-1].T, PARTS.values())
        # The accelerator works beside the CPU: a thin bar above.
        axes.barh(np.arange(len(runs)) - 0.38, means_ms[:, -1], height=0.07, color="black")
        axes.set(title=f"{phase}: mean forward pass", xlabel="time (ms)")
    colours = PARTS | {"accelerator (beside)": "black"}
    name_colours(figure, colours, np.concatenate(all_ms), 4)
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


_COMPARED = {"cache": "throughput_cache", "threads": "throughput_cores", "policy": "policies"}


def draw_comparison(runs: Sequence[RunFiles], by: str) -> Drawing | None:
    """Hits and throughput of runs that differ in their "cache" size, "threads" or "policy" alone.

    A point is the median of the runs that are set alike, a colour those that share all but `by`; a
    run without a cache is set beside those of each policy. None where no two runs differ so.
    """
    policies = {run.policy for run in runs if run.policy} or {""}
    lines: dict[tuple[str, ...], dict[Any, list[RunFiles]]] = {}
    for run in runs:
        place = {"cache": run.cache, "threads": run.n_threads, "policy": run.policy}[by]
        if not place:  # not known, or no cache that had a policy
            continue
        for policy in policies if by == "cache" and not run.policy else {run.policy}:
            shared = tuple((_set(run) | {"policy": policy, by: ""}).values())
            lines.setdefault(shared, {}).setdefault(place, []).append(run)
    lines = {shared: of_line for shared, of_line in sorted(lines.items()) if len(of_line) > 1}
    if not lines:
        return None
    settings = list(zip(*lines, strict=True))  # one after the other, of all lines
    common = joined(*(values[0] for values in settings if len(set(values)) == 1))
    figure = new_figure(6.4, 3.8, common)
    panels = figure.subplots(1, 2)
    places = sorted({place for of_line in lines.values() for place in of_line})
    rows: Rows = []
    for number, (shared, of_line) in enumerate(lines.items()):
        differs = zip(shared, settings, strict=True)
        label = joined(*(value for value, values in differs if len(set(values)) > 1))
        # Side by side, so that what is equally good stays apart.
        shift = 0.4 * ((number + 0.5) / len(lines) - 0.5)
        at, points = [], []
        for place, alike in sorted(of_line.items()):
            found = [(_hit_percent(run), run.throughput) for run in alike]
            at.append(places.index(place) + shift)
            points.append(np.median(found, axis=0).tolist())
            one, policy = alike[0], shared[-1] or alike[0].policy
            facts = one.model, one.machine, one.n_threads, one.batch_size, *one.cache, policy
            rows.append((*facts, *points[-1], len(alike)))
        for axes, values in zip(panels, zip(*points, strict=True), strict=True):
            # policies have no order, so nothing lies between two of them
            line = "" if by == "policy" else ":"
            axes.plot(at, values, linestyle=line, label=label, **line_style(number))
    panels[0].set(title="Experts hit in decode", ylabel="%")
    panels[1].set(title="Generation throughput", ylabel="tokens/s")
    names = [f"{p[0]} x {p[1]}" if isinstance(p, tuple) else str(p) for p in places]
    for axes in panels:
        axes.set_xticks(range(len(places)), names, rotation=90 if len(places) > 6 else 0)
        axes.set(xlabel="cache N x M" if by == "cache" else by, xlim=(-0.5, len(places) - 0.5))
        axes.set_ylim(0, top_of(axes.dataLim.y1, 1.1))
    if len(lines) > 1:
        legend = panels[0].get_legend_handles_labels()
        figure.legend(*legend, loc="outside lower center", ncols=2)
    header = ("Model", "Machine", "Threads", "Batch", "Cache Indexes N", "Ways M", "Policy",
              "Hit Rate (%)", "Throughput (tokens/s)", "Runs")  # fmt: skip
    return Drawing(_COMPARED[by], figure, header, rows)


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
    figure = new_figure(6.4, 1.7 + 0.45 * len(runs), _subject(runs))
    axes = figure.subplots()
    bars(axes, [*map(_label, runs)], shown_j.T, sides.values())
    for place, sum_j in enumerate(shown_j.sum(axis=1)):
        axes.text(sum_j, place, f" {sum_j:.3g}" if sum_j else " no sensor", va="center")
    axes.margins(x=0.12)
    axes.set(title="Energy per generated token", xlabel="J/token")
    name_colours(figure, sides, shown_j, 2)
    rows = [(run.label, *of_run) for run, of_run in zip(runs, energies_j, strict=True)]
    return Drawing("energy", figure, ("Run", "CPU (J/token)", "GPU (J/token)"), rows)


def _mean(tokens: dict[str, Floats], column: str) -> float:
    """NaN for a column that is not there, or not whole."""
    values = tokens.get(column, np.array([]))
    return float(values.mean()) if len(values) else np.nan


def draw_sweep(rows: Sequence[SweepRow], subject: str) -> Drawing:
    """A column of panels for each N of which a cache fits: hits above, tokens/s below.

    `subject` names the model and the machine. What does not fit is in the table alone.
    """
    drawn = [row for row in rows if row.fits is not False]
    indexes, ways = (sorted({getattr(row, n) for row in drawn}) for n in ("n_indexes", "n_ways"))
    with_speed = any(row.tokens_per_s for row in drawn)
    figure = new_figure(1.2 + 2.5 * len(indexes), 5.4 if with_speed else 3.2, subject)
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
            label=policy,
            **line_style(place),
        )
    axes.plot(*_points(rows, bound), "--", color=GREY, linewidth=1, label="Belady's optimum")


def _points(rows: Iterable[SweepRow], name: str) -> tuple[list[int], list[float]]:
    """The ways and what was found with them, each once."""
    value_of = {row.n_ways: getattr(row, name) for row in rows}
    return list(value_of), list(value_of.values())
