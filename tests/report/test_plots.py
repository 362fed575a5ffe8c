"""Figures drawn from the golden CSVs: they exist, show something, and their numbers are right."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
import statistics
from pathlib import Path

import pytest
from plotted import is_drawn

from moe_offload.commands import draw as draw_module

GOLDEN = Path(__file__).parent / "golden"
LAYERS = 3  # of golden/single


def run_dir(
    folder: Path,
    case: str = "single",
    threads: int = 2,
    cache: tuple[int, int] = (2, 4),
    throughput: float = 10.0,
) -> Path:
    """A run's folder: the golden CSVs and the part of run.json that figures read."""
    shutil.copytree(GOLDEN / case, folder)
    document = {
        "n_threads": threads,
        "model": {"cache_nblocks": cache[0], "cache_nways": cache[1], "n_experts": [8] * LAYERS},
        "summary": {"generation_throughput": throughput},
        "files": {
            "breakdown": "out.csv",
            "cachehit": "cache.csv",
            "expert_choices": "expert_choices.csv",
            "token_gen_time": "token_gen_time.csv",
        },
    }
    (folder / "run.json").write_text(json.dumps(document))
    return folder


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
    speeds = {(1, (2, 4)): 5.0, (2, (2, 4)): 9.0, (2, (3, 2)): 8.0}
    folders = [
        run_dir(tmp_path / f"run{number}", threads=threads, cache=cache, throughput=speed)
        for number, ((threads, cache), speed) in enumerate(speeds.items())
    ]
    assert draw(*folders, "--output-dir", tmp_path / "out") == 0
    assert "left out" not in capsys.readouterr().out
    for name in ("breakdown", "energy", "throughput_cache", "throughput_cores", "run0-tokens"):
        assert is_drawn(tmp_path / f"out/{name}.png")
    cores = {
        (row["Cache"], int(row["Threads"])): float(row["Throughput (tokens/s)"])
        for row in read(tmp_path / "out/throughput_cores.csv")
    }
    assert cores == {
        (f"cache {n} x {m}", threads): speed for (threads, (n, m)), speed in speeds.items()
    }
    sizes = {
        (int(row["Cache Indexes N"]), int(row["Ways M"])): float(row["Throughput (tokens/s)"])
        for row in read(tmp_path / "out/throughput_cache.csv")
    }
    assert sizes == {(2, 4): 9.0, (3, 2): 8.0}  # of the runs on two threads


def test_cache_sizes_are_compared_at_one_batch_size(tmp_path: Path) -> None:
    folders = []
    for number, (batch, cache, speed) in enumerate(
        [(1, (2, 4), 5.0), (4, (3, 2), 30.0), (1, (3, 2), 6.0), (1, (3, 2), 8.0)]
    ):
        folders.append(run_dir(tmp_path / f"run{number}", cache=cache, throughput=speed))
        document = json.loads((folders[-1] / "run.json").read_text())
        document["settings"] = {"generation": {"batch_size": batch}}
        (folders[-1] / "run.json").write_text(json.dumps(document))
    assert draw(*folders, "--output-dir", tmp_path / "out") == 0
    sizes = [tuple(row.values()) for row in read(tmp_path / "out/throughput_cache.csv")]
    assert sizes == [("2", "4", "5", "1"), ("3", "2", "7", "2")]


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


def damage(folder: Path, name: str, old: str, new: str) -> None:
    path = folder / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_wrong_arguments_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, sentence in (
        ((), "the following arguments are required: RUN_DIR; see --help"),
        ((tmp_path / "run.partial.json",), "run.partial.json: expected the JSON that a run writes"),
    ):
        assert draw(*arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert sentence in err
        assert err.count("\n") == 1
        assert "Errno" not in err


@pytest.mark.parametrize(
    ("name", "old", "new", "sentence"),
    [
        ("out.csv", "decode,1,1.504", "decode,1,fast", "out.csv, line 3: expected a number in"),
        ("out.csv", "decode,1,1.504", "decode,1", "out.csv, line 3: expected 19 cells, found 18"),
        ("out.csv", "step_ms", "steps", "out.csv, line 1: expected the columns step_ms, found"),
        ("cache.csv", "5,2,0,0,decode,1,2,2,2,1,1,2,2\n", "", "of one run, found 6 and 5 forward"),
        ("run.json", '"summary"', '"other"', "run.json: expected the JSON that a run writes"),
        ("run.json", "{", "{{", "run.json: expected the JSON that a run writes"),
        ("run.json", '"breakdown"', '"else"', "run.json: expected the names of the run's files"),
    ],
)
def test_damaged_files_are_one_sentence(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    old: str,
    new: str,
    sentence: str,
) -> None:
    folder = run_dir(tmp_path / "run")
    damage(folder, name, old, new)
    assert draw(folder) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert sentence in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "name", ["run.json", "out.csv", "token_gen_time.csv", "expert_choices.csv"]
)
def test_missing_files_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = run_dir(tmp_path / "run")
    (folder / name).unlink()
    assert draw(folder) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert name in err
    assert err.count("\n") == 1


def test_the_files_of_an_interrupted_run_are_read(tmp_path: Path) -> None:
    folder = run_dir(tmp_path / "run")
    (folder / "run.json").rename(folder / "run.partial.json")
    assert draw(folder) == 0


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert draw(run_dir(tmp_path / "run"), "--output-dir", tmp_path / "file") == 2
    assert "expected to write figures to" in capsys.readouterr().err
