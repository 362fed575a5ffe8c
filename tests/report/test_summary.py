"""The summary: its printed form, and its figures against a recomputation from the CSVs alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from recomputed_summary import recompute
from synthetic_recording import START_UNIX_S, Shape, record_run, sensor_samples

from moe_offload.experts.recorder import LayerEvent, NullRecorder, Recorder
from moe_offload.machine.sensors import Sample
from moe_offload.report.files import ReportPaths, RunInfo, write_reports
from moe_offload.report.summary import HitCounts, format_summary, summarize


def hand_made_run(recorder: Recorder) -> None:
    """One prompt of 3 tokens, its first token, two decode steps of 20 and 30 ms over 2 layers."""
    recorder.begin_pass("prefill", 3, 0)
    for layer in range(2):
        ids = [[0, 1], [1, 2], [2, 3]]
        hits_of_token = [0, 0, 0] if layer == 0 else None
        recorder.layer(LayerEvent(layer, ids, hits_of_token, misses=6 * (1 - layer), fetches=2))
    recorder.end_pass(0.5)
    recorder.token(0, 0.6, 1000.0)
    for step_s, n_hits, at in ((0.02, 2, 1000.02), (0.03, 1, 1000.05)):
        recorder.begin_pass("decode", 1, 0)
        for layer in range(2):
            hits = n_hits * (1 - layer)
            event = LayerEvent(
                layer,
                [[2, 3]],
                [hits] if layer == 0 else None,
                hits,
                (2 - hits) * (1 - layer),
                fetches=1,
                evictions=1,
                attention_us=1000.0,
                cpu_us=2000.0,
                gpu_us=500.0,
                cpu_bytes=50_000_000,
                gpu_bytes=9_000_000,
                waited_bytes=2_000_000,
                fetch_bytes=3_000_000,
            )
            recorder.layer(event)
        recorder.end_pass(step_s)
        recorder.token(0, step_s, at)


REFERENCE_BLOCK = """\
====================
PERFORMANCE BREAKDOWN

PROMPT EVALUATION:
token count: 3
total time in sec(s): 0.50
throughput: 6.00 t/s
TOKEN GENERATION:
token count: 2
total time in sec(s): 0.05
throughput: 40.00 t/s
====================
In-n-Outs
AVG seqlen: 3
seqlens: [3]

PROMPT:
Why?
RESPONSE:
Because.

Cache hit 1: 100.0
 Cache hit 2: 50.0
