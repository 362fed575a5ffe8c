"""A run in numbers: computed from the recorder after the run, printed in the reference's words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_offload.experts.cache import HitCounts
from moe_offload.experts.recorder import DURATIONS, Recorder, Table
from moe_offload.machine.sensors import Sample, energies_at

Floats = npt.NDArray[np.float64]
_RULE = "=" * 20
_MOST_OF_LIMIT = 1.1  # more than memory can give: experts in a cache, or a limit badly measured


@dataclass(frozen=True)
class RunSummary:
    """What a run achieved. None where there is nothing to measure it with.

    `prompt_s` is the time of the prefill passes; `generation_s` that of the steps that gave
    `generated_tokens`, the tokens after each prompt's first. `parts_ms` splits a mean decode step:
    the recorder's disjoint durations summed over the layers, and `rest`, what follows the last of
    them: the head. `predicted_step_ms` and `step_ms` are means over decode passes.
    Without `has_events` nothing counted the cache's hits.
    """

    prompt_tokens: int
    prompt_s: float
    generated_tokens: int
    generation_s: float
    seqlens: tuple[int, ...]
    ttft_s: tuple[float, ...]
    tpot_median_s: float | None
    tpot_p95_s: float | None
    decode_hits: HitCounts
    prefill_hits: HitCounts
    n_cached_layers: int
    fetches: int
    evictions: int
    fetched_bytes: int
    saved_bytes: int
    host_hits: int
    host_misses: int
    disk_bytes: int
    disk_wait_s: float
    cpu_read_bytes: int
    cpu_read_gbps: float | None
    cpu_limit_gbps: float | None
    step_ms: float | None
    predicted_step_ms: float | None
    parts_ms: dict[str, float] = field(default_factory=dict)
    cpu_j_per_token: float | None = None
    gpu_j_per_token: float | None = None
    has_events: bool = True

    @property
    def prompt_throughput(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prompt_s if self.prompt_s > 0 else 0.0

    @property
    def generation_throughput(self) -> float:
        """Generated tokens per second."""
        return self.generated_tokens / self.generation_s if self.generation_s > 0 else 0.0

    @property
    def cpu_share_of_limit(self) -> float | None:
        if self.cpu_read_gbps is None or not self.cpu_limit_gbps:
            return None
        return self.cpu_read_gbps / self.cpu_limit_gbps

    @property
    def j_per_token(self) -> float | None:
        """CPU package and GPU together, of those that can be measured."""
        known = [j for j in (self.cpu_j_per_token, self.gpu_j_per_token) if j is not None]
        return sum(known) if known else None

    def to_json(self) -> dict[str, Any]:
        """The fields, and the figures that derive from them, as plain JSON values."""
        return asdict(self) | {
            "prompt_throughput": self.prompt_throughput,
            "generation_throughput": self.generation_throughput,
            "cache_hit_1_percent": self.decode_hits.at_least_one_percent,
            "cache_hit_2_percent": self.decode_hits.at_least_two_percent,
            "per_expert_hit_percent": self.decode_hits.per_expert_percent,
            "cpu_share_of_limit": self.cpu_share_of_limit,
            "j_per_token": self.j_per_token,
        }


def summarize(
    recorder: Recorder,
    *,
    seqlens: Sequence[int] = (),
    samples: Sequence[Sample] = (),
    cpu_limit_gbps: float | None = None,
    predicted_step_us: float | None = None,
) -> RunSummary:
    """The summary of everything recorded so far.

    `seqlens` are the prompts' token counts (where empty: the prefill passes', which in a batch are
    sums), `samples` the sensors', `cpu_limit_gbps` the machine's plain-read bandwidth on the run's
    threads, `predicted_step_us` the cost model's decode step.
    """
    passes, tokens, layers = recorder.pass_table(), recorder.token_table(), recorder.layer_table()
    decode_pass = passes["decode"]
    tokens = tokens[tokens["pass_index"] < len(passes)]
    first = ~decode_pass[tokens["pass_index"]]
    decode_tokens = tokens[~first]
    hits_of_token = recorder.hits_of_tokens()
    cached = layers[layers["cached"] == 1]
    decode_cached = decode_pass[cached["pass_index"]]
    decode_layers = layers[decode_pass[layers["pass_index"]]]
    cpu_read_bytes = int(decode_layers["cpu_bytes"].sum())
    cpu_s = float(decode_layers["cpu_us"].sum(dtype=np.float64)) / 1e6
    cpu_j, gpu_j = (
        _mean(token_energies_j(decode_tokens, samples, sensor))
        for sensor in ("cpu_energy_j", "gpu_energy_j")
    )
    times_s = decode_tokens["time_s"]
    step_s = passes["duration_s"][decode_pass]
    return RunSummary(
        prompt_tokens=int(passes["n_tokens"][~decode_pass].sum()),
        prompt_s=float(passes["duration_s"][~decode_pass].sum()),
        generated_tokens=len(decode_tokens),
        generation_s=float(step_times_s(decode_tokens)[1].sum()),
        seqlens=tuple(seqlens) or _prompt_lengths(passes),
        ttft_s=tuple(tokens["time_s"][first].tolist()),
        tpot_median_s=float(np.median(times_s)) if len(times_s) else None,
        tpot_p95_s=float(np.percentile(times_s, 95)) if len(times_s) else None,
        decode_hits=_hit_counts(cached, hits_of_token, decode_cached),
        prefill_hits=_hit_counts(cached, hits_of_token, ~decode_cached),
        n_cached_layers=len(np.unique(cached["layer"])),
        fetches=int(layers["fetches"].sum()),
        evictions=int(layers["evictions"].sum()),
        fetched_bytes=int(layers["fetch_bytes"].sum()),
        saved_bytes=int((decode_layers["gpu_bytes"] - decode_layers["waited_bytes"]).sum()),
        host_hits=int(layers["host_hits"].sum()),
        host_misses=int(layers["host_misses"].sum()),
        disk_bytes=int(layers["disk_bytes"].sum()),
        disk_wait_s=float(layers["disk_wait_us"].sum(dtype=np.float64)) / 1e6,
        cpu_read_bytes=cpu_read_bytes,
        cpu_read_gbps=cpu_read_bytes / cpu_s / 1e9 if cpu_s > 0 else None,
        cpu_limit_gbps=cpu_limit_gbps,
        step_ms=float(step_s.mean()) * 1e3 if len(step_s) else None,
        predicted_step_ms=None if predicted_step_us is None else predicted_step_us / 1e3,
        parts_ms=_parts_ms(decode_layers, step_s),
        cpu_j_per_token=cpu_j,
        gpu_j_per_token=gpu_j,
        has_events=recorder.enabled,
    )


def step_times_s(tokens: Table) -> tuple[Table, Floats]:
    """The passes that gave these tokens and each pass's time, s: a batch's tokens share one."""
    pass_indexes, inverse = np.unique(tokens["pass_index"], return_inverse=True)
    times_s = np.zeros(len(pass_indexes))
    np.maximum.at(times_s, inverse, tokens["time_s"])
    return pass_indexes, times_s


def _prompt_lengths(passes: Table) -> tuple[int, ...]:
    prefill = passes[~passes["decode"]]
    prompts, place = np.unique(prefill["prompt"], return_inverse=True)
    lengths = np.zeros(len(prompts), dtype=np.int64)
    np.add.at(lengths, place, prefill["n_tokens"])
    return tuple(lengths.tolist())


def _hit_counts(cached: Table, hits_of_token: Table, wanted: Table) -> HitCounts:
    n_hits = hits_of_token[np.repeat(wanted, cached["n_tokens"])]
    return HitCounts(
        pairs=len(n_hits),
        at_least_one=int((n_hits >= 1).sum()),
        at_least_two=int((n_hits >= 2).sum()),
        hits=int(cached["hits"][wanted].sum()),
        misses=int(cached["misses"][wanted].sum()),
    )


def _parts_ms(decode_layers: Table, step_s: Table) -> dict[str, float]:
    if not len(step_s) or not len(decode_layers):
        return {}
    parts = {
        name.removesuffix("_us"): float(decode_layers[name].sum(dtype=np.float64)) / 1e3
        for name in DURATIONS
        if name != "gpu_us"  # beside the others, not one of the parts
    }
    if not decode_layers["host_misses"].any():  # so it is without a disk
        del parts["disk_wait"]
    parts["rest"] = float(step_s.sum()) * 1e3 - sum(parts.values())
    return {name: ms / len(step_s) for name, ms in parts.items()}


def token_energies_j(decode_tokens: Table, samples: Sequence[Sample], sensor: str) -> Floats | None:
    """Each token's share, J, of its step's energy (a batch's tokens share one step), or None."""
    steps, times_s = step_times_s(decode_tokens)
    ends_s = decode_tokens["unix_s"][np.searchsorted(decode_tokens["pass_index"], steps)]
    after_j = energies_at(ends_s, samples, sensor)
    before_j = energies_at(ends_s - times_s, samples, sensor)
    if after_j is None or before_j is None:
        return None
    step_of_token = np.searchsorted(steps, decode_tokens["pass_index"])
    shares: Floats = (after_j - before_j) / np.bincount(step_of_token, minlength=len(steps))
    return shares[step_of_token]


def _mean(values: Floats | None) -> float | None:
    return float(values.mean()) if values is not None and len(values) else None


def format_summary(
    summary: RunSummary,
    *,
    conversations: Sequence[tuple[str, str]] = (),
    notes: Sequence[str] = (),
) -> str:
    """The printed summary: the reference's block first, to the letter, then our own lines.

    `conversations` are (prompt, response) pairs, empty to hide them; `notes` are lines such as
    those of missing sensors.
    """
    mean_length = sum(summary.seqlens) / max(len(summary.seqlens), 1)
    lines = [
        _RULE,
        "PERFORMANCE BREAKDOWN",
        "",
        "PROMPT EVALUATION:",
        f"token count: {summary.prompt_tokens}",
        f"total time in sec(s): {summary.prompt_s:.2f}",
        f"throughput: {summary.prompt_throughput:.2f} t/s",
        "TOKEN GENERATION:",
        f"token count: {summary.generated_tokens}",
        f"total time in sec(s): {summary.generation_s:.2f}",
        f"throughput: {summary.generation_throughput:.2f} t/s",
        _RULE,
        "In-n-Outs",
        f"AVG seqlen: {round(mean_length, 2):.10g}",
        f"seqlens: {list(summary.seqlens)}",
        "",
    ]
    for prompt, response in conversations:
        lines += ["PROMPT:", prompt, "RESPONSE:", response, ""]
    if summary.has_events:
        lines += [
            f"Cache hit 1: {summary.decode_hits.at_least_one_percent:.1f}",
            f" Cache hit 2: {summary.decode_hits.at_least_two_percent:.1f}",
            "",
        ]
    return "\n".join([*lines, *_own_lines(summary), *notes])


def _own_lines(summary: RunSummary) -> Iterator[str]:
    if summary.ttft_s:
        yield f"TTFT: median {_ms(float(np.median(summary.ttft_s)))}"
    if summary.tpot_median_s is not None and summary.tpot_p95_s is not None:
        yield f"TPOT: median {_ms(summary.tpot_median_s)}, p95 {_ms(summary.tpot_p95_s)}"
    for phase, hits in (("decode", summary.decode_hits), ("prefill", summary.prefill_hits)):
        if hits.pairs and (phase == "decode" or hits.hits):  # a first prompt finds nothing
            yield (
                f"Hit rate, {phase}: {hits.at_least_one_percent:.2f}% at least one, "
                f"{hits.at_least_two_percent:.2f}% at least two, "
                f"{hits.per_expert_percent:.2f}% per expert "
                f"({hits.hits} of {hits.hits + hits.misses} on cached layers)"
            )
    if summary.fetches or summary.saved_bytes:
        yield (
            f"Expert bytes: {_gb(summary.fetched_bytes)} fetched in {summary.fetches} copies "
            f"({summary.evictions} evictions), {_gb(summary.saved_bytes)} saved by decode hits"
        )
    if asked := summary.host_hits + summary.host_misses:
        yield (
            f"Experts from disk: {summary.host_misses} of {asked} asked for were not in host "
            f"memory ({100 * summary.host_hits / asked:.2f}% were), {_gb(summary.disk_bytes)} "
            f"read, {summary.disk_wait_s:.2f} s waited for"
        )
    if summary.cpu_read_gbps is not None and summary.cpu_read_bytes:
        share, of_limit = summary.cpu_share_of_limit, ""
        if share is not None and share <= _MOST_OF_LIMIT:
            of_limit = f", {100 * share:.0f}% of this machine's {summary.cpu_limit_gbps:.1f} GB/s"
        yield (
            f"CPU experts: read {_gb(summary.cpu_read_bytes)} in decode "
            f"at {summary.cpu_read_gbps:.1f} GB/s{of_limit}"
        )
    if summary.parts_ms and summary.step_ms is not None:
        parts = [f"{name.replace('_', ' ')} {ms:.2f}" for name, ms in summary.parts_ms.items()]
        yield f"Decode step: {summary.step_ms:.2f} ms = {', '.join(parts)}"
    if summary.predicted_step_ms is not None and summary.step_ms:
        off = 100 * (summary.predicted_step_ms / summary.step_ms - 1)
        yield (
            f"Predicted decode step, of one short sequence: {summary.predicted_step_ms:.2f} ms, "
            f"measured {summary.step_ms:.2f} ms ({off:+.0f}%)"
        )
    if summary.j_per_token is not None:
        sides = (("CPU", summary.cpu_j_per_token), ("GPU", summary.gpu_j_per_token))
        detail = ", ".join(f"{name} {j:.2f}" for name, j in sides if j is not None)
        yield f"Energy: {summary.j_per_token:.2f} J/token ({detail})"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.3f} GB"
