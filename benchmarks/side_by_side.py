"""Tokens per second of this tool and of its peers on the CPU, measured in turns.

    PYTHONPATH=src python3 -m benchmarks.side_by_side --work-dir DIR --peer PATH/TO/llama-bench ...

Writes random models of published shapes as GGUF files (`random_gguf.py`), prepares each with
weights_preprocessor.py, and measures the real engine and each peer's llama-bench (llama.cpp's or
ik_llama.cpp's, told apart by its flags) on the same weights. Rows: prompts of 64 and 512 tokens,
64 tokens decoded after 64 (`--prompts`, `--contexts`).

Everything is measured at two depths, and a layer's time is the difference over the layers between:
llama.cpp computes a prompt's last layer for its last token alone, so that of a model of two layers
it leaves out half. From both follow the model's speeds at its full depth, which are compared. A
round measures each program once, the next round in the opposite order; a ratio is of medians within
a round, since a shared machine changes between rounds, and the table has its median, lowest and
highest over the rounds. Beside our own the same threads read memory plainly (decode) or multiply
and add (prompts): "of limit" is what the model's weights need at least, at that speed, of the time.
Of a decode step's layers, what passes between the calls of our kernels is measured as well.

kt-kernel, where it can be imported, is compared expert for expert, in bf16, fp8 and mxfp4: it is no
whole engine.
`--isa avx2` holds torch and kt-kernel to AVX2 as well; llama-bench uses what it was compiled for.
Without a peer there are our own speeds alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, Final

import psutil
import torch
from gguf import GGMLQuantizationType as Type

from benchmarks.kt_kernel_peer import KINDS, ExpertsOfBoth
from benchmarks.llama_bench import DECODED, Peer, Work, find_peer, measure_peer
from benchmarks.our_engine import Measured, measure_ours
from benchmarks.random_gguf import expert_sizes, n_bytes, weights_per_token, write_random_gguf
from moe_offload.checkpoint.folders import MANIFEST_NAME
from moe_offload.config import WEIGHT_FORMATS, WeightFormat
from moe_offload.errors import UserError
from moe_offload.kernels.bindings import load_kernels
from moe_offload.machine.hardware import read_hardware
from moe_offload.simulation.shapes import shape_config

ROOT: Final = Path(__file__).resolve().parent.parent
# Name -> the published shape, and the two depths, in layers, that are measured.
MODELS: Final = {"mixtral": ("mixtral-8x7b", (1, 2)), "qwen3": ("qwen3-30b-a3b", (1, 4))}
# What weights are called here -> GGUF's type of the same numbers.
FORMATS: Final = {"bf16": Type.BF16, "int8": Type.Q8_0, "int4": Type.Q4_0}
SPARE_BYTES: Final = 1 << 30  # beside a model: activations, KV cache, torch
EXPERT_REPETITIONS: Final = 9  # a layer takes milliseconds


@dataclass(frozen=True)
class Spread:
    """The median, lowest and highest of the rounds."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Iterable[float]) -> Spread:
        each = list(values) or [math.nan]  # every round was disturbed
        return Spread(median(each), min(each), max(each))


@dataclass(frozen=True)
class Timed:
    """What a work took at two depths, s."""

    shallow_s: float
    deep_s: float

    def layer_s(self, depths: tuple[int, int]) -> float:
        return (self.deep_s - self.shallow_s) / (depths[1] - depths[0])

    def full_s(self, depths: tuple[int, int], n_layers: int) -> float:
        """At the model's `n_layers`."""
        return self.deep_s + (n_layers - depths[1]) * self.layer_s(depths)


