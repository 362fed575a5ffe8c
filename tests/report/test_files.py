"""The run's files: golden copies, round trips through plain CSV reading, atomicity."""

from __future__ import annotations

import csv
import json
import resource
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from synthetic_recording import Shape, record_run, sensor_samples

from moe_offload.errors import UserError
from moe_offload.experts.costs import CostModel, SideCost
from moe_offload.experts.recorder import NullRecorder, Recorder
from moe_offload.machine.sensors import Sample
from moe_offload.report.files import (
    ReportPaths,
    RunInfo,
    Status,
    same_file_as,
    write_reports,
)
from moe_offload.report.read_back import read_run
from moe_offload.report.summary import RunSummary, summarize

GOLDEN = Path(__file__).parent / "golden"
SINGLE = Shape()
BATCH = Shape(n_layers=2, top_k=3, prompt_lengths=(4, 6, 3), n_tokens=3, batch=2, policy="FIFO")
CSV_FILES = (
    *("out", "cache", "expert_choices", "token_gen_time", "cpu_freq_avg"),
    "expert_counts",
)


def write(
    folder: Path,
    shape: Shape,
    samples: list[Sample] | None = None,
    status: Status = "completed",
    recorder: Recorder | None = None,
) -> tuple[list[Path], RunSummary]:
    recorder = recorder or record_run(shape)
    samples = samples or []
    summary = summarize(recorder, seqlens=shape.prompt_lengths, samples=samples)
    info = RunInfo(
        command=("src/main.py", "--max-tokens", "6"),
        layout={"cache_nblocks": shape.n_indexes, "cache_nways": shape.n_ways},
        samples=samples,
        status=status,
        started_unix_s=1_700_000_000.0,
    )
    return write_reports(recorder, ReportPaths.in_folder(folder), info, summary), summary


def read(path: Path) -> tuple[list[str], list[list[str]]]:
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    return header, rows


