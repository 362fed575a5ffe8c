"""The CUDA-marked tests, shared by several processes: most of their time is Triton's compiler.

This module is also pytest's plugin in each of them, which keeps the process's share of the tests.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

import pytest

ROOT: Final = Path(__file__).resolve().parent.parent
MOST_PROCESSES: Final = 12  # each holds a context of some 500 MB on the card
TIMEOUT_S: Final = 150
_NO_TESTS: Final = 5  # pytest's exit code: a share of none


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", help="I/N: the I-th of N parts of the tests, from 0")


@pytest.hookimpl(trylast=True)  # behind what `-m` leaves out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Neighbours stay together: they share compiled kernels."""
    part, parts = map(int, config.getoption("--share").split("/"))
    kept = items[len(items) * part // parts : len(items) * (part + 1) // parts]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def run_tests(marker: str = "cuda", n_processes: int | None = None) -> dict[str, Any]:
    """Run them all; how many passed, the last line of each process, and 0 if nothing failed."""
    # Only files that have some: collecting all others takes longer than these tests.
    named = f"mark.{marker}"
    files = [str(f) for f in sorted(ROOT.glob("tests/*/test_*.py")) if named in f.read_text()]
    parts = n_processes or min(MOST_PROCESSES, os.cpu_count() or 1)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marker]
    command += ["-p", "benchmarks.gpu_tests"]
    started_s = time.monotonic()
    processes = [
        subprocess.Popen(
            [*command, "--share", f"{part}/{parts}", *files],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])},
        )
        for part in range(parts)
    ]
    codes, last_lines = [], []
    for process in processes:
        try:
            output, _ = process.communicate(timeout=TIMEOUT_S + started_s - time.monotonic())
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            output += f"\nended after {TIMEOUT_S} s"
        codes.append(process.returncode)
        last_lines.append(output.strip().splitlines()[-1])
        if process.returncode:
            print(output[-6000:], flush=True)
    passed = sum(int(n) for line in last_lines for n in re.findall(r"(\d+) passed", line))
    took_s = time.monotonic() - started_s
    print(f"{passed} CUDA-marked tests passed in {took_s:.0f} s, {parts} processes", flush=True)
    return {
        "exit_code": next((code for code in codes if code not in (0, _NO_TESTS)), 0),
        "passed": passed,
        "took_s": took_s,
        "last_lines": last_lines,
    }
