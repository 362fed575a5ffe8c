"""What `gpu_check.py` measures; that script starts this one, ends it in time and says what it is.

The models, the ways to serve a miss, the checks of each, and the report, rewritten row by row.
"""

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accelerator_setup import gpu_uuid
from benchmarks.gpu_check import COMPLETE, ROOT, RUNNING, Format, parse, write_report
from config import CacheOptions, ModelOptions
from dummy_model import DummyModel, dummy_routing
from engine import Engine, choose_device, load_engine
from errors import UserError
from expert_format import block_layout
from expert_store import ExpertStore
from forced_routing import ForcedRouting
from generation import generate_batch, make_sampler
from hardware import read_hardware
from host_memory import available_bytes
from machine_costs import predicted_step_us
from miss_trial import TRIAL_STEPS
from recorder import NullRecorder, Recorder
from summary import summarize
from time_model import bound_us
from torch_experts import experts_forward

# Layers in memory: enough for the paper's caches, few enough for 128 GB and eight minutes.
LAYERS = {"mixtral-8x7b": 16, "phi-3.5-moe": 16, "qwen3-30b-a3b": 24}
# The paper's cache on 24 GB: 14 x 4 for Mixtral, 16 x 8 for Phi; a quarter of the experts of Qwen3.
PAPER_CACHE = {"mixtral-8x7b": (14, 4), "phi-3.5-moe": (16, 8), "qwen3-30b-a3b": (24, 32)}
HOST_MEMORY_SHARE = 0.8
LOADING_SHARE = 1 / 3  # of a model's part of the time, for filling and pinning its memory
_TRIED_BLOCKS = 2
_PR_SET_PDEATHSIG = 1
PROMPT_TOKENS = 32
WARM_UP_STEPS = 8
LEAST_STEPS = 4
CHECKED_STEPS = 4
TEST_TIMEOUT_S = 150
LOGIT_TOLERANCE = 0.05  # relative norm; bf16 and quantised activations round differently per side
LAYER_TOLERANCE = {"bf16": 0.02, "int8": 0.03, "int4": 0.05}  # of one layer's output


@dataclass(frozen=True)
class Setting:
    """One way to serve a miss; `forced` routing is the trace's, else the model's own."""

    name: str
    cache: CacheOptions
    forced: bool = True

    @property
    def warm_up_steps(self) -> int:
        """Decode steps before what is measured: `auto` must have come to its verdict."""
        return TRIAL_STEPS + WARM_UP_STEPS if self.cache.miss_policy == "auto" else WARM_UP_STEPS


@dataclass(frozen=True)
class Row:
    """One setting of one shape; times and rates of decoding at batch 1, over `steps` steps."""

    shape: str
    layers: int
    weight_format: str
    setting: str
    routing: str
    cache: str
    steps: int
    tokens_per_s: float
    step_ms: float
    predicted_ms: float | None
    bound_ms: float
    percent_of_bound: float
    hit_percent: float
    fetched_gb: float
    prefetch_recall_percent: float | None
    prefetch_wasted_gb: float | None
    cpu_read_gbps: float | None
    prefill_tokens_per_s: float
    layer_error: float
    logit_error: float | None
    correct: bool
    notes: list[str]


