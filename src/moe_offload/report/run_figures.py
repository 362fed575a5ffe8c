"""The figures of one run: time per token, cache hits, expert choices."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moe_offload.report.figures import BLUE, GREEN, GREY, HEAT_MAP, RED
from moe_offload.report.routing_patterns import Patterns
from moe_offload.report.run_files import RunFiles

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
