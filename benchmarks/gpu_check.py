"""One command for a CUDA machine that needs no download: is it right there, and how fast.

    PYTHONPATH=src python3 benchmarks/gpu_check.py [--json FILE]

Runs the CUDA-marked tests, then builds models of Mixtral's, Phi-3.5-MoE's and Qwen3-30B's shapes
with random weights in memory and measures decoding with each way to serve a miss. Routing is
synthetic with Mixtral's reuse of experts (or `--trace`), the same for every setting, so each
setting's logits can be held against those of the CPU computing every expert. Caches are sized for
a 24 GB card unless `--memory-gb` says otherwise.

"% of bound" compares with the least time that this machine's measured speeds allow for the same
routing: every copy predicted, everything overlapped.

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
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from config import CacheOptions, ModelOptions
from dummy_model import DummyModel, dummy_routing
from engine import Engine, load_engine
from generation import generate_batch, make_sampler
from hardware import read_hardware
from machine_costs import predicted_step_us
from recorder import NullRecorder, Recorder
from summary import summarize
from time_model import bound_us

ROOT = Path(__file__).parent.parent
# Layers in memory: enough for the paper's caches, few enough for 128 GB and eight minutes.
LAYERS = {"mixtral-8x7b": 16, "phi-3.5-moe": 16, "qwen3-30b-a3b": 24}
# The paper's cache on 24 GB: 14 x 4 for Mixtral, 16 x 8 for Phi; a quarter of the experts of Qwen3.
PAPER_CACHE = {"mixtral-8x7b": (14, 4), "phi-3.5-moe": (16, 8), "qwen3-30b-a3b": (24, 32)}
PROMPT_TOKENS = 32
WARM_UP_TOKENS = 8
LOGIT_TOLERANCE = 0.05  # relative norm; bf16 and quantised activations round differently per side

Format = Literal["bf16", "int8", "int4"]


@dataclass(frozen=True)
class Row:
    """One setting of one shape; times and rates of decoding at batch 1."""

    shape: str
    layers: int
    weight_format: str
    setting: str
    cache: str
    tokens_per_s: float
    step_ms: float
    predicted_ms: float | None
    percent_of_bound: float | None
    hit_percent: float
    fetched_gb: float
    cpu_read_gbps: float | None
    prefill_tokens_per_s: float
    logit_error: float
    correct: bool
    notes: list[str]


def settings(shape: str, memory_gb: float) -> dict[str, CacheOptions]:
    """The ways to serve a miss, by name; "cpu only" is the reference of the others' logits."""
    n, m = PAPER_CACHE[shape]
    cached = {"n_indexes": n, "n_ways": m, "policy": "LRU"}
    return {
        "cpu only": CacheOptions(),
        "fetch on demand": CacheOptions(miss_policy="fetch"),
        "fetch on demand, cached": CacheOptions(miss_policy="fetch", **cached),
        "next-layer prefetch": CacheOptions(miss_policy="fetch", prefetch="next-layer", **cached),
        "paper": CacheOptions(**cached),
        "paper, auto": CacheOptions(miss_policy="auto", **cached),
        "--cache-auto": CacheOptions(auto=True, miss_policy="auto", memory_gb=memory_gb),
    }


@torch.inference_mode()
def logits(engine: Engine, ids: list[int]) -> Tensor:
    """Logits [T, vocabulary] of a prompt pass and of one decode step after it."""
    routing = engine.dispatcher.forced_routing
    assert routing is not None
    routing.rewind()
    inputs = torch.tensor([ids], device=engine.device)
    output = engine.model(input_ids=inputs, use_cache=True)
    step = engine.model(input_ids=inputs[:, :1], past_key_values=output.past_key_values)
    return torch.cat([output.logits[0], step.logits[0]]).float().cpu()


def measure(engine: Engine, ids: list[int], n_tokens: int) -> tuple[Recorder, float]:
    """Generate; returns the record of the tokens after the warm-up, and the prefill's seconds."""
    routing = engine.dispatcher.forced_routing
    assert routing is not None
    routing.rewind()
    sampler = make_sampler(0.0, 1.0, 0, engine.device)
    recorder = Recorder()
    prefill_s = 0.0
    for record, _ in generate_batch(
        engine.model,
        [ids],
        max_tokens=WARM_UP_TOKENS + n_tokens,
        sampler=sampler,
        eos_ids=frozenset(),
    ):
        prefill_s = record.prefill_s
        if len(record.ids) == WARM_UP_TOKENS:
            engine.dispatcher.recorder = recorder
        if len(record.ids) > WARM_UP_TOKENS:
            recorder.token(0, record.token_times_s[-1], time.time())
    engine.dispatcher.recorder = NullRecorder()
    return recorder, prefill_s


