"""A run's configuration: frozen, built once, and checked by itself, whoever builds it.

`main.py` builds a `Config` from its command line, a Python program parts of it; everything below is
handed the part it needs. Messages name a setting by its flag.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral
from pathlib import Path
from types import UnionType
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints

from moe_offload.errors import UserError

WeightFormat = Literal["fp32", "bf16", "int8", "int4"]


@dataclass(frozen=True)
class FormatFacts:
    """How a weight format stores a matrix: `bits` per weight in elements of torch's `dtype`.

    With a `group`, so many inputs of a row share one scale of `scale_bits`, which are packed tiles
    (`checkpoint/quantization.py`); without, the matrix is row-major.
    """

    dtype: str
    bits: int
    group: int = 0
    scale_bits: int = 16

    @property
    def bits_per_weight(self) -> float:
        """Scales included, padding not."""
        return self.bits + (self.scale_bits / self.group if self.group else 0)


# The one table of weight formats, in the order of WeightFormat in kernels/cpp/kernels.h. A format
# is a row here, its bytes in checkpoint/block.py and its kernels.
WEIGHT_FORMATS: Final[Mapping[str, FormatFacts]] = {
    "fp32": FormatFacts("float32", 32),
    "bf16": FormatFacts("bfloat16", 16),
    "int8": FormatFacts("uint8", 8, group=32),
    "int4": FormatFacts("uint8", 4, group=32),
}
# What one would choose for speed; fp32 is there to be compared with.
FAST_FORMATS: Final = tuple(name for name, facts in WEIGHT_FORMATS.items() if facts.bits < 32)
# Packed tiles: lossy, and as dense weights served by the CPU alone.
PACKED_FORMATS: Final = tuple(name for name, facts in WEIGHT_FORMATS.items() if facts.group)


def smaller_format(name: str) -> str | None:
    """The format next below in size; None for the smallest."""
    sizes = {other: facts.bits_per_weight for other, facts in WEIGHT_FORMATS.items()}
    smaller = [other for other, size in sizes.items() if size < sizes[name]]
    return max(smaller, key=sizes.__getitem__, default=None)


POLICIES: Final = ("FIFO", "LRU", "RANDOM", "LFU", "LFRU")

Device = Literal["auto", "cuda", "cpu"]
MissPolicy = Literal["cpu", "fetch", "auto"]
Prefetch = Literal["off", "next-layer"]
CpuKernel = Literal["auto", "native", "torch"]

# Flags that are called otherwise than their field.
_FLAGS: Final = {
    "n_indexes": "--cache-nblocks",
    "n_ways": "--cache-nways",
    "quota": "--cache-quota",
    "policy": "--cache-replace-policy",
    "auto": "--cache-auto",
    "memory_gb": "--cache-memory-gb",
    "dummy_shape": "--dummy-weights",
    "path": "--prompt-path",
    "raw": "--raw-prompt",
    "hide_responses": "--hide-resp",
    "record": "--no-record",
}
_KINDS: Final[dict[Any, str]] = {
    bool: "True or False",
    int: "a whole number",
    float: "a finite number",
    str: "text",
    Path: "a pathlib.Path",
    type(None): "None",
}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _check_kinds(options: object) -> None:
    """UserError for a field whose value is not of its annotated kind: Python programs can err."""
    hints = get_type_hints(type(options))
    for field in fields(options):  # type: ignore[arg-type]
        value, hint = getattr(options, field.name), hints[field.name]
        flag = _FLAGS.get(field.name, f"--{field.name.replace('_', '-')}")
        _require(_fits(value, hint), f"expected {flag} as {_kind(hint)}, found {value!r}")


def _fits(value: object, hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return isinstance(value, str) and value in parts
    if origin is UnionType:
        return any(_fits(value, part) for part in parts)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, parts[0]) for item in value)
    if isinstance(value, bool):
        return hint is bool
    if hint is int:
        return isinstance(value, Integral)
    if hint is float:
        return isinstance(value, (int, float)) and abs(value) < math.inf
    return isinstance(value, hint)


def _kind(hint: Any) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(parts)}"
    if origin is UnionType:
        return " or ".join(_kind(part) for part in parts)
    return "a tuple of whole numbers" if origin is tuple else _KINDS[hint]


def _require_seed(seed: int) -> None:
    """What torch's generators take."""
    _require(-(2**63) <= seed < 2**64, f"expected --seed from -2^63 to 2^64 - 1, found {seed}")


@dataclass(frozen=True)
class ModelOptions:
    """Which model runs where.

    `model_path` is a prepared folder, or None with `dummy_shape`, which names a shape of random
    weights; `dummy_layers` overrides that shape's layer count.
    """

    model_path: Path | None
    device: Device = "auto"
    attention: Literal["sdpa", "xformers"] = "sdpa"
    cpu_kernel: CpuKernel = "auto"
    cpu_isa: str = "auto"
    cpu_affinity: tuple[int, ...] | None = None
    verify: bool = False
    dummy_shape: str | None = None
    dummy_layers: int | None = None
    dummy_format: Literal["bf16", "int8", "int4"] = "bf16"
    routing_trace: Path | None = None

    def __post_init__(self) -> None:
        _check_kinds(self)
        _require(
            (self.model_path is None) != (self.dummy_shape is None),
            "expected exactly one of --model-path and --dummy-weights",
        )
        _require(
            self.dummy_layers is None or self.dummy_layers >= 1,
            f"expected --dummy-layers of at least 1, found {self.dummy_layers}",
        )


