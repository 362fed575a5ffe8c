"""What `gpu_check.py` starts and ends in time: every model, and every setting of each."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
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
    KEPT_S,
    LOST,
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
from benchmarks.gpu_one_setting import (
    PROMPT_LENGTHS,
    PROMPT_TOKENS,
    Row,
    cpu_logits,
    print_row,
    run_setting,
)
from benchmarks.gpu_tests import run_tests
from moe_offload.config import CacheOptions, ModelOptions
from moe_offload.engine.loading import choose_device, load_engine
from moe_offload.engine.setup import gpu_uuid
from moe_offload.errors import UserError
from moe_offload.machine.hardware import read_hardware
from moe_offload.model.dummy import DummyModel, dummy_routing

LOADING_SHARE = 1 / 3  # of a model's part of the time, for filling and pinning its memory
_SPARE_S = 20.0  # before all is ended; what the imports took is not seen here
LOADED_BYTES = 12e9  # at most, from a file that the page cache holds
# For the KV cache: a prompt and all its steps, or the longest prompt.
_CONTEXT_TOKENS = max(PROMPT_TOKENS + 224, *PROMPT_LENGTHS)
_PR_SET_PDEATHSIG = 1


class Report:
    """What was found so far, and what is still missing; on disk after every change.

    With `goes_on`, behind what another process has left in the file.
    """

    def __init__(
        self,
        path: Path | None,
        models: Sequence[tuple[str, Format]],
        chosen: Sequence[str] = SETTINGS,
        goes_on: bool = False,
    ) -> None:
        self.rows: list[Row] = []
        self.document: dict[str, Any] = {}
        if path is not None and goes_on:
            self.document = json.loads(path.read_text(encoding="utf-8"))
            self.rows = [Row(**row) for row in self.document["rows"]]
        self._path = path
        self._started_s = time.monotonic()
        self._missing: dict[tuple[str, str, str], str] = {
            (shape, weight_format, setting.name): ""
            for shape, weight_format in models
            for setting in settings(shape, 1, 1, 1.0)
            if setting.name in chosen
        }
        for row in self.rows:
            del self._missing[row.shape, row.weight_format, row.setting]
        for shape, weight_format, name, reason in self.document.get("given_up", []):
            self._missing[shape, weight_format, name] = f" ({reason})"

    def is_open(self, shape: str, weight_format: str, setting: str) -> bool:
        """Whether it is still to be measured."""
        return self._missing.get((shape, weight_format, setting)) == ""

    def begin(self, shape: str, weight_format: str, setting: str) -> None:
        """Say what is measured from now on, for whoever finds the report behind a process that
        died of it."""
        self.document["at"] = [shape, weight_format, setting]
        self.save()

    @property
    def skipped(self) -> list[str]:
        """The settings that were not measured, with the reason where one is known."""
        return [" ".join(name) + reason for name, reason in self._missing.items()]

    def add(self, row: Row) -> None:
        self.rows.append(row)
        del self._missing[row.shape, row.weight_format, row.setting]
        self.document.pop("at", None)
        self.save()

    def leave_out(self, shape: str, weight_format: str, reason: object, setting: str = "") -> None:
        """Give the reason why `setting`, or all of a model that is still missing, is left out."""
        for name, known in self._missing.items():
            if name[:2] == (shape, weight_format) and (name[2] == setting or not setting):
                self._missing[name] = known or f" ({reason})"
        if setting:
            given_up = self.document.setdefault("given_up", [])
            given_up.append([shape, weight_format, setting, str(reason)])
        self.save()

    def save(self, ended: str = RUNNING) -> None:
        self.document["ended"] = ended
        self.document["took_s"] = time.monotonic() - self._started_s
        self.document["rows"] = [asdict(row) for row in self.rows]
        self.document["skipped"] = self.skipped
        if self._path is not None:
            write_report(self._path, self.document)


def measure_kernels(report: Report, end_s: float) -> None:
    """The expert kernels alone, until `end_s`; what fails leaves the others alone."""
    rows = report.document["kernels"] = []
    try:
        from benchmarks.gpu_kernels import kernel_rows  # Triton

        for row in kernel_rows():
            rows.append(row)
            report.save()
            print(", ".join(f"{k} {_rounded(v)}" for k, v in row.items()), flush=True)
            if time.monotonic() > end_s:
                raise TimeoutError("out of time")
    except Exception as error:
        traceback.print_exc()
        report.document["kernels_ended"] = repr(error)


def measure_memory(report: Report, most_bytes: float, device: str) -> None:
    """Loading and pinning experts of Mixtral's shape in bf16, of which a layer is 2.8 GB."""
    rows = report.document["memory"] = {}
    layout = mixtral_layout()
    for name, measured in (
        ("loading", lambda: loading_row(layout, min(LOADED_BYTES, most_bytes))),
        ("pinning", lambda: pinning_row(layout, most_bytes, device)),
    ):
        try:
            rows[name] = measured()
        except Exception as error:
            traceback.print_exc()
            rows[name] = {"ended": repr(error)}
        print(f"{name}: {rows[name]}", flush=True)
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
        reference = cpu_logits(engine, routing)
        size = engine.store.n_layers, source.n_experts[0]
        tried = settings(shape, *size, arguments.memory_gb)
        core = [setting.name for setting in tried[:N_CORE_SETTINGS]]
        if len(arguments.settings) < len(SETTINGS):
            core = list(arguments.settings)
        tried = [one for one in tried if report.is_open(shape, source.weight_format, one.name)]
        for number, setting in enumerate(tried):
            end_s = deadline_s if setting.name in core else share_end_s
            left_s = deadline_s - time.monotonic()
            if time.monotonic() > end_s:
                report.leave_out(shape, source.weight_format, "out of time")
                return
            budget_s = left_s / (n_left * len(tried) - number) / 2  # half for all but decoding
            report.begin(shape, source.weight_format, setting.name)
            try:
                row = run_setting(
                    engine, shape, setting, routing, reference, arguments.tokens, budget_s
                )
            except Exception as error:  # the other settings may tell why
                traceback.print_exc()
                report.leave_out(shape, source.weight_format, repr(error), setting.name)
                if not is_usable(engine.device):
                    os._exit(LOST)  # nothing of CUDA's can be taken down either
                continue
            report.add(row)
            print_row(row)


