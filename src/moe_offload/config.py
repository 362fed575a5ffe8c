"""A run's configuration: frozen, built once, and checked by itself, whoever builds it.

The command line builds a `Config`, a Python program parts of it; everything below is handed the
part it needs. A field says what its flag is called and means: the command line's flags and help
are made from that (`commands/arguments.py`), and messages name a setting by its flag.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from types import NoneType
from typing import Any, Final, Literal, get_args, get_origin

from moe_offload.errors import UserError

WeightFormat = Literal["fp32", "bf16", "int8", "int4", "mxfp4", "fp8"]


@dataclass(frozen=True)
class Scales:
    """Which weights of a matrix share a scale, and how that is stored.

    A scale is of `group` columns (a multiple of 32; 0: of all) and `rows` rows. `dtype` is torch's;
    "uint8" is E8M0, the power of two 2^(byte - 127). A level u, without a sign, stands for
    (u - zero) * scale with the `offset` "zero" (uint8), for u * scale + minimum with "minimum"
    (float16); without one the zero is the format's own (8 of int4, 128 of int8).
    """

    dtype: Literal["float16", "bfloat16", "float32", "uint8"]
    group: int = 32
    rows: int = 1
    offset: Literal["", "zero", "minimum"] = ""

    def __post_init__(self) -> None:
        if self.group < 0 or self.group % 32 or self.rows < 1:
            raise ValueError(f"scales of {self.group} columns and {self.rows} rows")

    @property
    def offset_dtype(self) -> str:
        return "float16" if self.offset == "minimum" else "uint8"

    @property
    def bits_per_weight(self) -> float:
        bits = {"uint8": 8, "float16": 16, "bfloat16": 16, "float32": 32}
        each = bits[self.dtype] + (bits[self.offset_dtype] if self.offset else 0)
        return each / (self.group * self.rows) if self.group else 0.0


@dataclass(frozen=True)
class FormatFacts:
    """How a weight format stores a matrix: `bits` per weight in elements of torch's `dtype`.

    With a `group` these are packed tiles of groups of so many columns (`checkpoint/matrix.py`);
    without, the matrix is row-major. `scales` are those that we choose ourselves; a source's own
    may be others.
    """

    dtype: str
    bits: int
    group: int = 0
    scales: Scales | None = None

    @property
    def bits_per_weight(self) -> float:
        """Scales included, padding not."""
        return self.bits + (self.scales.bits_per_weight if self.scales else 0)


# The one table of weight formats, in the order of WeightFormat in kernels/cpp/kernels.h. A format
# is a row here, its bytes in checkpoint/matrix.py and its kernels.
WEIGHT_FORMATS: Final[Mapping[str, FormatFacts]] = {
    "fp32": FormatFacts("float32", 32),
    "bf16": FormatFacts("bfloat16", 16),
    "int8": FormatFacts("uint8", 8, 32, Scales("float16")),
    "int4": FormatFacts("uint8", 4, 32, Scales("float16")),
    "mxfp4": FormatFacts("uint8", 4, 32, Scales("uint8")),
    "fp8": FormatFacts("float8_e4m3fn", 8, 0, Scales("float32", 128, 128)),
}
# What one would choose for speed; fp32 is there to be compared with.
FAST_FORMATS: Final = tuple(name for name, facts in WEIGHT_FORMATS.items() if facts.bits < 32)
# Of dense matrices; the packed ones are served by the CPU alone.
DENSE_FORMATS: Final = ("fp32", "bf16", "int8", "int4")
PACKED_FORMATS: Final = tuple(name for name in DENSE_FORMATS if WEIGHT_FORMATS[name].group)


def smaller_format(name: str) -> str | None:
    """The format of fewer bits next below in size; None for the smallest."""
    bits = WEIGHT_FORMATS[name].bits
    smaller = [other for other, facts in WEIGHT_FORMATS.items() if facts.bits < bits]
    return max(smaller, key=lambda other: WEIGHT_FORMATS[other].bits_per_weight, default=None)


POLICIES: Final = ("FIFO", "LRU", "RANDOM", "LFU", "LFRU")

# What torch's generators take. No other number is larger either, though Python has such.
LEAST_SEED: Final = -(2**63)
MOST_PROMPTS: Final = 10_000_000  # their list takes 3 GB
LARGEST: Final = 2**64 - 1

# The kinds of fields: how a message calls one, and what is of it. True is no number.
_KINDS: Final[dict[Any, tuple[str, type]]] = {
    bool: ("True or False", bool),
    int: ("a whole number", Integral),
    float: ("a finite number", Real),
    str: ("text", str),
    Path: ("a pathlib.Path", Path),
    tuple: ("a tuple", tuple),
}


@dataclass(frozen=True)
class Flag:
    """A field on the command line: `--name` or `--name METAVAR`, and what --help says of it.

    Values are at least `least` or above `above`, and at most `most`. `choices`, those of a Literal
    unless they are given, may be written in lower case where they are in upper case. A flag
    without `help` is described elsewhere.
    """

    usage: str
    help: str
    choices: tuple[str, ...] = ()
    least: float = -math.inf
    above: float = -math.inf
    most: float = LARGEST

    @property
    def name(self) -> str:
        return self.usage.split()[0]


def option(default: Any, usage: str, text: str, **more: Any) -> Any:
    """A field that has a flag; `more` are further fields of `Flag`."""
    return field(default=default, metadata={"flag": Flag(usage, text, **more)})


def flag_of(one: Field[Any]) -> Flag:
    flag: Flag = one.metadata["flag"]
    return flag


def kind_of(one: Field[Any]) -> Any:
    """What a field is when it is not None."""
    kinds = get_args(one.type)
    return kinds[0] if NoneType in kinds else one.type


def choices_of(one: Field[Any]) -> tuple[str, ...]:
    """The texts that a field can be, none where that is not limited."""
    kind = kind_of(one)
    return flag_of(one).choices or (get_args(kind) if get_origin(kind) is Literal else ())


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _require_for(options: Any, names: Sequence[str], there: bool, sentence: str) -> None:
    """UserError for a field of `names` that is not its default, unless what it needs is `there`.

    The field's flag takes the place of {} in the sentence.
    """
    for one in fields(options):
        asked = one.name in names and getattr(options, one.name) != one.default
        _require(there or not asked, sentence.format(flag_of(one).name))


def require_range(
    flag: str, value: Any, least: float, most: float, above: float = -math.inf
) -> None:
    """UserError unless the number is in its range; not-a-number is in none."""
    for keeps, bound in (
        (value >= least, f"of at least {least}"),
        (value > above, f"above {above}"),
        (value <= most, f"of at most {most}"),
    ):
        _require(keeps, f"expected {flag} {bound}, found {value}")


def _check_fields(options: Any) -> None:
    """UserError for a value that is not of its field's kind, or beyond its bounds.

    A Python program can err in both, a command line in the second.
    """
    for one in fields(options):
        value, flag, kind = getattr(options, one.name), flag_of(one), kind_of(one)
        may_be_none = kind != one.type
        if value is None and may_be_none:
            continue
        if choices := choices_of(one):
            words = f"one of {', '.join(choices)}"
            fits = isinstance(value, str) and bool({value, value.upper()} & {*choices})
        else:
            words, of = _KINDS[get_origin(kind) or kind]
            fits = isinstance(value, of) and isinstance(value, bool) == (kind is bool)
            fits = fits and (of not in (Integral, Real) or -math.inf < value < math.inf)
        words += " or None" if may_be_none else ""
        _require(fits, f"expected {flag.name} as {words}, found {value!r}")
        if isinstance(value, Real):
            require_range(flag.name, value, flag.least, flag.most, flag.above)


@dataclass(frozen=True)
class ModelOptions:
    """Which model runs where.

    `model_path` is a prepared folder, or None with `dummy_shape`, which names a shape of random
    weights; `dummy_layers` overrides that shape's layer count.
    """

    model_path: Path | None = option(None, "--model-path DIR", "prepared model folder")
    device: str = option(
        "auto", "--device auto|cuda|cuda:N|cpu",
        "where attention runs; auto: the GPU when there is one; cuda:N: the N-th of several",
    )  # fmt: skip
    attention: Literal["sdpa", "xformers"] = option("sdpa", "--attention", "attention kernels")
    cuda_graphs: Literal["auto", "off"] = option(
        "auto", "--cuda-graphs",
        "auto: record what a decode step does between two layers' experts, where the model allows",
    )  # fmt: skip
    verify: bool = option(False, "--verify", "check every byte of the folder before loading")
    host_memory_gb: float | None = option(
        None, "--host-memory-gb X",
        "hold at most X GB of experts in host memory and read the others from disk when they are "
        "needed (default: all experts, or what fits)", above=0,
    )  # fmt: skip
    host_policy: str = option(
        "LFRU", "--host-replace-policy",
        "which expert gives up its place in host memory (default LFRU)", choices=POLICIES,
    )  # fmt: skip
    warm_start: Path | None = option(
        None, "--warm-start FILE",
        "load the experts first that this expert_counts.csv of an earlier run says were chosen "
        "most, where host memory cannot hold all",
    )  # fmt: skip
    dummy_shape: str | None = option(
        None, "--dummy-weights SHAPE",
        "instead of a folder: random weights of a known model's shape (speed only; the text "
        "is meaningless)",
    )  # fmt: skip
    dummy_layers: int | None = option(
        None, "--dummy-layers L", "fewer layers than the shape has", least=1
    )
    dummy_format: WeightFormat = option(
        "bf16", "--dummy-format", "weight format of the random experts (default bf16)",
        choices=FAST_FORMATS,
    )  # fmt: skip
    routing_trace: Path | None = option(
        None, "--routing-trace FILE",
        "with --dummy-weights: force the routing recorded in this trace",
    )  # fmt: skip
    cpu_kernel: Literal["auto", "native", "torch"] = option(
        "auto", "--cpu-kernel", "own kernels, or plain torch as a reference"
    )
    cpu_isa: str = option(
        "auto", "--cpu-isa ISA",
        "force an instruction set: scalar, avx2, avx512, ... (--version lists this CPU's)",
    )  # fmt: skip
    cpu_affinity: tuple[int, ...] | None = option(
        None, "--cpu-affinity LIST",
        "pin kernel threads to CPUs, such as 0-7,16",
    )  # fmt: skip
    ray: str | None = option(
        None, "--ray ADDRESS",
        "answer a prompt file on all machines of a Ray cluster; local: one started here",
    )  # fmt: skip

    def __post_init__(self) -> None:
        _check_fields(self)
        _require(
            re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", self.device) is not None,
            f"expected --device as one of auto, cuda, cuda:N, cpu, found {self.device!r}",
        )
        _require(
            self.model_path is not None or self.dummy_shape is not None,
            "--model-path is missing: name a folder weights_preprocessor.py prepared",
        )
        _require(
            self.model_path is None or self.dummy_shape is None,
            "expected exactly one of --model-path and --dummy-weights, found both",
        )
        _require_for(
            self, ("routing_trace", "dummy_layers", "dummy_format"), self.dummy_shape is not None,
            "{} needs --dummy-weights: a real model has its own",
        )  # fmt: skip
        _require_for(
            self, ("host_memory_gb", "host_policy", "warm_start"), self.model_path is not None,
            "{} needs --model-path: random weights are on no disk",
        )  # fmt: skip


@dataclass(frozen=True)
class CacheOptions:
    """The N x M expert cache and what happens on a miss (N = `n_indexes`, M = `n_ways`)."""

    n_indexes: int = option(
        0, "--cache-nblocks N",
        "cache indexes: the first N MoE layers are cached (default 0)", least=0,
    )  # fmt: skip
    n_ways: int = option(0, "--cache-nways M", "experts per index (default 0)", least=0)
    quota: int = option(
        64, "--cache-quota Q", "most background fetches of one forward pass (default 64)", least=0
    )
    policy: str = option(
        "FIFO", "--cache-replace-policy",
        "which expert gives up its place (default FIFO)", choices=POLICIES,
    )  # fmt: skip
    auto: bool = option(
        False, "--cache-auto", "choose N, M and more from free GPU memory and speeds"
    )
    memory_gb: float | None = option(
        None, "--cache-memory-gb X", "with --cache-auto: use at most X GB", above=0
    )
    trace: Path | None = option(
        None, "--trace FILE", "with --cache-auto: a routing trace to tune on"
    )
    miss_policy: Literal["cpu", "fetch", "auto"] = option(
        "cpu", "--miss-policy",
        "a miss is computed on the CPU (default), waits for its copy, or whichever measures faster",
    )  # fmt: skip
    prefetch: Literal["off", "next-layer"] = option(
        "off", "--prefetch", "fetch the experts the next layer's router is expected to choose"
    )
    emulate_pcie_gbps: float | None = option(
        None, "--emulate-pcie-gbps X",
        "with --device cpu: slow the emulated accelerator's copies to X GB/s", above=0,
    )  # fmt: skip
    # Of RANDOM; the flag of GenerationOptions sets both.
    seed: int = option(0, "--seed N", "", least=LEAST_SEED)

    def __post_init__(self) -> None:
        _check_fields(self)
        _require(
            (self.n_indexes == 0) == (self.n_ways == 0),
            "expected --cache-nblocks and --cache-nways both positive or both 0, "
            f"found {self.n_indexes} and {self.n_ways}",
        )
        _require(
            not (self.auto and self.n_indexes),
            "expected --cache-auto or --cache-nblocks with --cache-nways, found both",
        )
        _require_for(
            self, ("memory_gb", "trace"), self.auto,
            "expected --cache-auto with {}, found none: without it --cache-nblocks and "
            "--cache-nways give the cache's size",
        )  # fmt: skip
        # To fetch each miss and use it once needs no cache.
        for_a_cache = ("prefetch",) if self.miss_policy == "fetch" else ("prefetch", "miss_policy")
        _require_for(
            self, for_a_cache, self.auto or self.n_slots > 0,
            "expected a cache for {}: add --cache-nblocks and --cache-nways, or --cache-auto",
        )  # fmt: skip
        _require_for(
            self, ("emulate_pcie_gbps",), self.wants_accelerator,
            "expected a cache or --miss-policy fetch for {}, found neither",
        )  # fmt: skip

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

    max_tokens: int = option(MISSING, "--max-tokens N", "tokens per prompt (required)", least=1)
    temperature: float = option(0.0, "--temperature X", "0 is greedy (default)", least=0)
    top_p: float = option(1.0, "--top-p P", "nucleus sampling mass (default 1)", above=0, most=1)
    top_k: int = option(
        0, "--top-k K", "sample from the K likeliest tokens (default 0: all)", least=0
    )
    min_p: float = option(
        0.0, "--min-p P", "leave out tokens below P times the likeliest's probability (default 0)",
        least=0, most=1,
    )  # fmt: skip
    repetition_penalty: float = option(
        1.0, "--repetition-penalty X", "divide the scores of tokens there already (default 1: off)",
        above=0,
    )  # fmt: skip
    seed: int = option(0, "--seed N", "sampling seed (default 0)", least=LEAST_SEED)
    batch_size: int = option(1, "--batch-size B", "prompts at a time (default 1)", least=1)
    stop: tuple[str, ...] = option(
        (), "--stop TEXT", "end an answer before this text; may be given several times"
    )

    def __post_init__(self) -> None:
        _check_fields(self)
        _require_for(
            self, ("top_p", "top_k", "min_p"), self.temperature > 0,
            "expected --temperature above 0 for {}: greedy decoding has nothing to sample",
        )  # fmt: skip
        _require(
            all(isinstance(text, str) and text for text in self.stop),
            f"expected --stop as a text that is not empty, found {self.stop!r}",
        )


@dataclass(frozen=True)
class PromptOptions:
    """Where prompts come from: `prompt` or lines of `path`, exactly one of them."""

    prompt: str | None = option(None, "--prompt TEXT", "one prompt; -: standard input")
    path: Path | None = option(
        None, "--prompt-path FILE", "prompts, one per line; of *.jsonl each an object"
    )
    n_prompts: int | None = option(
        None,
        "--n-prompts N",
        "how many; cycles through the file (default all)",
        least=1,
        most=MOST_PROMPTS,
    )
    shard: str | None = option(
        None, "--shard I/N", "every N-th prompt, the I-th part; auto: as Slurm or SkyPilot says"
    )
    raw: bool = option(False, "--raw-prompt", "no chat template around the prompt")
    system: str | None = option(None, "--system TEXT", "a system message before each prompt")

    def __post_init__(self) -> None:
        _check_fields(self)
        _require(
            (self.prompt is None) != (self.path is None),
            "expected exactly one of --prompt and --prompt-path, found "
            + ("neither" if self.prompt is None else "both"),
        )
        _require_for(
            self, ("shard",), self.path is not None,
            "{} needs --prompt-path: a single prompt has no parts",
        )  # fmt: skip
        _require(
            self.system is None or not self.raw,
            "expected --system or --raw-prompt, found both: without a template there is no message",
        )


@dataclass(frozen=True)
class OutputOptions:
    """What a run leaves behind."""

    breakdown_csv: Path = option(
        Path("out.csv"), "--breakdown-csv FILE", "time per forward pass (default out.csv)"
    )
    cachehit_csv: Path = option(
        Path("cache.csv"), "--cachehit-csv FILE",
        "hits per forward pass and layer (default cache.csv)",
    )  # fmt: skip
    output_dir: Path | None = option(None, "--output-dir DIR", "put all CSVs there")
    responses_jsonl: Path | None = option(
        None, "--responses-jsonl FILE", "one line per prompt, written as soon as it is done"
    )
    resume: bool = option(
        False, "--resume", "with --responses-jsonl: leave out what is answered there"
    )
    quiet: bool = option(False, "--quiet", "print the responses and nothing else")
    hide_responses: bool = option(False, "--hide-resp", "do not print responses")
    hide_thinking: bool = option(
        False, "--hide-thinking", "print responses without their <think> parts"
    )
    record: bool = option(True, "--no-record", "no events, no CSVs, no hit rates")
    nvtx: bool = option(False, "--nvtx", "NVTX ranges for Nsight Systems")

    def __post_init__(self) -> None:
        _check_fields(self)
        _require_for(
            self, ("output_dir", "breakdown_csv", "cachehit_csv"), self.record,
            "expected --no-record or {}, found both: without a record there is no file to put "
            "there",
        )  # fmt: skip
        _require_for(
            self, ("resume",), self.responses_jsonl is not None,
            "{} needs --responses-jsonl: the file to go on with",
        )  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Everything one run was asked for."""

    model: ModelOptions
    cache: CacheOptions
    generation: GenerationOptions
    prompts: PromptOptions
    output: OutputOptions

    def __post_init__(self) -> None:
        if self.model.ray is None:
            return
        _require(
            self.prompts.path is not None and self.output.responses_jsonl is not None,
            "--ray needs --prompt-path and --responses-jsonl: the prompts, and where answers go",
        )
        _require(
            self.model.model_path is not None,
            "--ray needs --model-path: random weights have nothing to say",
        )
        _require_for(
            self.output, ("output_dir", "breakdown_csv", "cachehit_csv", "nvtx"), False,
            "expected --ray or {}, found both: only a run on one machine is recorded",
        )  # fmt: skip
