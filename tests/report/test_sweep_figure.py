"""The sweep's figure: a column for each N that fits, a line for each policy, numbers as swept."""

from dataclasses import replace

import pytest

from moe_offload.report.sweep_figure import draw_sweep
from moe_offload.simulation.tuning import BELADY, SweepRow

POLICIES = ("FIFO", "LRU", BELADY)


def row(n: int, m: int, policy: str, fits: bool | None) -> SweepRow:
    speed = 10.0 * m if fits else None
    return SweepRow(n, m, policy, n * m, 80, 40, 50 + m, 70 + m, 9, 1, 1, speed, speed, True, fits)


def rows(n_slots: int | None) -> list[SweepRow]:
    """N of 2 and 4, M of 1 and 2, of which so many slots fit; None: without a machine."""
    return [
        row(n, m, policy, None if n_slots is None else n * m <= n_slots)
        for n in (2, 4)
        for m in (1, 2)
        for policy in POLICIES
    ]


def lines(axes) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()}


def test_without_a_machine_there_are_hits_alone():
    drawing = draw_sweep(rows(None), "mixtral")
    panels = drawing.figure.axes
    assert [axes.get_title() for axes in panels] == ["N = 2", "N = 4"]
    for axes in panels:
        assert lines(axes)["LRU"] == lines(axes)["Belady's optimum"] == [(1, 51), (2, 52)]
        assert lines(axes)["bound of all"] == [(1, 71), (2, 72)]
        styles = {(line.get_marker(), line.get_color()) for line in axes.get_lines()}
        assert len(styles) == 4
    (legend,) = drawing.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "FIFO", "LRU", "Belady's optimum", "bound of all"
    ]  # fmt: skip
    assert drawing.figure.get_suptitle() == "mixtral"


@pytest.mark.parametrize(("n_slots", "titles"), [(8, ["N = 2", "N = 4"]), (3, ["N = 2"])])
def test_what_does_not_fit_is_not_drawn(n_slots, titles):
    swept = rows(n_slots)
    drawing = draw_sweep(swept, "")
    hits, speeds = drawing.figure.axes[: len(titles)], drawing.figure.axes[len(titles) :]
    assert [axes.get_title() for axes in hits] == titles and len(speeds) == len(titles)
    ways = [m for m in (1, 2) if 2 * m <= n_slots]
    assert lines(hits[0])["LRU"] == [(m, 50 + m) for m in ways]
    assert lines(speeds[0])["LRU"] == [(m, 10 * m) for m in ways]
    assert drawing.header[:3] == ("n_indexes", "n_ways", "policy")
    assert len(drawing.rows) == len(swept)  # the table has all


def test_a_single_setting_can_be_drawn():
    (one,) = draw_sweep([replace(row(1, 1, "LRU", True), synthetic=False)], "").figure.axes[:1]
    assert lines(one)["LRU"] == [(1, 51)]
