"""A new user's check: twenty prompts with a cache, the figures, the summary from the CSVs alone."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

import pytest
from against_transformers import prepared
from demo_model import demo_prepared
from plotted import is_drawn
from recomputed_summary import first_tokens_s, recompute
from tiny_models import write_mixtral_with_tokenizer

from moe_offload.commands import draw, generate
from moe_offload.simulation.trace_files import read_trace

ROOT = Path(__file__).resolve().parents[2]
N_PROMPTS, N_WAYS, MAX_TOKENS = 20, 3, 8


@dataclass(frozen=True)
class Run:
    folder: Path
    printed: str
    n_indexes: int

    def summary(self) -> dict[str, float]:
        document: dict[str, dict[str, float]] = json.loads((self.folder / "run.json").read_text())
        return document["summary"]

    def rows(self, name: str) -> list[dict[str, str]]:
        with (self.folder / name).open(newline="") as file:
            return list(csv.DictReader(file))


@pytest.fixture(scope="module", params=["demo, one at a time", "random, batches of 3"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("evidence")
    if request.param.startswith("demo"):
        model, n_indexes, batch_size = demo_prepared(folder), 3, 1
    else:
        source = write_mixtral_with_tokenizer(folder / "hub", max_position_embeddings=256)
        model, n_indexes, batch_size = prepared(source, folder / "prepared", "--hf"), 1, 3
    arguments = [
        *("--model-path", model, "--prompt-path", ROOT / "prompts.txt", "--n-prompts", N_PROMPTS),
        *("--max-tokens", MAX_TOKENS, "--cache-nblocks", n_indexes, "--cache-nways", N_WAYS),
        *("--batch-size", batch_size, "--hide-resp", "--output-dir", folder / "run"),
        *("--responses-jsonl", folder / "run" / "responses.jsonl"),
    ]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert generate.main([str(argument) for argument in arguments]) == 0
    return Run(folder / "run", printed.getvalue(), n_indexes)


def test_the_csv_files_alone_give_the_summary(run: Run) -> None:
    summary = run.summary()
    figures = recompute(run.folder)
    for name, value in figures.items():
        assert summary[name] == pytest.approx(value, rel=1e-5), name
    assert f"Cache hit 1: {figures['cache_hit_1_percent']:.1f}\n" in run.printed
    assert f"\n Cache hit 2: {figures['cache_hit_2_percent']:.1f}\n" in run.printed
    printed_tps = [float(tps) for tps in re.findall(r"throughput: ([\d.]+) t/s", run.printed)]
    assert printed_tps[1] == pytest.approx(figures["generation_throughput"], abs=0.01)
    assert figures["cache_hit_1_percent"] > 0
    lengths = re.search(r"^AVG seqlen: ([\d.]+)\nseqlens: (\[.*\])$", run.printed, re.MULTILINE)
    assert lengths is not None
    seqlens = json.loads(lengths[2])
    assert len(seqlens) == N_PROMPTS
    assert sum(seqlens) == figures["prompt_tokens"]  # padding of a batch is not counted
    assert float(lengths[1]) == pytest.approx(sum(seqlens) / N_PROMPTS, abs=0.01)


def test_the_times_to_first_token_are_the_prompts(run: Run) -> None:
    first_s = first_tokens_s(run.folder)
    assert len(first_s) == N_PROMPTS
    assert run.summary()["ttft_s"] == pytest.approx(first_s, abs=1e-6)
    printed = re.search(r"^TTFT: median ([\d.]+) ms$", run.printed, re.MULTILINE)
    assert printed is not None
    assert float(printed[1]) == pytest.approx(statistics.median(first_s) * 1e3, abs=0.06)
    # A prompt's evaluation is the most of it, and choosing the token the rest.
    prefill_s = {
        int(row["Prompt"]): float(row["step_ms"]) / 1e3
        for row in run.rows("out.csv")
        if row["phase"] == "prefill"
    }
    for prompt, time_s in enumerate(first_s):
        assert time_s >= prefill_s[max(first for first in prefill_s if first <= prompt)] - 1e-6


def test_hits_and_misses_are_all_choices_of_cached_layers(run: Run) -> None:
    hits = {"prefill": 0, "decode": 0}
    for row in run.rows("cache.csv"):
        choices = int(row["Tokens"]) * run.n_indexes * 2
        assert int(row["Hits"]) + int(row["Misses"]) == choices
        hits[row["Phase"]] += int(row["Hits"])
    assert min(hits.values()) > 0  # a prompt finds what the one before it left


def test_the_parts_of_a_step_add_up(run: Run) -> None:
    """Within 5%: what the layers do not account for is embeddings, head and the loop itself."""
    n_layers = sum(name.startswith("Block_") for name in run.rows("cache.csv")[0])
    parts = ("attn", "router", "plan", "ffn_compute", "ffn_comm")
    for row in run.rows("out.csv"):
        in_layers_ms = sum(float(row[part]) for part in parts) * n_layers
        total_ms = in_layers_ms + float(row["rest_ms"])
        assert total_ms == pytest.approx(float(row["step_ms"]), rel=0.05)
        assert float(row["rest_ms"]) >= 0  # no time was counted twice


def test_the_predicted_step_without_a_cache_follows_from_the_calibration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every layer pays its rest, a call, each chosen expert with one token; a step its head."""
    source = write_mixtral_with_tokenizer(tmp_path / "hub", max_position_embeddings=256)
    model = prepared(source, tmp_path / "prepared", "--hf")
    arguments = ["--model-path", model, "--prompt", "Hello", "--max-tokens", 5]
    assert generate.main([str(one) for one in [*arguments, "--output-dir", tmp_path]]) == 0
    document = json.loads((tmp_path / "run.json").read_text())
    costs = document["calibration"]["costs"]
    (n_tokens, one_token_us), *_ = costs["cpu"]["few"]
    assert n_tokens == 1
    with (tmp_path / "expert_choices.csv").open(newline="") as file:
        chosen = [name for name in next(csv.reader(file)) if name.startswith("Block_")]
    n_layers, top_k = len(set(chosen)), len(chosen) // len(set(chosen))
    layer_us = costs["dense_us_per_layer"] + costs["cpu"]["call_us"] + top_k * one_token_us
    expected_ms = (n_layers * layer_us + costs["step_us"]) / 1e3
    assert document["summary"]["predicted_step_ms"] == pytest.approx(expected_ms)
    assert f"of one short sequence: {expected_ms:.2f} ms, measured" in capsys.readouterr().out


