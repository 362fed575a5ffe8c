"""Figures drawn from the golden CSVs: they exist, show something, and their numbers are right."""

from __future__ import annotations

import csv
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.text import Text
from plotted import is_drawn
from run_folders import LAYERS, run_dir

from moe_offload.commands import draw as draw_module
from moe_offload.report.drawing import Drawing, house_style
from moe_offload.report.figures import draw_breakdown, draw_comparison, draw_sweep
from moe_offload.report.read_back import RunFiles, read_runs
from moe_offload.simulation.tuning import SweepRow


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def draw(*arguments: object) -> int:
    return draw_module.plots([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = run_dir(tmp_path_factory.mktemp("run") / "single")
    assert draw(folder) == 0
    return folder


@pytest.mark.parametrize("name", ["breakdown", "tokens", "hits", "experts", "energy"])
def test_every_figure_of_a_run_is_drawn(single: Path, name: str) -> None:
    figures = single / "figures"
    assert is_drawn(figures / f"{name}.png")
    assert (figures / f"{name}.pdf").read_bytes().startswith(b"%PDF-")
    assert "<svg" in (figures / f"{name}.svg").read_text()
    assert len(read(figures / f"{name}.csv")) > 0


def test_the_numbers_of_the_breakdown(single: Path) -> None:
    passes = read(single / "out.csv")
    parts = ("attention", "router", "plan", "cpu", "copy_wait", "combine")
    for row in read(single / "figures/breakdown.csv"):
        of_phase = [one for one in passes if one["phase"] == row["Phase"]]
        for part in (*parts, "gpu"):
            mean_ms = statistics.mean(float(one[part]) for one in of_phase) * LAYERS
            assert float(row[f"{part} (ms)"]) == pytest.approx(mean_ms, rel=1e-5)
        total_ms = sum(float(row[f"{part} (ms)"]) for part in (*parts, "rest"))
        step_ms = statistics.mean(float(one["step_ms"]) for one in of_phase)
        assert total_ms == pytest.approx(step_ms, rel=1e-5)


def test_the_numbers_of_the_tokens(single: Path) -> None:
    tokens, drawn = read(single / "token_gen_time.csv"), read(single / "figures/tokens.csv")
    assert len(tokens) == len(drawn)
    for token, row in zip(tokens, drawn, strict=True):
        assert float(row["Time (ms)"]) == pytest.approx(1e3 * float(token["Time"]), rel=1e-5)
        assert float(row["CPU Frequency"]) == float(token["CPU Frequency"])


def test_the_numbers_of_the_hits(single: Path) -> None:
    decode = [row for row in read(single / "cache.csv") if row["Phase"] == "decode"]
    drawn = read(single / "figures/hits.csv")
    by_layer = [row["Hit Rate (%)"] for row in drawn if row["Axis"] == "layer"]
    assert by_layer[2] == ""  # two of the three layers are cached
    for layer in range(2):
        rate = 100 * sum(int(row[f"Block_{layer}"]) for row in decode) / (2 * len(decode))
        assert float(by_layer[layer]) == pytest.approx(rate, rel=1e-5)
    over_time = [float(row["Hit Rate (%)"]) for row in drawn if row["Axis"] == "step"]
    assert over_time == [100 * int(row["Hits"]) / 4 for row in decode]


def test_the_numbers_of_the_experts(single: Path) -> None:
    lines = (single / "expert_choices.csv").read_text().splitlines()[2:]
    tokens = [[int(cell) for cell in line.split(",")[1:]] for line in lines]
    sets = [[set(token[2 * layer :][:2]) for layer in range(LAYERS)] for token in tokens]
    drawn = read(single / "figures/experts.csv")
    for row in drawn:
        if row["Kind"] == "popularity":
            chosen = [int(row["Expert"]) in token[int(row["Layer or Lag"])] for token in sets]
            assert float(row["Measured (%)"]) == pytest.approx(100 * statistics.mean(chosen))
    lag = next(row for row in drawn if row["Kind"] == "lag" and row["Layer or Lag"] == "1")
    shared = [
        len(now[layer] & before[layer]) / 2
        for before, now in itertools.pairwise(sets)
        for layer in range(LAYERS)
    ]
    assert float(lag["Measured (%)"]) == pytest.approx(100 * statistics.mean(shared), rel=1e-5)
    assert float(lag["Chance (%)"]) == 25


def test_the_numbers_of_the_energy(single: Path) -> None:
    (row,) = read(single / "figures/energy.csv")
    for side in ("CPU", "GPU"):
        tokens = read(single / "token_gen_time.csv")
        mean_j = statistics.mean(float(token[f"{side} Energy (J)"]) for token in tokens)
        assert float(row[f"{side} (J/token)"]) == pytest.approx(mean_j, rel=1e-5)


def test_several_runs_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [run_dir(tmp_path / policy, policy=policy) for policy in ("LRU", "FIFO")]
    assert draw(*folders, "--output-dir", tmp_path / "out") == 0
    assert [line for line in capsys.readouterr().out.splitlines() if "left out" in line] == [
        "left out: comparison by cache (no two runs differ in their cache alone)",
        "left out: comparison by threads (no two runs differ in their threads alone)",
    ]
    for name in ("breakdown", "energy", "policies", "LRU-tokens", "FIFO-experts"):
        assert is_drawn(tmp_path / f"out/{name}.png")


def drawing(function: Callable[[Sequence[RunFiles]], Drawing | None], *folders: Path) -> Drawing:
    with house_style():
        found = function(read_runs(folders))
    assert found is not None
    return found


def texts(of: Drawing) -> set[str]:
    """Everything written in the figure."""
    of.figure.draw_without_rendering()
    return {text.get_text() for text in of.figure.findobj(Text) if text.get_visible()}


def test_threads_are_compared_for_each_cache(tmp_path: Path) -> None:
    speeds = {(1, "LRU"): 5.0, (2, "LRU"): 9.0, (2, "FIFO"): 8.0}
    folders = [
        run_dir(tmp_path / f"run{number}", threads=threads, policy=policy, throughput=speed)
        for number, ((threads, policy), speed) in enumerate(speeds.items())
    ]
    rows = drawing(partial(draw_comparison, by="threads"), *folders).rows
    hits = rows[0][-3]
    assert rows == [  # FIFO was run with two threads alone
        ("a model", "a CPU", 1, 1, 2, 4, "LRU", hits, 5.0, 1),
        ("a model", "a CPU", 2, 1, 2, 4, "LRU", hits, 9.0, 1),
    ]


def test_cache_sizes_are_compared_at_one_batch_size_and_policy(tmp_path: Path) -> None:
    """One without a cache is set beside the runs of either policy."""
    settings = (
        *((1, (2, 4), "LRU", 5.0), (4, (3, 2), "LRU", 30.0), (1, (3, 2), "LRU", 6.0)),
        *((1, (3, 2), "LRU", 8.0), (1, (3, 2), "FIFO", 70.0), (1, (0, 0), "FIFO", 2.0)),
    )
    folders = [
        run_dir(tmp_path / f"run{n}", cache=cache, policy=policy, throughput=speed, batch=batch)
        for n, (batch, cache, policy, speed) in enumerate(settings)
    ]
    drawn = drawing(partial(draw_comparison, by="cache"), *folders)
    assert [(*row[4:7], *row[-2:]) for row in drawn.rows] == [
        (0, 0, "FIFO", 2.0, 1),
        (3, 2, "FIFO", 70.0, 1),
        (0, 0, "LRU", 2.0, 1),
        (2, 4, "LRU", 5.0, 1),
        (3, 2, "LRU", 7.0, 2),
    ]
    assert {"a model, a CPU, 2 threads", "FIFO", "LRU", "0 x 0", "2 x 4", "3 x 2"} <= texts(drawn)


def test_policies_are_compared_at_each_cache_size(tmp_path: Path) -> None:
    """The hit rates are those of the golden run; the last run has another number of threads."""
    settings = (
        *((2, (2, 4), "LRU", 5.0), (2, (2, 4), "FIFO", 4.0), (2, (2, 4), "LRU", 8.0)),
        *((2, (3, 2), "FIFO", 3.0), (2, (3, 2), "LRU", 2.0), (2, (9, 9), "LRU", 9.0)),
        *((2, (0, 0), "FIFO", 1.0), (7, (2, 4), "RANDOM", 1.0)),
    )
    folders = [
        run_dir(tmp_path / f"run{n}", threads=threads, cache=cache, policy=policy, throughput=speed)
        for n, (threads, cache, policy, speed) in enumerate(settings)
    ]
    drawn = drawing(partial(draw_comparison, by="policy"), *folders)
    decode = [row for row in read(folders[0] / "cache.csv") if row["Phase"] == "decode"]
    hits = 100 * sum(int(row["Hits"]) for row in decode) / (4 * len(decode))
    assert [row[4:] for row in drawn.rows] == [
        (2, 4, "FIFO", hits, 4.0, 1),
        (2, 4, "LRU", hits, 6.5, 2),
        (3, 2, "FIFO", hits, 3.0, 1),
        (3, 2, "LRU", hits, 2.0, 1),
    ]
    assert {"FIFO", "LRU", "cache 2 x 4", "cache 3 x 2"} <= texts(drawn)
    assert "RANDOM" not in texts(drawn)
    # No point lies on another's: both policies hit equally often here.
    at = [x for line in drawn.figure.axes[0].lines for x in line.get_xdata()]
    assert len(set(at)) == len(at) == 4


def test_the_breakdown_says_of_what_it_is_and_names_nothing_that_it_does_not_show(
    tmp_path: Path,
) -> None:
    with_cache, without = run_dir(tmp_path / "cached"), run_dir(tmp_path / "plain", cache=(0, 0))
    lines = [line.split(",") for line in (without / "out.csv").read_text().splitlines()]
    silent = [lines[0].index(part) for part in ("gpu", "copy_wait")]
    for line in lines[1:]:
        for column in silent:
            line[column] = "0"
    (without / "out.csv").write_text("\n".join(map(",".join, lines)) + "\n")
    both = {"attention", "router", "plan", "cpu", "combine", "rest"}
    for folder, named in (
        (without, both),
        (with_cache, both | {"copy wait", "accelerator (beside)"}),
    ):
        drawn = drawing(draw_breakdown, folder)
        (legend,) = drawn.figure.legends
        assert {text.get_text() for text in legend.get_texts()} == named
        assert "a model on a CPU" in texts(drawn)


def test_a_batched_run_is_drawn(tmp_path: Path) -> None:
    folder = run_dir(tmp_path / "batch", "batch")
    assert draw(folder) == 0
    assert is_drawn(folder / "figures/hits.png")


def test_what_there_is_no_data_for_is_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_dir(tmp_path / "bare")
    lines = (folder / "token_gen_time.csv").read_text().splitlines()
    empty = [",".join([*line.split(",")[:4], "", "", "", "", ""]) for line in lines[1:]]
    (folder / "token_gen_time.csv").write_text("\n".join([lines[0], *empty]) + "\n")
    cache = (folder / "cache.csv").read_text().splitlines()
    uncached = [",".join([*line.split(",")[:6], *"0000000"]) for line in cache[1:]]
    (folder / "cache.csv").write_text("\n".join([cache[0], *uncached]) + "\n")
    assert draw(folder) == 0
    out = capsys.readouterr().out
    assert "left out: energy per token (no run had an energy sensor)" in out
    assert "left out: cache hits (the run had no cache)" in out
    assert is_drawn(folder / "figures/tokens.png")
    assert not (folder / "figures/hits.png").exists()


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert draw(run_dir(tmp_path / "run"), "--output-dir", tmp_path / "file") == 2
    assert "expected to write figures to" in capsys.readouterr().err


POLICIES = ("FIFO", "LRU", "LFU")


def swept_row(n: int, m: int, policy: str, fits: bool | None) -> SweepRow:
    speed = 10.0 * m if fits else None
    return SweepRow(n, m, policy, n * m, 80, 40, 50 + m, 70 + m, 9, 1, 1, speed, speed, True, fits)


def swept_rows(n_slots: int | None) -> list[SweepRow]:
    """N of 2 and 4, M of 1 and 2, of which so many slots fit; None: without a machine."""
    return [
        swept_row(n, m, policy, None if n_slots is None else n * m <= n_slots)
        for n in (2, 4)
        for m in (1, 2)
        for policy in POLICIES
    ]


def lines(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()}


def test_a_sweep_without_a_machine_shows_hits_alone() -> None:
    drawing = draw_sweep(swept_rows(None), "mixtral")
    panels = drawing.figure.axes
    assert [axes.get_title() for axes in panels] == ["N = 2", "N = 4"]
    for axes in panels:
        assert lines(axes)["LRU"] == lines(axes)["LFU"] == [(1, 51), (2, 52)]
        assert lines(axes)["Belady's optimum"] == [(1, 71), (2, 72)]
        styles = {(line.get_marker(), line.get_color()) for line in axes.get_lines()}
        assert len(styles) == 4
    (legend,) = drawing.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "FIFO", "LRU", "LFU", "Belady's optimum"
    ]  # fmt: skip
    assert drawing.figure.get_suptitle() == "mixtral"


@pytest.mark.parametrize(("n_slots", "titles"), [(8, ["N = 2", "N = 4"]), (3, ["N = 2"])])
def test_what_does_not_fit_is_not_drawn(n_slots: int, titles: list[str]) -> None:
    swept = swept_rows(n_slots)
    drawing = draw_sweep(swept, "")
    hits, speeds = drawing.figure.axes[: len(titles)], drawing.figure.axes[len(titles) :]
    assert [axes.get_title() for axes in hits] == titles and len(speeds) == len(titles)
    ways = [m for m in (1, 2) if 2 * m <= n_slots]
    assert lines(hits[0])["LRU"] == [(m, 50 + m) for m in ways]
    assert lines(speeds[0])["LRU"] == [(m, 10 * m) for m in ways]
    assert drawing.header[:3] == ("n_indexes", "n_ways", "policy")
    assert len(drawing.rows) == len(swept)  # the table has all


def test_a_sweep_of_a_single_setting_can_be_drawn() -> None:
    (one,) = draw_sweep([replace(swept_row(1, 1, "LRU", True), synthetic=False)], "").figure.axes[
        :1
    ]
    assert lines(one)["LRU"] == [(1, 51)]