@dataclass
class Row:
    """One model, format and work, by round; `peers` has an entry for each program compared with.

    `limit_s`: what the work takes at least at full depth, by the speed measured in that round;
    empty for experts alone, which `bench_cpu_experts.py` compares with it. `gap_us`: what passes
    outside our kernels in a layer of a decode step.
    """

    model: str
    weight_format: str
    work: Work
    depths: tuple[int, int]
    n_layers: int
    kernels: str = ""
    ours: list[Timed] = field(default_factory=list)
    limit_s: list[float] = field(default_factory=list)
    gap_us: list[float] = field(default_factory=list)
    peers: dict[str, list[Timed]] = field(default_factory=dict)

    def add_ours(self, measured: Measured, limit_s: float) -> None:
        self.kernels = measured.kernels
        self.ours.append(Timed(*(seconds[self.work] for seconds in measured.seconds)))
        self.limit_s.append(limit_s)
        if self.work in measured.gaps_us:
            self.gap_us.append(measured.gaps_us[self.work])

    @property
    def steady(self) -> list[int]:
        """The rounds that count: in the others a program took less for the deeper model, so that
        something else must have run."""
        rounds = zip(self.ours, *self.peers.values(), strict=True)
        return [n for n, each in enumerate(rounds) if all(t.deep_s > t.shallow_s for t in each)]

    def full_s(self, timed: Sequence[Timed]) -> list[float]:
        return [timed[n].full_s(self.depths, self.n_layers) for n in self.steady]

    def speed(self, timed: Sequence[Timed]) -> Spread:
        """Tokens/s at full depth."""
        return Spread.of(self.work.tokens / seconds for seconds in self.full_s(timed))

    def layer_ms(self, timed: Sequence[Timed]) -> Spread:
        """One layer, all tokens of a prompt or one decoded token."""
        calls = DECODED if self.work.kind == "decode" else 1
        return Spread.of(1e3 * timed[n].layer_s(self.depths) / calls for n in self.steady)

    def ratios(self) -> dict[str, Spread]:
        """How many times as fast as each peer at full depth."""
        ours = self.full_s(self.ours)
        return {
            name: Spread.of(
                their / mine for mine, their in zip(ours, self.full_s(theirs), strict=True)
            )
            for name, theirs in self.peers.items()
        }

    def percent_of_limit(self) -> Spread | None:
        ours = self.full_s(self.ours)
        if not self.limit_s:
            return None
        limits = [self.limit_s[n] for n in self.steady]
        return Spread.of(100 * a / b for a, b in zip(limits, ours, strict=True))

    def line(self) -> str:
        text = (
            f"{self.model:8} {self.weight_format:5} {self.work!s:14}"
            f" {self.speed(self.ours).median:8.2f} tok/s, {self.layer_ms(self.ours).median:7.2f} ms"
            " a layer"
        )
        limit = self.percent_of_limit()
        if limit is not None:
            text += f", {limit.median:3.0f}% of limit"
        if self.gap_us:
            text += f", {median(self.gap_us):.0f} us of a layer between kernels"
        if len(self.steady) < len(self.ours):
            text += f", {len(self.ours) - len(self.steady)} disturbed rounds left out"
        for name, ratio in self.ratios().items():
            theirs = self.peers[name]
            text += (
                f" | {name} {self.speed(theirs).median:8.2f}, "
                f"{self.layer_ms(theirs).median:7.2f} ms:"
                f" {ratio.median:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"
            )
        return text

    def to_json(self) -> dict[str, Any]:
        named = {"ours": self.ours, **self.peers}
        limit = self.percent_of_limit()
        return asdict(self) | {
            "work": str(self.work),
            "tokens_per_s": {name: asdict(self.speed(one)) for name, one in named.items()},
            "layer_ms": {name: asdict(self.layer_ms(one)) for name, one in named.items()},
            "ratio": {name: asdict(one) for name, one in self.ratios().items()},
            "percent_of_limit": limit and asdict(limit),
        }


def least_s(
    work: Work, config: dict[str, Any], weight_format: str, limits: dict[Work, float]
) -> float:
    """What the weights of a whole model need at least, by `Measured.limits`."""
    limit = limits[work]
    in_layers, in_head = weights_per_token(config)
    if work.kind == "prompt":  # only the last token has scores
        return 2 * (in_layers * work.tokens + in_head) / limit / 1e9
    n_bits = WEIGHT_FORMATS[weight_format].bits_per_weight * (in_layers + in_head)
    return work.tokens * n_bits / 8 / limit / 1e9