def test_every_prompt_has_its_rows(run: Run) -> None:
    every = {str(prompt) for prompt in range(N_PROMPTS)}
    tokens = run.rows("token_gen_time.csv")
    assert {row["Prompt"] for row in tokens} == every
    assert {row["Prompt"] for row in run.rows("expert_choices.csv")} == every
    assert len(tokens) == run.summary()["generated_tokens"]
    decoded = [row for row in run.rows("expert_choices.csv") if row["Block_0"]]
    assert len(decoded) == len(tokens)  # a row per sequence and step


def test_our_own_reader_takes_the_choices(run: Run) -> None:
    trace = read_trace(run.folder / "expert_choices.csv")
    decode = [one for one in trace.passes if one.phase == "decode"]
    assert len(decode) == sum(row["phase"] == "decode" for row in run.rows("out.csv"))
    assert sum(len(one.ids[0]) for one in decode) == run.summary()["generated_tokens"]
    assert trace.info.top_k == 2


def test_the_figures_are_drawn(run: Run) -> None:
    assert draw.plots([str(run.folder)]) == 0
    for name in ("breakdown", "tokens", "hits", "experts"):
        assert is_drawn(run.folder / f"figures/{name}.png")
    choices = run.folder / "expert_choices.csv"
    assert draw.patterns([str(choices), "--output-dir", str(run.folder / "figures")]) == 0
    assert is_drawn(run.folder / "figures/patterns.png")