@dataclass(frozen=True)
class CacheOptions:
    """The N x M expert cache and what happens on a miss (N = `n_indexes`, M = `n_ways`)."""

    n_indexes: int = 0
    n_ways: int = 0
    quota: int = 64
    policy: str = "FIFO"
    auto: bool = False
    miss_policy: MissPolicy = "cpu"
    prefetch: Prefetch = "off"
    emulate_pcie_gbps: float | None = None
    trace: Path | None = None
    memory_gb: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _check_kinds(self)
        for flag, value in (
            ("--cache-nblocks", self.n_indexes),
            ("--cache-nways", self.n_ways),
            ("--cache-quota", self.quota),
        ):
            _require(value >= 0, f"expected {flag} of 0 or more, found {value}")
        _require(
            (self.n_indexes == 0) == (self.n_ways == 0),
            "expected --cache-nblocks and --cache-nways both positive or both 0, "
            f"found {self.n_indexes} and {self.n_ways}",
        )
        _require(
            not (self.auto and self.n_indexes),
            "expected --cache-auto or --cache-nblocks with --cache-nways, found both",
        )
        _require(
            self.policy.upper() in POLICIES,
            f"expected --cache-replace-policy as one of {', '.join(POLICIES)}, "
            f"found {self.policy!r}",
        )
        _require_seed(self.seed)
        _require(
            self.memory_gb is None or self.memory_gb > 0,
            f"expected --cache-memory-gb above 0, found {self.memory_gb}",
        )
        _require(
            self.memory_gb is None or self.auto,
            "expected --cache-auto with --cache-memory-gb, found none: without it --cache-nblocks "
            "and --cache-nways give the cache's size",
        )
        for flag, asked in (
            ("--prefetch next-layer", self.prefetch != "off"),
            ("--miss-policy auto", self.miss_policy == "auto"),
        ):
            _require(
                not asked or self.auto or self.n_slots > 0,
                f"expected a cache for {flag}: add --cache-nblocks and --cache-nways, "
                "or --cache-auto",
            )
        _require(
            self.emulate_pcie_gbps is None or self.wants_accelerator,
            "expected a cache or --miss-policy fetch for --emulate-pcie-gbps, found neither",
        )
        _require(
            self.emulate_pcie_gbps is None or self.emulate_pcie_gbps > 0,
            f"expected --emulate-pcie-gbps above 0, found {self.emulate_pcie_gbps}",
        )

    @property
    def n_slots(self) -> int:
        return self.n_indexes * self.n_ways

    @property
    def wants_accelerator(self) -> bool:
        """Whether anything but the CPU computes experts."""
        return self.n_slots > 0 or self.auto or self.miss_policy == "fetch"


@dataclass(frozen=True)
class GenerationOptions:
    """How text is generated: `max_tokens` per prompt; temperature 0 is greedy."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 1

    def __post_init__(self) -> None:
        _check_kinds(self)
        _require(
            self.max_tokens >= 1, f"expected --max-tokens of at least 1, found {self.max_tokens}"
        )
        _require(
            self.temperature >= 0, f"expected --temperature of 0 or more, found {self.temperature}"
        )
        _require(0 < self.top_p <= 1, f"expected --top-p in (0, 1], found {self.top_p}")
        _require(
            self.top_p == 1 or self.temperature > 0,
            "expected --temperature above 0 for --top-p: greedy decoding has nothing to sample",
        )
        _require_seed(self.seed)
        _require(
            self.batch_size >= 1, f"expected --batch-size of at least 1, found {self.batch_size}"
        )


@dataclass(frozen=True)
class PromptOptions:
    """Where prompts come from: `prompt` or lines of `path`, exactly one of them."""

    prompt: str | None = None
    path: Path | None = None
    n_prompts: int | None = None
    raw: bool = False

    def __post_init__(self) -> None:
        _check_kinds(self)
        _require(
            (self.prompt is None) != (self.path is None),
            "expected exactly one of --prompt and --prompt-path, found "
            + ("neither" if self.prompt is None else "both"),
        )
        _require(
            self.n_prompts is None or self.n_prompts >= 1,
            f"expected --n-prompts of at least 1, found {self.n_prompts}",
        )


@dataclass(frozen=True)
class OutputOptions:
    """What a run leaves behind."""

    breakdown_csv: Path = Path("out.csv")
    cachehit_csv: Path = Path("cache.csv")
    output_dir: Path | None = None
    responses_jsonl: Path | None = None
    hide_responses: bool = False
    record: bool = True
    nvtx: bool = False

    def __post_init__(self) -> None:
        _check_kinds(self)
        for flag, asked in (
            ("--output-dir", self.output_dir is not None),
            ("--breakdown-csv", self.breakdown_csv != OutputOptions.breakdown_csv),
            ("--cachehit-csv", self.cachehit_csv != OutputOptions.cachehit_csv),
        ):
            _require(
                self.record or not asked,
                f"expected --no-record or {flag}, found both: without a record there is no file to "
                "put there",
            )


@dataclass(frozen=True)
class Config:
    """Everything one run of `main.py` was asked for."""

    model: ModelOptions
    cache: CacheOptions
    generation: GenerationOptions
    prompts: PromptOptions
    output: OutputOptions