def require_room(memory_bytes: int, folder: Path, disk_bytes: int) -> None:
    """UserError unless a model of `memory_bytes` can be loaded, and `disk_bytes` be written."""
    needed, available = memory_bytes + SPARE_BYTES, psutil.virtual_memory().available
    free = shutil.disk_usage(folder).free
    if needed > available:
        found = f"{needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available"
        remedy = "another format"
    elif disk_bytes > free:
        found = f"{disk_bytes / 1e9:.1f} GB of disk in {folder}, {free / 1e9:.1f} GB are free"
        remedy = "another --work-dir"
    else:
        return
    raise UserError(f"it needs {found}: ask for fewer --depths or {remedy}")


def write_models(
    folder: Path, shape: str, depths: tuple[int, int], weight_format: str, is_compared: bool
) -> tuple[list[Path], Path]:
    """The GGUF files of both depths and the folder prepared from the deeper, all kept.

    The shallower one is for the peers alone: without any it is not written.
    """
    prepared = folder / f"{depths[1]}-prepared"
    files = [folder / f"{depth}.gguf" for depth in depths]
    sizes = {
        file: n_bytes(shape_config(shape, depth), weight_format)
        for file, depth in zip(files, depths, strict=True)
        if is_compared or depth == depths[1]
    }
    is_prepared = (prepared / MANIFEST_NAME).exists()
    to_write = {file: size for file, size in sizes.items() if not file.exists()}
    to_prepare = 0 if is_prepared else sizes[files[1]]
    require_room(sizes[files[1]], folder, sum(to_write.values()) + to_prepare)
    for file in to_write:
        partial = file.with_suffix(".partial")
        config = shape_config(shape, int(file.stem))
        write_random_gguf(partial, config, FORMATS[weight_format])
        partial.rename(file)
    if not is_prepared:
        command = [sys.executable, str(ROOT / "weights_preprocessor.py"), "--hf"]
        command += ["--input-path", str(files[1]), "--output-path", str(prepared)]
        done = subprocess.run([*command, "--dense-dtype", weight_format])
        if done.returncode != 0:
            raise UserError("its preparation failed, for the reason above")
    return files, prepared


def compare(
    model: str, weight_format: str, peers: Sequence[Peer], works: Sequence[Work], arguments: Any
) -> list[Row]:
    """The rows of one model in one format; UserError where it cannot be measured here."""
    shape, depths = MODELS[model]
    depths = tuple(arguments.depths or depths)
    config = shape_config(shape)
    folder = arguments.work_dir / f"{model}-{weight_format}"
    folder.mkdir(parents=True, exist_ok=True)
    files, prepared = write_models(folder, shape, depths, weight_format, bool(peers))
    if arguments.prepare_only:
        return []
    n_layers = config["num_hidden_layers"]
    rows = [Row(model, weight_format, work, depths, n_layers) for work in works]
    for number in range(arguments.rounds):
        for peer in [None, *peers] if number % 2 == 0 else [*reversed(peers), None]:
            if peer is None:
                ours = measure_ours(prepared, depths, works, arguments.isa, arguments.repetitions)
                for row in rows:
                    row.add_ours(ours, least_s(row.work, config, weight_format, ours.limits))
                continue
            shallow, deep = (
                measure_peer(peer, file, works, arguments.threads, arguments.repetitions)
                for file in files
            )
            for row in rows:
                timed = Timed(shallow[row.work], deep[row.work])
                row.peers.setdefault(peer.name, []).append(timed)
    return rows


def compare_experts(model: str, weight_format: WeightFormat, arguments: Any) -> list[Row]:
    """Our experts' rows beside kt-kernel's; UserError where they cannot be measured here."""
    config = shape_config(MODELS[model][0])
    n_experts, inner = expert_sizes(config)
    hidden, top_k = config["hidden_size"], config["num_experts_per_tok"]
    require_room(2 * 2 * 3 * n_experts * hidden * inner, arguments.work_dir, 0)
    sizes = n_experts, top_k, hidden, inner
    both = ExpertsOfBoth(weight_format, *sizes, arguments.isa, arguments.threads)
    rows = []
    for n_tokens in arguments.experts:
        work = Work("experts", n_tokens)
        row = Row(model, weight_format, work, (0, 1), 1, both.ours.description)
        theirs = row.peers["kt-kernel"] = []
        for _ in range(arguments.rounds):
            mine_s, their_s = both.seconds(n_tokens, EXPERT_REPETITIONS)
            row.ours.append(Timed(0.0, mine_s))
            theirs.append(Timed(0.0, their_s))
        rows.append(row)
    return rows


