"""The rows of a run's CSV files: the reference's columns first, further ones after.

| file | one row per | units |
|---|---|---|
| out.csv | forward pass | ms, mean over layers, unless the name says otherwise |
| cache.csv | forward pass | chosen experts that hit, per layer (0 where a layer is not cached) |
| expert_choices.csv | forward pass (decode in a batch: per sequence) | expert ids |
| expert_counts.csv | expert that was chosen | tokens, the prompts' too; most chosen first |
| token_gen_time.csv | generated token after a prompt's first | s, tokens/s, MHz, degrees C |
| cpu_freq_avg.csv | second | degrees C, MHz, W |

`Index` counts forward passes over the whole run (tokens in token_gen_time.csv). Those with it end
with a `Prompt` column; for a pass over a batch it names the batch's first prompt. In a run of one
prompt they are written without it (`with_prompts`). None is an empty cell.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_offload.experts.recorder import BYTES, DURATIONS, LayerEvent, Recorder, Table
from moe_offload.machine.sensors import Sample
from moe_offload.report.summary import step_times_s, token_energies_j

Row = Sequence[object]

_OF_DISK = ("disk_bytes", "host_hits", "host_misses")
BREAKDOWN_HEADER = (
    *("Index", "attn", "ffn_compute", "ffn_comm"),
    *("phase", "tokens", "step_ms", "rest_ms"),
    *(name.removesuffix("_us") for name in DURATIONS if name != "disk_wait_us"),
    *(name for name in BYTES if name != "disk_bytes"),
    *("disk_wait", *_OF_DISK),
    "Prompt",
)
CACHEHIT_MORE = (
    *("Phase", "Tokens", "Hits", "Misses", "Pairs", "At Least One", "At Least Two"),
    *("Fetches", "Evictions", "Prompt"),
)
TOKEN_HEADER = (
    *("Index", "Time", "Timestamp", "Accumulated Generation Throughput (tokens/s)"),
    *("CPU Frequency", "CPU Temperature", "CPU Energy (J)", "GPU Energy (J)", "GPU Power (W)"),
    "Prompt",
)
FREQUENCY_HEADER = ("Seconds", "Temperature", "cpu0", "CPU Power (W)", "GPU Power (W)")
_EXPERT_PARTS = ("cpu_us", "copy_wait_us", "combine_us", "disk_wait_us")


def with_prompts(rows: Iterable[Row], recorder: Recorder) -> Iterable[Row]:
    """`rows`, without their last column, the prompt, in a run of no more than one."""
    owners = (recorder.pass_table()["prompt"], recorder.token_table()["prompt"])
    several = len(np.unique(np.concatenate(owners))) > 1
    return rows if several else (row[:-1] for row in rows)


def breakdown_rows(recorder: Recorder) -> Iterable[Row]:
    """Rows of out.csv.

    `ffn_compute` is the longer of the CPU's and the accelerator's time, which overlap, and
    `ffn_comm` what else the experts' part took (waiting for disk and copies, adding up): with
    attn, router, plan and rest they add up to the step.
    """
    passes, layers = recorder.pass_table(), recorder.layer_table()
    n_layers = np.maximum(np.bincount(layers["pass_index"], minlength=len(passes)), 1)

    def mean_ms(us: Table) -> Table:
        mean: Table = _sums(us, layers, passes) / n_layers / 1e3
        return mean

    of_part = {name: mean_ms(layers[name]) for name in DURATIONS}
    expert_us = np.sum([layers[name].astype(np.float64) for name in _EXPERT_PARTS], axis=0)
    compute_us = np.minimum(np.maximum(layers["cpu_us"], layers["gpu_us"]), expert_us)
    compute_ms = mean_ms(compute_us)
    parts_ms = sum(ms for name, ms in of_part.items() if name != "gpu_us")  # the gpu's are beside
    step_ms = passes["duration_s"] * 1e3
    disk_wait_ms = of_part.pop("disk_wait_us")
    yield BREAKDOWN_HEADER
    yield from _numbered(
        of_part["attention_us"],
        compute_ms,
        mean_ms(expert_us) - compute_ms,
        _phases(passes),
        passes["n_tokens"],
        step_ms,
        step_ms - parts_ms * n_layers,
        *of_part.values(),
        *_counts([name for name in BYTES if name != "disk_bytes"], layers, passes),
        disk_wait_ms,
        *_counts(_OF_DISK, layers, passes),
        passes["prompt"],
    )


def cachehit_rows(recorder: Recorder) -> Iterable[Row]:
    """Rows of cache.csv; `Pairs` are the (token, cached layer) pairs of the pass."""
    passes, layers = recorder.pass_table(), recorder.layer_table()
    hits = np.zeros((len(passes), _n_layers(layers)), dtype=np.int64)
    hits[layers["pass_index"], layers["layer"]] = layers["hits"]
    cached = layers[layers["cached"] == 1]
    pass_of_pair = np.repeat(cached["pass_index"], cached["n_tokens"])
    n_hits_of_pair = recorder.hits_of_tokens()
    yield ("Index", *(f"Block_{n}" for n in range(hits.shape[1])), *CACHEHIT_MORE)
    yield from _numbered(
        *hits.T,
        _phases(passes),
        passes["n_tokens"],
        *_counts(("hits", "misses"), cached, passes),
        *(
            np.bincount(pass_of_pair[n_hits_of_pair >= least], minlength=len(passes))
            for least in (0, 1, 2)
        ),
        *_counts(("fetches", "evictions"), layers, passes),
        passes["prompt"],
    )


def expert_choice_rows(recorder: Recorder) -> Iterable[Row]:
    """Rows of expert_choices.csv: a decode has K ids for each layer, a prefill none.

    In a batch a decode pass has one row per sequence, all with the pass's index.
    """
    passes, tokens, layers = recorder.pass_table(), recorder.token_table(), recorder.layer_table()
    widths = np.zeros(_n_layers(layers), dtype=np.int64)
    np.maximum.at(widths, layers["layer"], layers["top_k"])
    columns = (np.cumsum(widths) - widths).tolist()
    header = [f"Block_{n}" for n, width in enumerate(widths) for _ in range(width)]
    yield ("Index", *header, "Prompt")
    no_ids: list[object] = [""] * len(header)
    first_token = np.searchsorted(tokens["pass_index"], np.arange(len(passes) + 1)).tolist()
    owners, prompt_of_pass = tokens["prompt"].tolist(), passes["prompt"].tolist()
    is_decode = passes["decode"].tolist()
    for index, events in enumerate(events_of_passes(recorder)):
        prompt = prompt_of_pass[index]
        if not is_decode[index]:
            yield (index, *no_ids, prompt)
            continue
        sequences = [no_ids.copy() for _ in range(max([len(e.ids) for e in events], default=1))]
        for event in events:
            first = columns[event.layer]
            for cells, ids in zip(sequences, event.ids, strict=False):
                cells[first : first + len(ids)] = ids
        of_pass = owners[first_token[index] : first_token[index + 1]]
        of_pass += [prompt] * (len(sequences) - len(of_pass))
        for owner, cells in zip(of_pass, sequences, strict=False):
            yield (index, *cells, owner)


def expert_count_rows(recorder: Recorder) -> Iterator[Row]:
    """Rows of expert_counts.csv."""
    layers = recorder.layer_table()
    n_ids = layers["n_tokens"].astype(np.int64) * layers["top_k"]
    pairs = np.stack([np.repeat(layers["layer"], n_ids), recorder.expert_ids()])
    found, counts = np.unique(pairs, axis=1, return_counts=True)
    yield ("Layer", "Expert", "Count")
    yield from sorted(
        zip(*found.tolist(), counts.tolist(), strict=True), key=lambda row: (row[0], -row[2])
    )


def events_of_passes(recorder: Recorder) -> Iterator[list[LayerEvent]]:
    """The layer events of each finished pass: a list for every row of `pass_table`."""
    by_pass = groupby(recorder.layer_events(), key=lambda event: event.pass_index)
    index, events = next(by_pass, (-1, iter(())))
    for number in range(len(recorder.pass_table())):
        of_pass = list(events) if number == index else []
        if of_pass:
            index, events = next(by_pass, (-1, iter(())))
        yield of_pass


def token_rows(recorder: Recorder, samples: Sequence[Sample]) -> Iterable[Row]:
    """Rows of token_gen_time.csv; energies are the token's own (its share of a batch's step)."""
    passes, tokens = recorder.pass_table(), recorder.token_table()
    tokens = tokens[tokens["pass_index"] < len(passes)]
    yield TOKEN_HEADER
    tokens = tokens[passes["decode"][tokens["pass_index"]]]
    pass_indexes, times_s = step_times_s(tokens)
    elapsed_s = np.cumsum(times_s)[np.searchsorted(pass_indexes, tokens["pass_index"])]
    so_far = np.searchsorted(tokens["pass_index"], tokens["pass_index"], side="right")
    sampled_at = np.array([sample.unix_s for sample in samples])
    latest = np.searchsorted(sampled_at, tokens["unix_s"], side="right") - 1
    cpu_j, gpu_j = (
        token_energies_j(tokens, samples, sensor) for sensor in ("cpu_energy_j", "gpu_energy_j")
    )
    for index, token in enumerate(tokens):
        unix_s = float(token["unix_s"])
        sample = samples[max(int(latest[index]), 0)] if samples else Sample(unix_s)
        yield (
            index,
            float(token["time_s"]),
            int(unix_s),
            float(so_far[index] / elapsed_s[index]) if elapsed_s[index] > 0 else None,
            sample.busiest_mhz,
            sample.cpu_temperature_c,
            None if cpu_j is None else float(cpu_j[index]),
            None if gpu_j is None else float(gpu_j[index]),
            sample.gpu_power_w,
            int(token["prompt"]),
        )


def frequency_rows(samples: Sequence[Sample]) -> Iterable[Row]:
    """Rows of cpu_freq_avg.csv: the last sample of each second; powers since the row before."""
    yield FREQUENCY_HEADER
    by_second = {int(sample.unix_s): sample for sample in samples}
    before: Sample | None = None
    for second, sample in by_second.items():
        cpu_w, gpu_w = (
            _mean_power_w(before, sample, sensor) for sensor in ("cpu_energy_j", "gpu_energy_j")
        )
        gpu_w = sample.gpu_power_w if gpu_w is None else gpu_w
        yield (second, sample.cpu_temperature_c, sample.busiest_mhz, cpu_w, gpu_w)
        before = sample


def _numbered(*columns: npt.NDArray[Any] | list[str]) -> Iterable[Row]:
    plain = [c if isinstance(c, list) else c.tolist() for c in columns]
    return ((index, *row) for index, row in enumerate(zip(*plain, strict=True)))


def _phases(passes: Table) -> list[str]:
    return ["decode" if decode else "prefill" for decode in passes["decode"]]


def _n_layers(layers: Table) -> int:
    return int(layers["layer"].max(initial=-1)) + 1


def _sums(values: Table, layers: Table, passes: Table) -> Table:
    """The sum over each pass of what `values` has for every row of `layers`."""
    sums = np.bincount(layers["pass_index"], weights=values, minlength=len(passes))
    return sums.astype(np.float64)  # without rows it is of int


def _counts(names: Sequence[str], layers: Table, passes: Table) -> list[Table]:
    return [_sums(layers[name], layers, passes).astype(np.int64) for name in names]


def _mean_power_w(before: Sample | None, sample: Sample, sensor: str) -> float | None:
    start_j, end_j = getattr(before, sensor, None), getattr(sample, sensor)
    if before is None or start_j is None or end_j is None or sample.unix_s <= before.unix_s:
        return None
    return float((end_j - start_j) / (sample.unix_s - before.unix_s))