def by_name(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", CSV_FILES)
@pytest.mark.parametrize(("case", "shape"), [("single", SINGLE), ("batch", BATCH)])
def test_golden_files(tmp_path: Path, case: str, shape: Shape, name: str) -> None:
    write(tmp_path, shape, sensor_samples())
    assert (tmp_path / f"{name}.csv").read_text() == (GOLDEN / case / f"{name}.csv").read_text()


def test_the_references_columns_come_first(tmp_path: Path) -> None:
    write(tmp_path, SINGLE)
    first = {
        "out": "Index,attn,ffn_compute,ffn_comm",
        "cache": "Index,Block_0,Block_1,Block_2",
        "token_gen_time": "Index,Time,Timestamp,Accumulated Generation Throughput (tokens/s),"
        "CPU Frequency,CPU Temperature",
        "cpu_freq_avg": "Seconds,Temperature,cpu0",
    }
    for name, columns in first.items():
        assert (tmp_path / f"{name}.csv").read_text().startswith(columns + ",")
    lines = (tmp_path / "expert_choices.csv").read_text().splitlines()
    ids = "Index,Block_0,Block_0,Block_1,Block_1,Block_2,Block_2"
    assert lines[0] == ids
    assert lines[1] == "0,,,,,,"  # a prefill: none of the reference's cells but the index
    assert all(line.count(",") == 6 for line in lines[2:])


def test_a_prompt_column_ends_the_rows_of_runs_with_several_prompts(tmp_path: Path) -> None:
    write(tmp_path, BATCH)
    for name in CSV_FILES[:4]:
        header, rows = read(tmp_path / f"{name}.csv")
        assert header[-1] == "Prompt"
        assert {len(row) for row in rows} == {len(header)}
    _, choices = read(tmp_path / "expert_choices.csv")
    decode = [row for row in choices if row[1]]
    # Prompts 0 and 1 share the first batch's passes, prompt 2 is alone in the second.
    assert [row[-1] for row in decode] == ["0", "1", "0", "1", "2", "2"]
    assert [row[0] for row in decode] == ["1", "1", "2", "2", "4", "5"]


@pytest.mark.parametrize("shape", [SINGLE, BATCH, Shape(top_k=1), Shape(n_layers=40, n_indexes=0)])
def test_what_is_read_back_is_what_was_recorded(tmp_path: Path, shape: Shape) -> None:
    recorder = record_run(shape)
    write(tmp_path, shape, recorder=recorder)
    _, choices = read(tmp_path / "expert_choices.csv")
    _, hits = read(tmp_path / "cache.csv")
    read_ids: dict[tuple[int, int], list[list[int]]] = {}
    for row in choices:
        for layer in range(shape.n_layers):
            cells = row[1 + layer * shape.top_k :][: shape.top_k]
            if cells and cells[0]:
                read_ids.setdefault((int(row[0]), layer), []).append([int(c) for c in cells])
    decode = recorder.pass_table()["decode"]
    for event in recorder.layer_events():
        key = (event.pass_index, event.layer)
        assert read_ids.get(key) == (event.ids if decode[event.pass_index] else None)
        assert int(hits[event.pass_index][1 + event.layer]) == event.hits
    assert len(hits) == len(decode)


@pytest.mark.parametrize("shape", [SINGLE, BATCH])
def test_conservation(tmp_path: Path, shape: Shape) -> None:
    write(tmp_path, shape)
    for row in by_name(tmp_path / "cache.csv"):
        choices = int(row["Tokens"]) * shape.n_indexes * shape.top_k
        assert int(row["Hits"]) + int(row["Misses"]) == choices
        assert int(row["Pairs"]) == int(row["Tokens"]) * shape.n_indexes
        blocks = [int(row[f"Block_{layer}"]) for layer in range(shape.n_layers)]
        assert sum(blocks) == int(row["Hits"])
    for row in by_name(tmp_path / "out.csv"):
        per_layer_ms = sum(
            float(row[part]) for part in ("attn", "router", "plan", "ffn_compute", "ffn_comm")
        )
        total_ms = per_layer_ms * shape.n_layers + float(row["rest_ms"])
        assert total_ms == pytest.approx(float(row["step_ms"]), rel=1e-6)
        assert float(row["rest_ms"]) == pytest.approx(0.1, rel=1e-3)  # as the recording says


def test_run_json_holds_what_a_repetition_needs(tmp_path: Path) -> None:
    files, summary = write(tmp_path, SINGLE, sensor_samples())
    assert [path.name for path in files] == [*(f"{name}.csv" for name in CSV_FILES), "run.json"]
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["status"] == "completed"
    assert run["command"] == ["src/main.py", "--max-tokens", "6"]
    assert run["started"] == "2023-11-14T22:13:20+00:00"
    assert run["layout"] == {"cache_nblocks": 2, "cache_nways": 4}
    assert run["versions"]["torch"]
    assert run["versions"]["python"].startswith("3.")
    assert run["summary"]["generated_tokens"] == summary.generated_tokens == 5
    assert all((tmp_path / name).exists() for name in run["files"].values())


def test_run_json_is_json_to_the_letter(tmp_path: Path) -> None:
    """Infinite costs (no accelerator) would be written as a word that no JSON reader knows."""
    recorder = record_run(SINGLE)
    info = RunInfo(calibration={"costs": {"gpu": {"expert_us": float("inf")}, "a": [float("nan")]}})
    write_reports(recorder, ReportPaths.in_folder(tmp_path), info, summarize(recorder))

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    run = json.loads((tmp_path / "run.json").read_text(), parse_constant=refuse)
    assert run["calibration"]["costs"] == {"gpu": {"expert_us": None}, "a": [None]}


def test_what_no_accelerator_measured_is_null_in_run_json(tmp_path: Path) -> None:
    costs = CostModel(
        SideCost(1, 2, 3), SideCost(0, float("inf"), 0), 0, 1e-9, 1e-9, 1, 4096, 5
    )  # fmt: skip
    for gpu, measured in ((costs.gpu, None), (SideCost(1, 2, 3), 1e-9)):
        info = RunInfo(calibration={"costs": asdict(replace(costs, gpu=gpu))})
        recorder = record_run(SINGLE)
        write_reports(recorder, ReportPaths.in_folder(tmp_path), info, summarize(recorder))
        written = json.loads((tmp_path / "run.json").read_text())["calibration"]["costs"]
        assert written["copy_gbps"] == written["copy_gbps_shared"] == measured
        assert written["cpu"]["expert_us"] == 2


def test_machines_without_sensors_have_empty_cells(tmp_path: Path) -> None:
    write(tmp_path, SINGLE, [Sample(1_700_000_000.5), Sample(1_700_000_001.5)])
    (row, *_) = by_name(tmp_path / "token_gen_time.csv")
    assert row["CPU Frequency"] == row["CPU Temperature"] == row["CPU Energy (J)"] == ""
    assert (tmp_path / "cpu_freq_avg.csv").read_text().splitlines()[1:] == [
        "1700000000,,,,",
        "1700000001,,,,",
    ]


@pytest.mark.parametrize("status", ["interrupted", "failed"])
def test_an_unfinished_run_never_replaces_earlier_results(tmp_path: Path, status: Status) -> None:
    write(tmp_path, SINGLE)
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    files, _ = write(tmp_path, replace(SINGLE, n_tokens=3), status=status)
    assert {path.name for path in files} == {name.replace(".", ".partial.") for name in before}
    assert all((tmp_path / name).read_text() == text for name, text in before.items())
    assert json.loads((tmp_path / "run.partial.json").read_text())["status"] == status


def test_unfinished_runs_do_not_replace_each_other(tmp_path: Path) -> None:
    for n_tokens in (6, 5, 4, 3):
        write(tmp_path, replace(SINGLE, n_tokens=n_tokens), status="interrupted")
    for name, n_tokens in (("", 6), (".partial", 5), (".partial-2", 4), (".partial-3", 3)):
        document = json.loads((tmp_path / f"run{name}.json").read_text())
        assert document["summary"]["generated_tokens"] == n_tokens - 1
        assert document["files"]["breakdown"] == f"out{name}.csv"
        assert len(by_name(tmp_path / f"out{name}.csv")) == n_tokens


def test_the_files_of_a_run_are_found_wherever_they_are(tmp_path: Path) -> None:
    recorder = record_run(SINGLE)
    paths = ReportPaths.in_folder(tmp_path, Path("deep/time.csv"), tmp_path / "hits.csv")
    write_reports(recorder, paths, RunInfo(), summarize(recorder))
    files = json.loads((tmp_path / "run.json").read_text())["files"]
    assert files["breakdown"] == "deep/time.csv"
    assert files["cachehit"] == "hits.csv"
    assert read_run(tmp_path, "run").n_layers == SINGLE.n_layers


def test_an_unfinished_run_alone_uses_the_plain_names(tmp_path: Path) -> None:
    files, _ = write(tmp_path, SINGLE, status="interrupted")
    assert (tmp_path / "out.csv") in files
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "interrupted"


def test_a_run_without_a_finished_pass_writes_nothing(tmp_path: Path) -> None:
    recorder = Recorder()
    recorder.begin_pass("prefill", 4, 0)
    files, _ = write(tmp_path, SINGLE, status="failed", recorder=recorder)
    assert files == []
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_records_nothing_writes_nothing(tmp_path: Path) -> None:
    recorder = NullRecorder()
    recorder.begin_pass("prefill", 4, 0)
    recorder.end_pass(0.1)
    files, _ = write(tmp_path, SINGLE, recorder=recorder)
    assert files == []
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"write .*/file/out\.csv, but found: File exists: send"):
        write(tmp_path / "file", SINGLE)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_leaves_the_old_files_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, SINGLE)
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(
        UserError, match=r"write .*/out\.csv, but found: No space left on device: make room"
    ):
        write(tmp_path, BATCH)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


