"""One command for a CUDA machine that needs no download: is it right there, and how fast.

    PYTHONPATH=src python3 benchmarks/gpu_check.py [--json FILE]

Runs the CUDA-marked tests, then builds models of Mixtral's, Phi-3.5-MoE's and Qwen3-30B's shapes
with random weights in memory and measures decoding with each way to serve a miss. Caches are sized
for a 24 GB card unless `--memory-gb` says otherwise; fewer layers are built where host memory is
short. No setting starts after `--minutes`, and each takes its share of the time that is left.

Routing is synthetic with Mixtral's reuse of experts (or `--trace`), the same for every setting.
Prefetching guesses with the model's own routers, which know nothing of such routing: it is measured
with the model's own routing instead, beside the same cache without prefetching ("model routing";
on random weights the recall says little about a trained model's).

Correct means two things. Layers of decode steps agree with the plain torch oracle on the CPU, given
the same input and routing. And, where routing is fixed, the logits of a prompt and some steps are
those of the CPU computing every expert. (With the model's routing a near tie may fall either way.)

"% of bound" is the least time that this machine's measured speeds allow for the routing, as a share
of the time taken: experts that were in the cache cost the GPU's time; all others, waited for or
fetched ahead included, are shared by CPU and bus in the best way, everything overlapped.

Without a GPU, `--device cpu --shapes mixtral-8x7b --layers 2` tries the script itself.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from accelerator_setup import gpu_uuid
from config import CacheOptions, ModelOptions
from dummy_model import DummyModel, dummy_routing, shape_names
from engine import Engine, choose_device, load_engine
from errors import UserError
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

ROOT = Path(__file__).parent.parent
SHAPES = ("mixtral-8x7b", "phi-3.5-moe", "qwen3-30b-a3b")
# Layers in memory: enough for the paper's caches, few enough for 128 GB and eight minutes.
LAYERS = {"mixtral-8x7b": 16, "phi-3.5-moe": 16, "qwen3-30b-a3b": 24}
# The paper's cache on 24 GB: 14 x 4 for Mixtral, 16 x 8 for Phi; a quarter of the experts of Qwen3.
PAPER_CACHE = {"mixtral-8x7b": (14, 4), "phi-3.5-moe": (16, 8), "qwen3-30b-a3b": (24, 32)}
HOST_MEMORY_SHARE = 0.8
PROMPT_TOKENS = 32
WARM_UP_STEPS = 8
LEAST_STEPS = 4
CHECKED_STEPS = 4
TEST_TIMEOUT_S = 150
LOGIT_TOLERANCE = 0.05  # relative norm; bf16 and quantised activations round differently per side
LAYER_TOLERANCE = {"bf16": 0.02, "int8": 0.03, "int4": 0.05}  # of one layer's output

Format = Literal["bf16", "int8", "int4"]


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
        cpu_us = costs.cpu.expert_us + costs.cpu.token_us
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


def open_source(shape: str, weight_format: Format, layers: int | None) -> DummyModel:
    """A model of `layers`, or of as many as fit the host's memory; UserError when none does."""

    def source(n_layers: int | None) -> DummyModel:
        return DummyModel(
            ModelOptions(None, dummy_shape=shape, dummy_layers=n_layers, dummy_format=weight_format)
        )

    one = source(1)
    layer_bytes = one.layouts[0].block_bytes * one.n_experts[0]
    room = int(HOST_MEMORY_SHARE * available_bytes() / layer_bytes)
    if room < 1:
        raise UserError(f"one layer of {shape} needs {layer_bytes / 1e9:.1f} GB of host memory")
    return source(min(layers or LAYERS.get(shape, room), room))


def run_shape(
    source: DummyModel, shape: str, arguments: argparse.Namespace, deadline_s: float, n_left: int
) -> tuple[list[Row], list[str]]:
    """Every setting of one shape, each with an equal part of the time to `deadline_s`."""
    rows: list[Row] = []
    skipped: list[str] = []
    reference = None
    started_s = time.monotonic()
    options = ModelOptions(None, device=arguments.device, dummy_shape=shape)
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
                skipped.append(f"{shape} {source.weight_format} {setting.name}")
                continue
            budget_s = left_s / (n_left * len(tried) - number) / 2  # half for all but decoding
            row, reference = run_setting(
                engine, shape, setting, routing, reference, arguments.tokens, budget_s
            )
            rows.append(row)
            print_row(row)
    return rows, skipped


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shapes", nargs="+", choices=shape_names(), default=list(SHAPES))
    parser.add_argument("--formats", nargs="+", choices=get_args(Format), default=["bf16"])
    parser.add_argument("--layers", type=int, help="fewer layers, for less memory")
    parser.add_argument("--tokens", type=int, default=24, help="decode steps measured per setting")
    parser.add_argument("--memory-gb", type=float, default=20.0, help="for --cache-auto (20)")
    parser.add_argument("--trace", type=Path, help="routing trace instead of synthetic routing")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--minutes", type=float, default=7.0, help="start no setting after this")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything; 0 when tests passed and every setting is right, 1 when not, 2 without GPU."""
    arguments = parse(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no CUDA GPU; --device cpu tries the script", file=sys.stderr)
        return 2
    started_s = time.monotonic()
    deadline_s = started_s + 60 * arguments.minutes
    tests = None if arguments.skip_tests or arguments.device == "cpu" else run_tests()
    rows: list[Row] = []
    skipped: list[str] = []
    models = [(shape, fmt) for shape in arguments.shapes for fmt in arguments.formats]
    for number, (shape, weight_format) in enumerate(models):
        if time.monotonic() > deadline_s:
            skipped.append(f"{shape} {weight_format}")
            continue
        try:
            source = open_source(shape, weight_format, arguments.layers)
            found = run_shape(source, shape, arguments, deadline_s, len(models) - number)
        except UserError as error:
            print(f"{shape} {weight_format} is left out: {error}", flush=True)
            skipped.append(f"{shape} {weight_format} ({error})")
            continue
        rows += found[0]
        skipped += found[1]
        del source
        gc.collect()
    if skipped:
        print("not measured: " + "; ".join(skipped))
    print(f"took {time.monotonic() - started_s:.0f} s")
    if arguments.json is not None:
        document = {
            "date": date.today().isoformat(),
            "command": sys.argv,
            "hardware": read_hardware(gpu_uuid=gpu_uuid(choose_device(arguments.device))).to_json(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "took_s": time.monotonic() - started_s,
            "tests": tests,
            "rows": [asdict(row) for row in rows],
            "skipped": skipped,
        }
        arguments.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    right = bool(rows) and all(row.correct for row in rows)
    return 0 if right and (tests is None or tests["exit_code"] == 0) else 1


if __name__ == "__main__":
    sys.exit(main())
