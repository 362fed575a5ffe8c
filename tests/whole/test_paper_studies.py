"""The paper's studies: which runs, and that those which have ended are not repeated."""

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import paper_studies


def test_each_study_varies_one_thing() -> None:
    runs = list(paper_studies.planned([2, 8], ["14x4", "7x8"], ["LRU", "FIFO"], 8))
    assert [run.name for run in runs] == [
        "cores-2", "cores-8", "cache-14x4", "cache-7x8", "policy-LRU", "policy-FIFO"
    ]  # fmt: skip
    assert {run.threads for run in runs[2:]} == {8}
    assert {run.policy for run in runs[:4]} == {"LRU"} and runs[3].cache == "7x8"
    flags = runs[3].flags(Path("d"))
    assert flags[:4] == ["--cache-nblocks", "7", "--cache-nways", "8"]


def test_a_study_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        folder = Path(command[command.index("--output-dir") + 1])
        started.append(command)
        if len(started) == 3:
            return subprocess.CompletedProcess(command, 130)
        folder.mkdir(parents=True)
        summary = {"generation_throughput": 4.5}
        (folder / "run.json").write_text(json.dumps({"summary": summary}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    arguments = ["--output-dir", str(tmp_path), "--cores", "1", "--", "--dummy-weights", "m"]
    assert paper_studies.main(arguments) == 130  # the third was stopped
    assert paper_studies.main(arguments) == 0
    names = [Path(command[command.index("--output-dir") + 1]).name for command in started]
    assert len(names) == 1 + 7 and names[2] == names[3]
    assert all(command[-2:] == ["--dummy-weights", "m"] for command in started)
    assert capsys.readouterr().out.count("4.50 tokens/s") == 2 + 7
