"""A run's configuration: frozen, built once from the command line, checked once.

`main.py` builds a `Config`; everything below it is handed the part it needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from errors import UserError

Device = Literal["auto", "cuda", "cpu"]
MissPolicy = Literal["cpu", "fetch", "auto"]
Prefetch = Literal["off", "next-layer"]
CpuKernel = Literal["auto", "native", "torch"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


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
            self.memory_gb is None or (self.auto and self.memory_gb > 0),
            "expected --cache-memory-gb above 0 and together with --cache-auto",
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


@dataclass(frozen=True)
class Config:
    """Everything one run of `main.py` was asked for."""

    model: ModelOptions
    cache: CacheOptions
    generation: GenerationOptions
    prompts: PromptOptions
    output: OutputOptions