"""

OWN_LINES = """
TTFT: median 600.0 ms
TPOT: median 25.0 ms, p95 29.5 ms
Hit rate, decode: 100.00% at least one, 50.00% at least two, 75.00% per expert \
(3 of 4 on cached layers)
Expert bytes: 0.012 GB fetched in 8 copies (4 evictions), 0.028 GB saved by decode hits
CPU experts: read 0.200 GB in decode at 25.0 GB/s, 62% of this machine's 40.0 GB/s
Decode step: 25.00 ms = attention 2.00, router 0.00, plan 0.00, cpu 4.00, copy wait 0.00, \
combine 0.00, rest 19.00
Predicted decode step, of one short sequence: 20.00 ms, measured 25.00 ms (-20%)
Energy: 3.75 J/token (CPU 1.25, GPU 2.50)
GPU energy is sampled."""


def test_a_prompt_that_found_experts_says_so() -> None:
    recorder = Recorder()
    hand_made_run(recorder)
    found = replace(summarize(recorder), prefill_hits=HitCounts(3, 2, 1, 3, 3))
    assert (
        "Hit rate, prefill: 66.67% at least one, 33.33% at least two, 50.00% per expert "
        "(3 of 6 on cached layers)"
    ) in format_summary(found)


def test_the_printed_summary_is_the_references_block_then_our_lines() -> None:
    recorder = Recorder()
    hand_made_run(recorder)
    samples = [
        Sample(999.0, cpu_energy_j=0.0, gpu_energy_j=0.0),
        Sample(1001.0, cpu_energy_j=100.0, gpu_energy_j=200.0),
    ]
    summary = summarize(
        recorder, seqlens=[3], samples=samples, cpu_limit_gbps=40.0, predicted_step_us=20_000.0
    )
    text = format_summary(
        summary, conversations=[("Why?", "Because.")], notes=["GPU energy is sampled."]
    )
    assert text == REFERENCE_BLOCK + OWN_LINES


@pytest.mark.parametrize(("limit_gbps", "share"), [(24.0, "104%"), (20.0, None)])
def test_no_share_of_a_limit_that_was_exceeded(limit_gbps: float, share: str | None) -> None:
    """Experts that lie in a cache are read faster than memory, of which they are no share."""
    recorder = Recorder()
    hand_made_run(recorder)
    text = format_summary(summarize(recorder, cpu_limit_gbps=limit_gbps))
    (line,) = [one for one in text.splitlines() if one.startswith("CPU experts")]
    end = "" if share is None else f", {share} of this machine's {limit_gbps:.1f} GB/s"
    assert line == f"CPU experts: read 0.200 GB in decode at 25.0 GB/s{end}"


def test_hidden_responses_and_uneven_prompt_lengths() -> None:
    recorder = Recorder()
    hand_made_run(recorder)
    text = format_summary(summarize(recorder, seqlens=[3, 4, 6]))
    assert "AVG seqlen: 4.33\nseqlens: [3, 4, 6]\n\nCache hit 1: 100.0\n" in text
    assert "PROMPT:\n" not in text
    assert "GB/s," not in text  # no limit known
    assert "Energy" not in text


def test_without_layer_events_the_totals_are_still_printed() -> None:
    recorder = NullRecorder()
    hand_made_run(recorder)
    summary = summarize(recorder)
    assert (summary.prompt_tokens, summary.generated_tokens) == (3, 2)
    assert summary.decode_hits == HitCounts()
    text = format_summary(summary)
    assert "throughput: 40.00 t/s" in text
    # No hit rate: the layers' events would have counted the hits, and 0.0 need not be true.
    assert text.endswith("seqlens: [3]\n\nTTFT: median 600.0 ms\nTPOT: median 25.0 ms, p95 29.5 ms")


def test_an_empty_run_prints_zeros() -> None:
    text = format_summary(summarize(Recorder()))
    assert text.count("throughput: 0.00 t/s") == 2
    assert "AVG seqlen: 0\nseqlens: []" in text


def test_json_of_the_summary_is_plain() -> None:
    recorder = Recorder()
    hand_made_run(recorder)
    document = json.loads(json.dumps(summarize(recorder).to_json()))
    assert document["decode_hits"] == {
        "pairs": 2,
        "at_least_one": 2,
        "at_least_two": 1,
        "hits": 3,
        "misses": 1,
    }
    assert document["cache_hit_1_percent"] == 100.0
    assert document["ttft_s"] == [0.6]
    assert document["j_per_token"] is None


def test_energy_is_that_of_decode_steps_alone() -> None:
    """Constant 40 W and 100 W: joules per token are watts times the step, whatever lies between."""
    shape = Shape(prompt_lengths=(5, 7, 4), n_tokens=5)
    recorder = record_run(shape)
    summary = summarize(recorder, samples=sensor_samples())
    step_s = summary.generation_s / summary.generated_tokens
    assert summary.cpu_j_per_token == pytest.approx(40.0 * step_s, rel=1e-4)
    assert summary.gpu_j_per_token == pytest.approx(100.0 * step_s, rel=1e-4)


def test_a_counter_that_stands_still_is_no_energy() -> None:
    """Nothing is printed rather than 0.00 J/token, a claim that nobody measured."""
    samples = [Sample(START_UNIX_S + s, cpu_energy_j=7.0, gpu_energy_j=100.0 * s) for s in (0, 9)]
    summary = summarize(record_run(Shape()), samples=samples)
    assert summary.cpu_j_per_token is None
    assert summary.gpu_j_per_token is not None
    (line,) = [one for one in format_summary(summary).splitlines() if one.startswith("Energy")]
    assert (
        line == f"Energy: {summary.gpu_j_per_token:.2f} J/token (GPU {summary.gpu_j_per_token:.2f})"
    )
    assert summarize(record_run(Shape()), samples=samples[:1]).gpu_j_per_token is None


@pytest.mark.parametrize(
    "shape",
    [
        Shape(n_tokens=30),
        Shape(n_layers=5, n_indexes=4, top_k=4, n_tokens=12, prompt_lengths=(3, 9, 5)),
        Shape(prompt_lengths=(4, 6, 3), n_tokens=9, batch=2),
        Shape(n_indexes=0, n_ways=0),
    ],
)
def test_the_csv_files_alone_give_the_same_figures(tmp_path: Path, shape: Shape) -> None:
    recorder = record_run(shape)
    samples = sensor_samples()
    summary = summarize(recorder, seqlens=shape.prompt_lengths, samples=samples)
    write_reports(recorder, ReportPaths.in_folder(tmp_path), RunInfo(samples=samples), summary)
    reported = json.loads((tmp_path / "run.json").read_text())["summary"]
    for name, value in recompute(tmp_path).items():
        assert reported[name] == pytest.approx(value, rel=1e-6), name