def run_setting(
    engine: Engine, shape: str, name: str, options: CacheOptions, reference: Tensor | None, n: int
) -> tuple[Row, Tensor]:
    """Measure one setting and hold its logits to `reference`."""
    engine.notes.clear()
    engine.use_cache(options)
    engine.calibrate()
    assert engine.costs is not None
    ids = [(7 * i + 3) % 1000 for i in range(PROMPT_TOKENS)]
    recorder, prefill_s = measure(engine, ids, n)
    found = logits(engine, ids)
    reference = found if reference is None else reference
    error = float((found - reference).norm() / reference.norm())
    summary = summarize(recorder)
    layers = recorder.layer_table()
    n_steps = int(recorder.pass_table()["decode"].sum())
    block_bytes = engine.store.layouts[0].block_bytes
    bound = None
    if engine.accelerator is not None:
        hits = float(layers["gpu_bytes"].sum()) / block_bytes / n_steps
        misses = float(layers["cpu_bytes"].sum()) / block_bytes / n_steps
        bound = bound_us(engine.costs.model, engine.store.n_layers, hits, misses)
    assert summary.step_ms is not None
    predicted_us = predicted_step_us(recorder, engine.costs.model)
    cache = engine.describe()
    return Row(
        shape=shape,
        layers=engine.store.n_layers,
        weight_format=engine.source.weight_format,
        setting=name,
        cache=f"{cache['cache_nblocks']} x {cache['cache_nways']}",
        tokens_per_s=1e3 / summary.step_ms,
        step_ms=summary.step_ms,
        predicted_ms=None if predicted_us is None else predicted_us / 1e3,
        percent_of_bound=None if bound is None else 100 * bound / (summary.step_ms * 1e3),
        hit_percent=summary.decode_hits.per_expert_percent,
        fetched_gb=summary.fetched_bytes / 1e9,
        cpu_read_gbps=summary.cpu_read_gbps,
        prefill_tokens_per_s=PROMPT_TOKENS / prefill_s,
        logit_error=error,
        correct=error <= LOGIT_TOLERANCE and bool(found.isfinite().all()),
        notes=engine.run_notes(),
    ), reference


def run_tests() -> dict[str, object]:
    """The CUDA-marked tests' outcome."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "tests"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    print("\n".join(lines[-15:]), flush=True)
    return {"exit_code": done.returncode, "last_line": lines[-1] if lines else done.stderr[-300:]}


def print_row(row: Row) -> None:
    bound = "" if row.percent_of_bound is None else f"{row.percent_of_bound:.0f}% of bound"
    print(
        f"{row.shape:14} {row.weight_format:5} {row.setting:24} {row.cache:>8} "
        f"{row.tokens_per_s:7.2f} tok/s  {row.step_ms:8.2f} ms"
        f"  hits {row.hit_percent:5.1f}%  fetched {row.fetched_gb:7.2f} GB  {bound:14} "
        f"logit error {row.logit_error:.4f} {'ok' if row.correct else 'WRONG'}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shapes", nargs="+", choices=tuple(LAYERS), default=list(LAYERS))
    parser.add_argument("--formats", nargs="+", choices=get_args(Format), default=["bf16"])
    parser.add_argument("--layers", type=int, help="fewer layers, for less memory")
    parser.add_argument("--tokens", type=int, default=24, help="decode steps measured per setting")
    parser.add_argument("--memory-gb", type=float, default=20.0, help="for --cache-auto (20)")
    parser.add_argument("--trace", type=Path, help="routing trace instead of synthetic routing")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--minutes", type=float, default=8.0, help="start no setting after this")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no CUDA GPU; --device cpu tries the script", file=sys.stderr)
        return 2
    deadline_s = time.monotonic() + 60 * arguments.minutes
    tests = None if arguments.skip_tests or arguments.device == "cpu" else run_tests()
    rows: list[Row] = []
    skipped: list[str] = []
    for shape in arguments.shapes:
        for weight_format in arguments.formats:
            source = DummyModel(
                ModelOptions(
                    model_path=None,
                    dummy_shape=shape,
                    dummy_layers=arguments.layers or LAYERS[shape],
                    dummy_format=weight_format,
                )
            )
            started_s = time.monotonic()
            options = ModelOptions(None, device=arguments.device, dummy_shape=shape)
            with load_engine(source, options, CacheOptions()) as engine:
                print(f"{source.name}: loaded in {time.monotonic() - started_s:.1f} s", flush=True)
                engine.dispatcher.forced_routing = dummy_routing(source, arguments.trace)
                reference = None
                for name, cache in settings(shape, arguments.memory_gb).items():
                    if time.monotonic() > deadline_s:
                        skipped.append(f"{shape} {weight_format} {name}")
                        continue
                    row, reference = run_setting(
                        engine, shape, name, cache, reference, arguments.tokens
                    )
                    rows.append(row)
                    print_row(row)
            del engine, source
            gc.collect()
    if skipped:
        print("out of time, not measured: " + "; ".join(skipped))
    if arguments.json is not None:
        document = {
            "date": date.today().isoformat(),
            "command": sys.argv,
            "hardware": read_hardware().to_json(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "tests": tests,
            "rows": [asdict(row) for row in rows],
            "skipped": skipped,
        }
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    failed = [row for row in rows if not row.correct]
    return 1 if failed or (tests is not None and tests["exit_code"] not in (0, 5)) else 0


if __name__ == "__main__":
    sys.exit(main())