def write_json(path: Path, rows: Sequence[Row], skipped: Sequence[str]) -> None:
    document = {
        "date": date.today().isoformat(),
        "command": sys.argv,
        "hardware": read_hardware().to_json(),
        "torch": torch.__version__,
        "rows": [row.to_json() for row in rows],
        "skipped": list(skipped),
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work-dir", type=Path, required=True, help="where models are kept")
    parser.add_argument(
        "--peer", type=Path, action="append", default=[], metavar="PATH", help="a llama-bench"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    formats = list(dict.fromkeys([*FORMATS, *KINDS]))
    parser.add_argument("--formats", nargs="+", choices=formats, default=formats)
    parser.add_argument(
        "--depths", type=int, nargs=2, help="layers (1 and 2 of mixtral, 1 and 4 of qwen3)"
    )
    parser.add_argument("--isa", default="auto", help="our instruction set, such as avx2 (auto)")
    parser.add_argument("--prompts", type=int, nargs="*", default=[64, 512], metavar="TOKENS")
    parser.add_argument("--contexts", type=int, nargs="*", default=[64], metavar="TOKENS")
    parser.add_argument(
        "--experts",
        type=int,
        nargs="*",
        default=[1, 4, 16, 64],
        metavar="TOKENS",
        help="through one layer's experts, beside kt-kernel where it can be imported",
    )
    parser.add_argument("--rounds", type=int, default=3, help="of all in turns (3)")
    parser.add_argument("--repetitions", type=int, default=3, help="within a round (3)")
    parser.add_argument("--prepare-only", action="store_true", help="write the models, stop")
    parser.add_argument("--json", type=Path, help="rewritten after each model and format")
    arguments = parser.parse_args()
    numbers = arguments.rounds, arguments.repetitions, *arguments.experts
    numbers += *arguments.prompts, *arguments.contexts
    if min(numbers) < 1 or len(numbers) == 2:
        parser.error("expected positive numbers, and tokens for one flag at least")
    if arguments.depths and not 0 < arguments.depths[0] < arguments.depths[1]:
        parser.error("expected --depths as two numbers of layers, the smaller first")
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    if arguments.isa == "avx2":  # read by torch, oneDNN and kt-kernel when they first compute
        os.environ |= {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
        os.environ["KT_KERNEL_CPU_VARIANT"] = "avx2"
    works = [Work("prompt", n_tokens) for n_tokens in arguments.prompts]
    works += [Work("decode", n_tokens) for n_tokens in arguments.contexts]
    has_kt = importlib.util.find_spec("kt_kernel") is not None and not arguments.prepare_only
    rows: list[Row] = []
    skipped: list[str] = []
    try:
        kernels = load_kernels("auto", arguments.isa)
        arguments.threads = kernels.threads if kernels is not None else torch.get_num_threads()
        peers = [find_peer(path) for path in arguments.peer]
    except UserError as error:
        parser.error(str(error))
    for model, weight_format in product(arguments.models, arguments.formats):
        comparisons = []
        if works and weight_format in FORMATS:
            comparisons.append(partial(compare, model, weight_format, peers, works, arguments))
        if has_kt and weight_format in KINDS and arguments.experts:
            comparisons.append(partial(compare_experts, model, weight_format, arguments))
        for measured in comparisons:
            try:
                added = measured()
            except UserError as error:
                added = []
                skipped.append(f"{model} in {weight_format} is left out: {error}")
                print(skipped[-1], file=sys.stderr, flush=True)
            for row in added:
                print(row.line(), flush=True)
            rows += added
            if arguments.json is not None:
                write_json(arguments.json, rows, skipped)
    return 2 if skipped and not rows else 0


if __name__ == "__main__":
    sys.exit(main())
