"""What `gpu_check.py` starts and ends in time: every model, and every setting of each."""

from __future__ import annotations

import argparse
import ctypes
import gc
import platform
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check import (
    COMPLETE,
    ROOT,
    RUNNING,
    SHARES,
    Format,
    models,
    parse,
    write_report,
)
from benchmarks.gpu_models import (
    N_CORE_SETTINGS,
    card_speeds,
    load_s_per_byte,
    open_source,
    settings,
)
from benchmarks.gpu_one_setting import PROMPT_LENGTHS, PROMPT_TOKENS, Row, print_row, run_setting
from moe_offload.config import CacheOptions, ModelOptions
from moe_offload.engine.loading import choose_device, load_engine
from moe_offload.engine.setup import gpu_uuid
from moe_offload.errors import UserError
from moe_offload.machine.hardware import read_hardware
from moe_offload.model.dummy import DummyModel, dummy_routing

LOADING_SHARE = 1 / 3  # of a model's part of the time, for filling and pinning its memory
TEST_TIMEOUT_S = 150
# For the KV cache: a prompt and all its steps, or the longest prompt.
_CONTEXT_TOKENS = max(PROMPT_TOKENS + 224, *PROMPT_LENGTHS)
_PR_SET_PDEATHSIG = 1


class Report:
    """What was found so far, and what is still missing; on disk after every change."""

    def __init__(self, path: Path | None, models: Sequence[tuple[str, Format]]) -> None:
        self.rows: list[Row] = []
        self.document: dict[str, Any] = {}
        self._path = path
        self._started_s = time.monotonic()
        self._missing: dict[tuple[str, str, str], str] = {
            (shape, weight_format, setting.name): ""
            for shape, weight_format in models
            for setting in settings(shape, 1, 1, 1.0)
        }

    @property
    def skipped(self) -> list[str]:
        """The settings that were not measured, with the reason where one is known."""
        return [" ".join(name) + reason for name, reason in self._missing.items()]

    def add(self, row: Row) -> None:
        self.rows.append(row)
        del self._missing[row.shape, row.weight_format, row.setting]
        self.save()

    def leave_out(self, shape: str, weight_format: str, reason: object, setting: str = "") -> None:
        """Give the reason why `setting`, or all of a model that is still missing, is left out."""
        for name, known in self._missing.items():
            if name[:2] == (shape, weight_format) and (name[2] == setting or not setting):
                self._missing[name] = known or f" ({reason})"
        self.save()

    def save(self, ended: str = RUNNING) -> None:
        self.document["ended"] = ended
        self.document["took_s"] = time.monotonic() - self._started_s
        self.document["rows"] = [asdict(row) for row in self.rows]
        self.document["skipped"] = self.skipped
        if self._path is not None:
            write_report(self._path, self.document)


def run_tests() -> dict[str, object]:
    """The CUDA-marked tests' outcome."""
    # Only files that have some: collecting all others takes longer than these tests.
    files = [str(f) for f in sorted(ROOT.glob("tests/*/test_*.py")) if "mark.cuda" in f.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", *files]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=TEST_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        line = f"the CUDA-marked tests took more than {TEST_TIMEOUT_S} s"
        print(line, flush=True)
        return {"exit_code": 124, "last_line": line}
    lines = done.stdout.strip().splitlines()
    print("\n".join(lines[-15:]), flush=True)
    return {"exit_code": done.returncode, "last_line": lines[-1] if lines else done.stderr[-300:]}


def run_shape(
    source: DummyModel,
    shape: str,
    arguments: argparse.Namespace,
    deadline_s: float,
    n_left: float,
    report: Report,
) -> None:
    """Every setting of one shape, each with an equal part of the time to `deadline_s`, which as
    many models as `n_left` share.

    Once the time of this shape is up, only its core settings are still begun: others wait.
    """
    reference = None
    options = ModelOptions(None, device=arguments.device, dummy_shape=shape)
    started_s = time.monotonic()
    share_end_s = started_s + (deadline_s - started_s) / n_left
    with load_engine(source, options, CacheOptions(), context_tokens=_CONTEXT_TOKENS) as engine:
        print(
            f"{source.name}, {engine.store.n_layers} layers of {source.n_experts[0]} experts; in "
            f"memory those of {engine.store.n_stored} layers, which all use: "
            f"{engine.store.total_bytes / 1e9:.1f} GB, loaded in "
            f"{time.monotonic() - started_s:.1f} s",
            flush=True,
        )
        for note in engine.notes:
            print(note, flush=True)
        routing = dummy_routing(source, arguments.trace)
        tried = settings(shape, engine.store.n_layers, source.n_experts[0], arguments.memory_gb)
        for number, setting in enumerate(tried):
            end_s = deadline_s if number < N_CORE_SETTINGS else share_end_s
            left_s = deadline_s - time.monotonic()
            if time.monotonic() > end_s:
                report.leave_out(shape, source.weight_format, "out of time")
                return
            budget_s = left_s / (n_left * len(tried) - number) / 2  # half for all but decoding
            try:
                row, reference = run_setting(
                    engine, shape, setting, routing, reference, arguments.tokens, budget_s
                )
            except Exception as error:  # the other settings may tell why
                traceback.print_exc()
                report.leave_out(shape, source.weight_format, repr(error), setting.name)
                continue
            report.add(row)
            print_row(row)


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything; 0 when all was measured and right and the tests passed, else 1.

    2 without a GPU.
    """
    arguments = parse(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no CUDA GPU; --device cpu tries the script", file=sys.stderr)
        return 2
    started_s = time.monotonic()
    deadline_s = started_s + 60 * arguments.minutes
    measured = models(arguments)
    report = Report(arguments.json, measured)
    report.document |= {
        "date": date.today().isoformat(),
        "command": sys.argv,
        "hardware": read_hardware(gpu_uuid=gpu_uuid(choose_device(arguments.device))).to_json(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "tests": None,
    }
    report.save()
    tests = None if arguments.skip_tests or arguments.device == "cpu" else run_tests()
    report.document["tests"] = tests
    report.save()
    s_per_byte = load_s_per_byte(arguments.device)
    report.document["card"] = card_speeds(arguments.device)
    print(", ".join(f"{k} {v:.0f}" for k, v in report.document["card"].items()), flush=True)
    for number, (shape, weight_format) in enumerate(measured):
        left_s = deadline_s - time.monotonic()
        if left_s < 0:
            report.leave_out(shape, weight_format, "out of time")
            continue
        shares = [*SHARES, *[1] * len(measured)][number : len(measured)]
        n_left = sum(shares) / shares[0]  # models like this one
        most_bytes = left_s / n_left * LOADING_SHARE / s_per_byte
        try:
            source = open_source(shape, weight_format, arguments.layers, most_bytes)
            run_shape(source, shape, arguments, deadline_s, n_left, report)
            del source
        except Exception as error:  # the other models may fit
            if not isinstance(error, UserError):
                traceback.print_exc()
            print(f"{shape} {weight_format} is left out: {error}", flush=True)
            report.leave_out(shape, weight_format, error)
        gc.collect()
        torch.cuda.empty_cache()  # the next model finds the memory free, and counts it so
    report.save(COMPLETE)
    if report.skipped:
        print("not measured: " + "; ".join(report.skipped))
    print(f"took {time.monotonic() - started_s:.0f} s")
    right = not report.skipped and all(row.correct for row in report.rows)
    return 0 if right and (tests is None or tests["exit_code"] == 0) else 1


def _end_with_parent() -> None:
    """Nobody is left to end this process in time, or to read it, when `gpu_check.py` is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    _end_with_parent()
    sys.exit(main())