def settings(shape: str, n_layers: int, n_experts: int, memory_gb: float) -> list[Setting]:
    """The ways to serve a miss; the first is the reference of the others' logits."""
    n, m = PAPER_CACHE.get(shape, (n_layers, max(1, n_experts // 2)))
    cached: dict[str, Any] = {"n_indexes": n, "n_ways": m, "policy": "LRU"}
    prefetching = CacheOptions(miss_policy="fetch", prefetch="next-layer", **cached)
    return [
        Setting("cpu only", CacheOptions()),
        Setting("fetch on demand", CacheOptions(miss_policy="fetch")),
        Setting("fetch on demand, cached", CacheOptions(miss_policy="fetch", **cached)),
        Setting("paper", CacheOptions(**cached)),
        Setting("paper, auto misses", CacheOptions(miss_policy="auto", **cached)),
        Setting("--cache-auto", CacheOptions(auto=True, miss_policy="auto", memory_gb=memory_gb)),
        Setting("fetch, cached", CacheOptions(miss_policy="fetch", **cached), forced=False),
        Setting("next-layer prefetch", prefetching, forced=False),
    ]


@dataclass(frozen=True)
class Sample:
    """What one layer was given and gave in one decode step, on the host."""

    layer: int
    hidden: Tensor
    index: Tensor
    weights: Tensor
    out: Tensor


@contextmanager
def watched(engine: Engine) -> Iterator[list[Sample]]:
    """Inside, the first and the last MoE layer of each decode step are kept."""
    dispatcher, samples = engine.dispatcher, []
    run, watched_layers = dispatcher.run, {0, engine.store.n_layers - 1}

    def watching(layer: int, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = run(layer, hidden, index, weights)
        if len(hidden) == 1 and layer in watched_layers:
            if dispatcher.forced_routing is not None:
                index, weights = dispatcher.forced_routing.choose(layer, index, weights)
            samples.append(Sample(layer, hidden.cpu(), index.cpu(), weights.cpu(), out.cpu()))
        return out

    dispatcher.run = watching  # type: ignore[method-assign]
    try:
        yield samples
    finally:
        del dispatcher.run  # type: ignore[method-assign]


def layer_error(engine: Engine, samples: Sequence[Sample]) -> float:
    """The largest relative error of the samples against the torch oracle."""
    errors = []
    for one in samples:
        layout, site = engine.store.layouts[one.layer], engine.sites[one.layer]
        blocks = {e: engine.store.block(one.layer, e) for e in one.index.unique().tolist()}
        expected = experts_forward(
            layout,
            blocks,
            one.hidden,
            one.index,
            one.weights.float(),
            site.activation,
            site.act_module,
        )
        errors.append(float((one.out.float() - expected).norm() / expected.norm()))
    return max(errors)


@torch.inference_mode()
def logits(engine: Engine, ids: list[int]) -> Tensor:
    """Logits [T, vocabulary] of a prompt pass and of some decode steps after it."""
    if engine.dispatcher.forced_routing is not None:
        engine.dispatcher.forced_routing.rewind()
    inputs = torch.tensor([ids], device=engine.device)
    output = engine.model(input_ids=inputs, use_cache=True)
    found = [output.logits[0]]
    for step in range(CHECKED_STEPS):
        output = engine.model(
            input_ids=inputs[:, step : step + 1], past_key_values=output.past_key_values
        )
        found.append(output.logits[0])
    return torch.cat(found).float().cpu()


@dataclass(frozen=True)
class Measured:
    """The record of the steps after the warm-up; `fetched_ahead` were hits by prefetching."""

    recorder: Recorder
    prefill_s: float
    fetched_ahead: int


def measure(
    engine: Engine, ids: list[int], warm_up: int, n_steps: int, budget_s: float, patient: bool
) -> Measured:
    """Generate; fewer steps where they do not fit `budget_s`, and with `patient` a full warm-up."""
    if engine.dispatcher.forced_routing is not None:
        engine.dispatcher.forced_routing.rewind()
    sampler = make_sampler(0.0, 1.0, 0, engine.device)
    recorder, prefill_s, steps, used = Recorder(), 0.0, 0, 0
    began_s = time.monotonic()
    measuring_since: int | None = None
    for record, _ in generate_batch(
        engine.model,
        [ids],
        max_tokens=1 + warm_up + n_steps,
        sampler=sampler,
        eos_ids=frozenset(),
    ):
        prefill_s, steps = record.prefill_s, len(record.ids) - 1
        elapsed_s = time.monotonic() - began_s
        if measuring_since is None:
            impatient = not patient and steps and elapsed_s > budget_s / 3
            if steps >= warm_up or impatient:
                measuring_since, used = steps, _used_of_prefetched(engine)
                engine.dispatcher.recorder = recorder
            continue
        recorder.token(0, record.token_times_s[-1], time.time())
        measured = steps - measuring_since
        if measured >= n_steps or (measured >= LEAST_STEPS and elapsed_s > budget_s):
            break
    engine.dispatcher.recorder = NullRecorder()
    return Measured(recorder, prefill_s, _used_of_prefetched(engine) - used)


def _used_of_prefetched(engine: Engine) -> int:
    return 0 if engine.accelerator is None else engine.accelerator.prefetch.used


def bound_step_us(engine: Engine, measured: Measured) -> float:
    """The least time of a decode step for the hits that this setting's cache had."""
    assert engine.costs is not None
    costs = engine.costs.model
    layers = measured.recorder.layer_table()
    n_steps = int(measured.recorder.pass_table()["decode"].sum())
    hits = (int(layers["hits"].sum()) - measured.fetched_ahead) / n_steps
    misses = int((layers["n_tokens"] * layers["top_k"]).sum()) / n_steps - hits
    n_layers = engine.store.n_layers
    if engine.accelerator is None:  # no bus to share the misses with
        cpu_us = costs.cpu.one_us(1)
        return n_layers * costs.dense_us_per_layer + misses * cpu_us
    return bound_us(costs, n_layers, hits, misses)


def run_setting(
    engine: Engine,
    shape: str,
    setting: Setting,
    routing: ForcedRouting,
    reference: Tensor | None,
    n_steps: int,
    budget_s: float,
) -> tuple[Row, Tensor]:
    """Measure one setting and check its layers and, with forced routing, its logits."""
    engine.notes.clear()
    engine.dispatcher.forced_routing = routing if setting.forced else None
    engine.use_cache(setting.cache)
    engine.calibrate()
    assert engine.costs is not None
    ids = [(7 * i + 3) % min(1000, engine.source.config.vocab_size) for i in range(PROMPT_TOKENS)]
    patient = setting.cache.miss_policy == "auto"
    measured = measure(engine, ids, setting.warm_up_steps, n_steps, budget_s, patient)
    with watched(engine) as samples:
        found = logits(engine, ids)
    error = layer_error(engine, samples)
    reference = found if reference is None else reference
    logit_error = None
    if setting.forced:
        logit_error = float((found - reference).norm() / reference.norm())
    recorder = measured.recorder
    summary = summarize(recorder)
    assert summary.step_ms is not None
    bound_ms = bound_step_us(engine, measured) / 1e3
    predicted_us = predicted_step_us(recorder, engine.costs.model)
    stats = None
    if engine.accelerator is not None and engine.accelerator.prefetch.chosen:
        stats = engine.accelerator.prefetch
    cache = engine.describe()
    return Row(
        shape=shape,
        layers=engine.store.n_layers,
        weight_format=engine.source.weight_format,
        setting=setting.name,
        routing="forced" if setting.forced else "model",
        cache=f"{cache['cache_nblocks']} x {cache['cache_nways']}",
        steps=int(recorder.pass_table()["decode"].sum()),
        tokens_per_s=1e3 / summary.step_ms,
        step_ms=summary.step_ms,
        predicted_ms=None if predicted_us is None else predicted_us / 1e3,
        bound_ms=bound_ms,
        percent_of_bound=100 * bound_ms / summary.step_ms,
        hit_percent=summary.decode_hits.per_expert_percent,
        fetched_gb=summary.fetched_bytes / 1e9,
        prefetch_recall_percent=None if stats is None else 100 * stats.recall,
        prefetch_wasted_gb=None if stats is None else stats.wasted_bytes / 1e9,
        cpu_read_gbps=summary.cpu_read_gbps,
        prefill_tokens_per_s=PROMPT_TOKENS / measured.prefill_s,
        layer_error=error,
        logit_error=logit_error,
        correct=bool(found.isfinite().all())
        and error <= LAYER_TOLERANCE[engine.source.weight_format]
        and (logit_error is None or logit_error <= LOGIT_TOLERANCE),
        notes=engine.run_notes(),
    ), reference


def run_tests() -> dict[str, object]:
    """The CUDA-marked tests' outcome."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "tests"]
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


def print_row(row: Row) -> None:
    logit_error = "     -" if row.logit_error is None else f"{row.logit_error:.4f}"
    recall = ""
    if row.prefetch_recall_percent is not None:
        recall = (
            f"  recall {row.prefetch_recall_percent:.1f}%, "
            f"{row.prefetch_wasted_gb:.2f} GB fetched ahead for nothing"
        )
    print(
        f"{row.shape:14} {row.weight_format:5} {row.setting:24} {row.routing:6} {row.cache:>8} "
        f"{row.tokens_per_s:8.2f} tok/s {row.step_ms:9.3f} ms x{row.steps:<3}"
        f" hits {row.hit_percent:5.1f}%  moved {row.fetched_gb:7.2f} GB "
        f"{row.percent_of_bound:4.0f}% of bound  errors: layer {row.layer_error:.4f} "
        f"logits {logit_error} {'ok' if row.correct else 'WRONG'}{recall}",
        flush=True,
    )
    for note in row.notes:
        if note.startswith(("--cache-auto", "miss policy")):
            print(f"{'':21}{note}", flush=True)


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


def load_s_per_byte(device: str) -> float:
    """Seconds per byte to fill memory for experts and, for a GPU, to pin it: tried on a little."""
    started_s = time.monotonic()
    layout = block_layout("bf16", 4096, 14336)
    store = ExpertStore([layout], [_TRIED_BLOCKS])
    source = torch.ones(layout.block_bytes, dtype=torch.uint8)
    for expert in range(_TRIED_BLOCKS):
        store.block(0, expert).copy_(source)
    if device == "cuda":
        store.pin()
    store.close()
    return (time.monotonic() - started_s) / store.total_bytes


def open_source(
    shape: str, weight_format: Format, layers: int | None, most_bytes: float = float("inf")
) -> DummyModel:
    """A model of `layers`, or of as many as fit the host's memory and `most_bytes`, at least one.

    UserError when the memory does not hold one layer.
    """

    def source(n_layers: int | None) -> DummyModel:
        return DummyModel(
            ModelOptions(None, dummy_shape=shape, dummy_layers=n_layers, dummy_format=weight_format)
        )

    one = source(1)
    layer_bytes = one.layouts[0].block_bytes * one.n_experts[0]
    room = int(HOST_MEMORY_SHARE * available_bytes() / layer_bytes)
    if room < 1:
        raise UserError(f"one layer of {shape} needs {layer_bytes / 1e9:.1f} GB of host memory")
    wanted = layers or LAYERS.get(shape, room)
    found = min(wanted, max(1, int(min(room, most_bytes / layer_bytes))))
    if found < wanted:
        print(f"{shape} {weight_format}: {found} layers, not {wanted}, fit memory and time")
    return source(found)


def run_shape(
    source: DummyModel,
    shape: str,
    arguments: argparse.Namespace,
    deadline_s: float,
    n_left: int,
    report: Report,
) -> None:
    """Every setting of one shape, each with an equal part of the time to `deadline_s`."""
    reference = None
    options = ModelOptions(None, device=arguments.device, dummy_shape=shape)
    started_s = time.monotonic()
    with load_engine(source, options, CacheOptions()) as engine:
        print(
            f"{source.name}, {engine.store.n_layers} layers of {source.n_experts[0]} experts, "
            f"{engine.store.total_bytes / 1e9:.1f} GB: loaded in "
            f"{time.monotonic() - started_s:.1f} s",
            flush=True,
        )
        for note in engine.notes:
            print(note, flush=True)
        routing = dummy_routing(source, arguments.trace)
        tried = settings(shape, engine.store.n_layers, source.n_experts[0], arguments.memory_gb)
        for number, setting in enumerate(tried):
            left_s = deadline_s - time.monotonic()
            if left_s < 0:
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
    models = [(shape, fmt) for shape in arguments.shapes for fmt in arguments.formats]
    report = Report(arguments.json, models)
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
    for number, (shape, weight_format) in enumerate(models):
        left_s = deadline_s - time.monotonic()
        if left_s < 0:
            report.leave_out(shape, weight_format, "out of time")
            continue
        n_left = len(models) - number
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