def is_usable(device: torch.device) -> bool:
    """Whether the device still computes: after some errors of a kernel a process's GPU does not."""
    try:
        torch.zeros(1, device=device).add_(1).item()
    except RuntimeError:
        return False
    return True


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
    on_card = arguments.device == "cuda"
    report = Report(arguments.json, measured, arguments.settings, arguments.go_on)
    report.document = {
        "date": date.today().isoformat(),
        "command": sys.argv,
        "hardware": read_hardware(gpu_uuid=gpu_uuid(choose_device(arguments.device))).to_json(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "tests": None,
        **report.document,
    }
    report.save()
    if on_card and "tests" in arguments.parts and not arguments.go_on:
        report.document["tests"] = run_tests()
        report.save()
    s_per_byte = load_s_per_byte(arguments.device)
    report.document["card"] = card_speeds(arguments.device)
    print(", ".join(f"{k} {v:.0f}" for k, v in report.document["card"].items()), flush=True)
    after = [part for part in KEPT_S if part in arguments.parts]
    deadline_s -= sum(KEPT_S[part] for part in after)
    for number, (shape, weight_format) in enumerate(measured):
        left_s = deadline_s - time.monotonic()
        if left_s < 0:
            report.leave_out(shape, weight_format, "out of time")
            continue
        if not any(report.is_open(shape, weight_format, name) for name in SETTINGS):
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
    end_s = started_s + arguments.limit_s - _SPARE_S
    if "memory" in after:
        left_s = end_s - time.monotonic() - (KEPT_S["kernels"] if "kernels" in after else 0)
        most_bytes = min(arguments.pin_gb * 1e9, max(0.0, left_s) / 3 / s_per_byte)
        measure_memory(report, most_bytes, arguments.device)
    if on_card and "kernels" in after:
        measure_kernels(report, end_s)
    report.save(COMPLETE)
    if report.skipped:
        print("not measured: " + "; ".join(report.skipped))
    print(f"took {time.monotonic() - started_s:.0f} s")
    right = not report.skipped and all(row.correct for row in report.rows)
    tests = report.document["tests"]
    return 0 if right and (tests is None or tests["exit_code"] == 0) else 1


def _end_with_parent() -> None:
    """Nobody is left to end this process in time, or to read it, when `gpu_check.py` is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    _end_with_parent()
    sys.exit(main())
