"""What the simulator prints reaches its reader, or its loss is told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from written_trace import write_trace

from moe_offload.simulation.traces import RoutingPass, TraceInfo

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "routing.jsonl"
    passes = [RoutingPass("decode", (((0, 1),), ((2, 3),))) for _ in range(5)]
    write_trace(path, TraceInfo("日本", n_layers=2, top_k=2, n_experts=4), passes)
    return path


@pytest.mark.parametrize(
    ("encoding", "streams", "code", "out", "err"),
    [
        ("ascii", "", 0, r"routing: \u65e5\u672c, 2 layers", ""),
        ("utf-8", "", 0, "routing: 日本, 2 layers", ""),
        ("utf-8", ">/dev/full", 2, "", "error: [Errno 28] No space left on device: '<stdout>'\n"),
        ("utf-8", ">&-", 0, "", "standard output is closed: what this program prints is lost\n"),
        ("utf-8", "2>&-", 0, "routing: 日本, 2 layers", ""),
        ("utf-8", "| head -c 9", 0, "routing: ", ""),
    ],
)
def test_what_is_printed_is_shown_or_its_loss_is_told(
    trace: Path, encoding: str, streams: str, code: int, out: str, err: str
) -> None:
    program = f"set -o pipefail; '{sys.executable}' src/simulator.py \"$0\" "
    done = subprocess.run(
        ["/bin/bash", "-c", f"{program} --cache-nblocks 1 --cache-nways 2 {streams}", trace],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUNBUFFERED": ""},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr.decode()) == (code, err)
    assert done.stdout.decode().startswith(out)
