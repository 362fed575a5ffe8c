"""What `gpu_check.py` starts and ends in time: every model, and every setting of each."""

from __future__ import annotations

import argparse
import ctypes
import gc
import platform
import signal
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
    RUNNING,
    SETTINGS,
    SHARES,
    Format,
    models,
    parse,
    write_report,
)
from benchmarks.gpu_memory import loading_row, mixtral_layout, pinning_row
from benchmarks.gpu_models import (
    N_CORE_SETTINGS,
    card_speeds,
    load_s_per_byte,
    open_source,
    settings,
)
from benchmarks.gpu_one_setting import PROMPT_LENGTHS, PROMPT_TOKENS, Row, print_row, run_setting
from benchmarks.gpu_tests import run_tests
from moe_offload.config import CacheOptions, ModelOptions
from moe_offload.engine.loading import choose_device, load_engine
from moe_offload.engine.setup import gpu_uuid
from moe_offload.errors import UserError
from moe_offload.machine.hardware import read_hardware
from moe_offload.model.dummy import DummyModel, dummy_routing

LOADING_SHARE = 1 / 3  # of a model's part of the time, for filling and pinning its memory
LOADED_BYTES = 12e9  # at most, from a file that the page cache holds
# For the KV cache: a prompt and all its steps, or the longest prompt.
_CONTEXT_TOKENS = max(PROMPT_TOKENS + 224, *PROMPT_LENGTHS)
_PR_SET_PDEATHSIG = 1


class Report:
    """What was found so far, and what is still missing; on disk after every change."""

    def __init__(
        self,
        path: Path | None,
        models: Sequence[tuple[str, Format]],
        chosen: Sequence[str] = SETTINGS,
    ) -> None:
        self.rows: list[Row] = []
        self.document: dict[str, Any] = {}
        self._path = path
        self._started_s = time.monotonic()
        self._missing: dict[tuple[str, str, str], str] = {
            (shape, weight_format, setting.name): ""
            for shape, weight_format in models
            for setting in settings(shape, 1, 1, 1.0)
            if setting.name in chosen
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


def measure_kernels(report: Report) -> None:
    """The expert kernels alone; what fails is said, and leaves the rest of the check alone."""
    rows = report.document["kernels"] = []
    try:
        from benchmarks.gpu_kernels import kernel_rows  # Triton

        for row in kernel_rows():
            rows.append(row)
            print(", ".join(f"{k} {_rounded(v)}" for k, v in row.items()), flush=True)
    except Exception as error:
        traceback.print_exc()
        report.document["kernels_ended"] = repr(error)
    torch.cuda.empty_cache()
    report.save()


def measure_memory(report: Report, most_bytes: float, device: str) -> None:
    """Loading and pinning experts of Mixtral's shape in bf16, of which a layer is 2.8 GB."""
    rows = report.document["memory"] = {}
    layout = mixtral_layout()
    try:
        rows["loading"] = loading_row(layout, min(LOADED_BYTES, most_bytes))
        rows["pinning"] = pinning_row(layout, most_bytes, device)
    except Exception as error:
        traceback.print_exc()
        rows["ended"] = repr(error)
    for name, row in rows.items():
        print(f"{name}: {row}", flush=True)
    gc.collect()
    report.save()


def _rounded(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value


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
        size = engine.store.n_layers, source.n_experts[0]
        tried = settings(shape, *size, arguments.memory_gb)
        tried = [setting for setting in tried if setting.name in arguments.settings]
        for number, setting in enumerate(tried):
            end_s = share_end_s
            if number < N_CORE_SETTINGS or len(tried) < len(SETTINGS):
                end_s = deadline_s
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
    if "models" not in arguments.parts:
        measured = []
    report = Report(arguments.json, measured, arguments.settings)
    report.document |= {
        "date": date.today().isoformat(),
        "command": sys.argv,
        "hardware": read_hardware(gpu_uuid=gpu_uuid(choose_device(arguments.device))).to_json(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "tests": None,
    }
    report.save()
    on_card = arguments.device == "cuda"
    tests = run_tests() if on_card and "tests" in arguments.parts else None
    report.document["tests"] = tests
    report.save()
    if on_card and "kernels" in arguments.parts:
        measure_kernels(report)
    if "memory" in arguments.parts:
        measure_memory(report, arguments.pin_gb * 1e9, arguments.device)
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
