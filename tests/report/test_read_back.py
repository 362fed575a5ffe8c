"""A run's files read back: whatever they hold, an answer in one sentence and in bounded time."""

from __future__ import annotations

import json
import os
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
from run_folders import run_dir

from moe_offload.commands import draw as draw_module
from moe_offload.errors import UserError
from moe_offload.report import drawing, figures
from moe_offload.report.read_back import read_run, read_runs


def draw(*arguments: object) -> int:
    return draw_module.plots([str(argument) for argument in arguments])


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
        (
            (tmp_path / "run.partial.json",),
            "run.partial.json is damaged or unreadable; give the folder",
        ),
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
        (
            "out.csv",
            "decode,1,1.504",
            "decode,1,fast",
            "line 3: expected 23 cells, a number in every",
        ),
        ("out.csv", "decode,1,1.504", "decode,1", "out.csv, line 3: expected 23 cells"),
        ("out.csv", "plan", "plans", "out.csv, line 1: expected the columns plan, found"),
        ("cache.csv", "Misses", "x", "cache.csv, line 1: expected the columns Misses, found"),
        ("token_gen_time.csv", "CPU F", "F", "line 1: expected the columns CPU Frequency, found"),
        ("cache.csv", "5,2,0,0,decode,1,2,2,2,1,1,2,2\n", "", "of one run, found 6 and 5 forward"),
        ("run.json", '"summary"', '"other"', "run.json: expected the JSON that a run writes"),
        ("run.json", "{", "{{", "run.json is damaged or unreadable; give the folder"),
        ("cache.csv", "decode,1,0,4,2", "decode,1,0,4,9", "expected counts that agree"),
        ("cache.csv", "decode,1,0,4,2", "decode,1,0,4,4", "expected counts that agree"),
        ("run.json", '"breakdown"', '"else"', "found None as its files.breakdown"),
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
    assert read_run(folder, "run").n_threads == 2


@pytest.mark.parametrize("name", ["run.json", "out.csv", "expert_choices.csv"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_only_files_are_read(tmp_path: Path, name: str, kind: str) -> None:
    """A pipe waits for a writer for ever, and a device may never end."""
    path = run_dir(tmp_path / "run") / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(UserError, match=rf"expected a file at .*{name}, found a folder, device or"):
        read_run(path.parent, "run")


@pytest.mark.parametrize(("name", "n_bytes"), [("run.json", 2**29), ("out.csv", 2**33)])
def test_a_file_too_large_for_a_run_is_refused_unread(
    tmp_path: Path, name: str, n_bytes: int
) -> None:
    folder = run_dir(tmp_path / "run")
    os.truncate(folder / name, n_bytes)  # a hole, which takes no room
    with pytest.raises(UserError, match=rf"at most \d+ MiB in .*{name}, found {n_bytes >> 20} MiB"):
        read_run(folder, "run")


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        (None, "n_threads", "two"),
        (None, "n_threads", True),
        ("model", "name", ["a"]),
        ("model", "cache_nblocks", 1.5),
        ("model", "n_experts", 8),
        ("summary", "generation_throughput", "fast"),
        ("settings", "cache", {"policy": 3}),
        ("files", "breakdown", 7),
    ],
)
def test_a_fact_of_another_kind_is_named(
    tmp_path: Path, group: str | None, name: str, value: object
) -> None:
    folder = run_dir(tmp_path / "run")
    document = json.loads((folder / "run.json").read_text())
    (document[group] if group else document)[name] = value
    (folder / "run.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=rf"run.json: expected the JSON .* as its .*{name}"):
        read_run(folder, "run")


def test_a_run_that_tells_little_is_read(tmp_path: Path) -> None:
    folder = run_dir(tmp_path / "run")
    document = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({"files": document["files"], "summary": {}}))
    run = read_run(folder, "run")
    assert (run.model, run.machine, run.policy, run.cache) == ("", "", "", (0, 0))
    assert (run.n_threads, run.batch_size, run.throughput, run.n_experts) == (0, 1, 0.0, None)


def test_the_machine_is_what_computed(tmp_path: Path) -> None:
    folder = run_dir(tmp_path / "run")
    assert read_run(folder, "run").machine == "a CPU"
    path = folder / "run.json"
    path.write_text(path.read_text().replace('"device": "cpu"', '"device": "cuda:0"'))
    assert read_run(folder, "run").machine == "a CPU and an idle GPU"


CELLS = ("", "nan", "inf", "-1", "0", "1e300", "99999999999", "x", "1,2", '"', "\0", "3.5")
FACTS: tuple[Any, ...] = (
    *(None, True, -1, 0, 1e300, 10**20, float("nan"), [], {}, [[1]]),
    *("x", "$x_{$", "\x1b[1m", "a" * 5000, "../../../etc/passwd", "/dev/zero"),
)


def mutate(folder: Path, rng: random.Random) -> None:
    """Put a foreign value into a cell or a column of a CSV, or in the place of a fact."""
    name = rng.choice(["out.csv", "cache.csv", "token_gen_time.csv", "run.json", "run.json"])
    path = folder / name
    if name == "run.json":
        document = json.loads(path.read_text())
        group, key = document, rng.choice(list(document))
        while isinstance(group[key], dict) and group[key] and rng.random() < 0.8:
            group = group[key]
            key = rng.choice(list(group))
        group[key] = rng.choice(FACTS)
        path.write_text(json.dumps(document))
        return
    rows = [line.split(",") for line in path.read_text().splitlines()]
    column, value = rng.randrange(len(rows[0])), rng.choice(CELLS)
    for row in rows[1:] if rng.random() < 0.5 else [rng.choice(rows)]:
        row[column] = value
    path.write_text("\n".join(map(",".join, rows)) + "\n")


@pytest.mark.parametrize("n_cases", [50, pytest.param(2000, marks=pytest.mark.nightly)])
def test_whatever_a_folder_holds_is_drawn_or_refused(tmp_path: Path, n_cases: int) -> None:
    rng = random.Random(n_cases)
    n_drawn = 0
    for case in range(n_cases):
        folder = run_dir(tmp_path / str(case), rng.choice(["single", "batch"]))
        mutate(folder, rng)
        with warnings.catch_warnings(), drawing.house_style():
            warnings.simplefilter("error")
            try:
                runs = read_runs([folder, folder])
            except UserError:
                continue
            figures.draw_breakdown(runs)
            figures.draw_energy(runs)
            figures.draw_comparison(runs, "cache")
            figures.draw_tokens(runs[0])
            figures.draw_hits(runs[0])
            n_drawn += 1
    assert 0.1 * n_cases < n_drawn < 0.8 * n_cases  # both answers were tried


def test_a_name_is_drawn_as_it_is(tmp_path: Path) -> None:
    """No mathematics between dollars, no escapes, and room left for the figure."""
    folders = [run_dir(tmp_path / name) for name in ("$a_{$", "b" * 200)]
    path = folders[0] / "run.json"
    path.write_text(path.read_text().replace('"a model"', '"$x_{$ \\u001b[1m"'))
    with drawing.house_style():
        drawing.save_drawing(figures.draw_breakdown(read_runs(folders)), tmp_path / "out")
    labels = (tmp_path / "out/breakdown.svg").read_text()
    assert "$a_{$" in labels
    assert r"$x_{$ \x1b[1m and a model on a CPU" in labels
    assert "..." + "b" * 37 + "<" in labels
