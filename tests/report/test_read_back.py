"""A run's files read back: whatever they hold, an answer in one sentence and in bounded time."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from run_folders import run_dir

from moe_offload.commands import draw as draw_module
from moe_offload.errors import UserError
from moe_offload.report.read_back import read_run


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
        ((tmp_path / "run.partial.json",), "run.partial.json, which cannot be read (No such file"),
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
        ("out.csv", "plan", "plans", "out.csv, line 1: expected the columns plan, found"),
        ("cache.csv", "Misses", "x", "cache.csv, line 1: expected the columns Misses, found"),
        ("token_gen_time.csv", "CPU F", "F", "line 1: expected the columns CPU Frequency, found"),
        ("cache.csv", "5,2,0,0,decode,1,2,2,2,1,1,2,2\n", "", "of one run, found 6 and 5 forward"),
        ("run.json", '"summary"', '"other"', "run.json: expected the JSON that a run writes"),
        ("run.json", "{", "{{", "run.json: expected the JSON that a run writes"),
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
    with pytest.raises(UserError, match=rf"expected a file, found .*{name}, a folder, pipe or"):
        read_run(path.parent, "run")


@pytest.mark.parametrize(("name", "n_bytes"), [("run.json", 2**27), ("out.csv", 2**33)])
def test_a_file_too_large_for_a_run_is_refused_unread(
    tmp_path: Path, name: str, n_bytes: int
) -> None:
    folder = run_dir(tmp_path / "run")
    os.truncate(folder / name, n_bytes)  # a hole, which takes no room
    with pytest.raises(UserError, match=rf"{name} of at most \d+ MiB, found {n_bytes >> 20}: "):
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
