"""The figure of a simulator's sweep: hits and, with a machine, speed by N, M and policy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, fields

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_offload.report.figures import CYCLE, GREY, MARKERS, Drawing
from moe_offload.simulation.tuning import BELADY, SweepRow

_PANEL_INCHES = 2.5


def draw_sweep(rows: Sequence[SweepRow], subject: str) -> Drawing:
    """A column of panels for each N of which a cache fits: hits above, tokens/s below.

    `subject` names the model and the machine. What does not fit is in the table alone.
    """
    drawn = [row for row in rows if row.fits is not False]
    indexes, ways = _distinct(drawn, "n_indexes"), _distinct(drawn, "n_ways")
    with_speed = any(row.tokens_per_s for row in drawn)
    size = (1.2 + _PANEL_INCHES * len(indexes), 5.4 if with_speed else 3.2)
    figure = Figure(figsize=size)
    figure.suptitle(subject, x=0.01, ha="left", size=8, color=GREY)
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
    panels[0, 0].set_ylabel("experts hit in decode (%)")
    panels[0, 0].set_ylim(-3, 103)
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
            color=CYCLE[place],
            marker=MARKERS[place],
            markersize=3.5 + 1.1 * (len(policies) - 1 - place),
            fillstyle="none",
            linewidth=1,
            label="Belady's optimum" if policy == BELADY else policy,
        )
    axes.plot(*_points(rows, bound), "--", color=GREY, linewidth=1, label="bound of all")


def _points(rows: Iterable[SweepRow], name: str) -> tuple[list[int], list[float]]:
    """The ways and what was found with them, each once."""
    value_of = {row.n_ways: getattr(row, name) for row in rows}
    return list(value_of), list(value_of.values())


def _distinct(rows: Iterable[SweepRow], name: str) -> list[int]:
    return sorted({getattr(row, name) for row in rows})