def test_a_limit_on_files_leaves_no_half_of_one(tmp_path: Path) -> None:
    """As `ulimit -f`, or a batch system's: the kernel cuts the write short, then refuses."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(UserError, match=r"write .*/out\.csv, but found: File too large: send"):
            write(tmp_path, SINGLE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_result_under_another_name_of_a_models_file_is_found(tmp_path: Path) -> None:
    model, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    for folder in (model / "below", elsewhere):
        folder.mkdir(parents=True)
    manifest, shard, prompts = model / "manifest.json", model / "below/0.bin", tmp_path / "prompts"
    for file in (manifest, shard, prompts, elsewhere / "old.csv"):
        file.write_text("same")
    (model / "broken").symlink_to(tmp_path / "none")
    (elsewhere / "hard").hardlink_to(shard)
    (elsewhere / "soft").symlink_to(manifest)
    (elsewhere / "prompts").hardlink_to(prompts)
    for name, file in (("hard", shard), ("soft", manifest), ("prompts", prompts)):
        assert same_file_as(elsewhere / name, [prompts, model]) == file
    assert same_file_as(model / ".." / "model" / "manifest.json", [model]) is not None
    for name in ("old.csv", "new.csv"):
        assert same_file_as(elsewhere / name, [prompts, model, tmp_path / "missing"]) is None
