"""Random weights of known shapes with forced routing: the choices are the trace's, in its order."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_models import TINY_SHAPE

from moe_offload.commands import generate
from moe_offload.config import ModelOptions
from moe_offload.errors import UserError
from moe_offload.model import dummy
from moe_offload.model.dummy import ForcedRouting
from moe_offload.simulation import shapes as shapes_module
from moe_offload.simulation.shapes import load_shape
from moe_offload.simulation.trace_files import read_trace
from moe_offload.simulation.traces import Routing, RoutingPass, Trace, TraceInfo
from moe_offload.simulation.workload import even_workload


@pytest.fixture
def tiny_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    shapes = tmp_path / "shapes.yaml"
    shapes.write_text(yaml.safe_dump({"tiny": TINY_SHAPE}))
    monkeypatch.setattr(shapes_module, "SHAPES_FILE", shapes)
    return "tiny"


def write_trace(path: Path, ids: list[list[list[int]]]) -> None:
    """JSON lines: `ids[pass][layer]` are one token's experts."""
    header = {"routing_trace": 1, "model": "made", "n_layers": len(ids[0]), "top_k": 2}
    lines: list[dict[str, Any]] = [{**header, "n_experts": 6, "synthetic": True}]
    lines += [{"phase": "decode", "prompt": 0, "ids": [[k] for k in layers]} for layers in ids]
    path.write_text("\n".join(map(json.dumps, lines)))


@pytest.mark.parametrize("weight_format", ["bf16", "int8", "int4"])
def test_a_run_follows_its_trace(weight_format: str, tiny_shape: str, run_folder: Path) -> None:
    ids = [[[(t + layer) % 6, (t + layer + 3) % 6] for layer in range(3)] for t in range(5)]
    write_trace(run_folder / "trace.jsonl", ids)
    code = generate.main(
        [
            *("--dummy-weights", tiny_shape, "--dummy-format", weight_format, "--device", "cpu"),
            *("--routing-trace", str(run_folder / "trace.jsonl"), "--max-tokens", "9"),
            *("--cache-nblocks", "2", "--cache-nways", "2"),
        ]
    )
    assert code == 0
    written = read_trace(Path("expert_choices.csv"))
    decoded = [one.ids for one in written.passes if one.phase == "decode"]
    expected = [tuple((tuple(layer),) for layer in ids[t % 5]) for t in range(8)]
    assert decoded == expected
    notes = json.loads(Path("run.json").read_text())["notes"]
    assert any("the text is meaningless" in note for note in notes)


def test_every_shipped_shape_builds() -> None:
    for name in shapes_module.known_shapes():
        options = ModelOptions(None, dummy_shape=name, dummy_layers=2)
        source = dummy.DummyModel(options)
        assert len(source.layouts) in (1, 2)
        assert source.top_k < source.n_experts[0]


def test_published_sizes() -> None:
    """One expert in bf16, as the paper gives it: 352 MB for Mixtral, 157 MB for Phi-3.5-MoE."""
    for name, megabytes in (("mixtral-8x7b", 352), ("phi-3.5-moe", 157)):
        source = dummy.DummyModel(ModelOptions(None, dummy_shape=name, dummy_layers=1))
        assert source.layouts[0].block_bytes / 1e6 == pytest.approx(megabytes, abs=1)


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [
        ("mixtral-8x7b", 46.7, 12.9),  # Jiang et al., "Mixtral of Experts", table 1 and its text
        ("phi-3.5-moe", 41.9, 6.6),  # its model card
        ("qwen3-30b-a3b", 30.5, 3.3),  # its model card
        ("qwen3-235b-a22b", 235.0, 22.0),  # its model card
        ("gpt-oss-20b", 20.9, 3.6),  # its model card, table 1
        ("gpt-oss-120b", 116.8, 5.1),
        ("olmoe-1b-7b", 6.9, 1.3),  # Muennighoff et al., "OLMoE", table 1
        ("deepseek-v2-lite", 15.7, 2.4),  # DeepSeek-V2, appendix B
    ],
)
def test_shapes_have_the_published_numbers_of_parameters(name, billions, active) -> None:
    """Total, and those of one token, which some publish without embedding or head."""
    shape = load_shape(name)
    dense = shape.n_layers * shape.dense_weights_per_layer + shape.other_weights
    routed = shape.n_layers * shape.expert_weights
    assert (dense + shape.n_experts * routed) / 1e9 == pytest.approx(billions, rel=0.004, abs=0.05)
    vocabulary = yaml.safe_load(shapes_module.SHAPES_FILE.read_text())[name]["vocab_size"]
    embedding = vocabulary * shape.hidden / 1e9
    per_token = (dense + shape.top_k * routed) / 1e9
    # Rounded to one decimal, and with or without the embedding that a token looks up.
    assert per_token - embedding - 0.06 < active < per_token + 0.06


def test_unknown_shape_and_foreign_trace_are_sentences(
    tiny_shape: str, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main(["--dummy-weights", "gpt-9", "--max-tokens", "2"]) == 2
    assert "expected one of the shapes tiny" in capsys.readouterr().err
    write_trace(run_folder / "trace.jsonl", [[[0, 1]]])  # one layer only
    trace = str(run_folder / "trace.jsonl")
    arguments = ["--dummy-weights", tiny_shape, "--routing-trace", trace, "--max-tokens", "2"]
    assert generate.main(arguments) == 2
    assert "use a trace of this shape" in capsys.readouterr().err


def test_batches_take_consecutive_tokens() -> None:
    trace = even_workload(1, 6, 2, overlap=0.3).generate(7, seed=1)
    tokens = [one.ids[0][0] for one in trace.passes]
    routing = ForcedRouting(trace, 1, 6, 2)
    seen = []
    for _ in range(3):
        routing.begin_pass(decode=True, n_tokens=2)
        index, weights = routing.choose(0, torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2))
        seen += [tuple(row) for row in index.tolist()]
        assert (weights == 0.5).all()
    assert seen == [tokens[i % 7] for i in range(6)]


def test_a_trace_of_another_top_k_is_refused() -> None:
    trace = Trace(TraceInfo("other", 1, 3, 6), Routing([RoutingPass("decode", (((0, 1, 2),),))]))
    with pytest.raises(UserError, match="top-3"):
        ForcedRouting(trace, 1, 6, 2)


def cut_trace(n_tokens: int) -> Trace:
    """Top-2 of 6 where the model computes 4; expert 5 is the favourite of what is kept."""
    passes = [RoutingPass("prefill", (((0, 5), (1, 5)), ((5, 2),)))]
    passes += [RoutingPass("decode", (((t % 5, 5),), ((5, t % 5),))) for t in range(n_tokens)]
    return Trace(TraceInfo("cut", 2, 2, 6), Routing(passes))


def choices(routing: ForcedRouting, layer: int, n_tokens: int) -> list[list[int]]:
    routing.begin_pass(decode=True, n_tokens=n_tokens)
    shape = (n_tokens, 4)
    return routing.choose(layer, torch.zeros(shape, dtype=torch.int64), torch.ones(shape))[
        0
    ].tolist()


def test_a_cut_trace_is_filled_and_says_so() -> None:
    trace = cut_trace(200)
    routing = ForcedRouting(trace, 2, 6, 4, seed=3)
    (note,) = routing.notes
    assert "2 of each token's 4 experts: the other 2 are drawn" in note and "seed 3" in note
    tokens = choices(routing, 0, 200)
    decoded = [one.ids[0][0] for one in trace.passes if one.phase == "decode"]
    assert [tuple(token[:2]) for token in tokens] == decoded  # the kept ones, first
    assert all(len(set(token)) == 4 for token in tokens)
    assert {e for token in tokens for e in token[2:]} == {0, 1, 2, 3, 4}
    assert tokens == choices(ForcedRouting(trace, 2, 6, 4, seed=3), 0, 200)
    assert tokens != choices(ForcedRouting(trace, 2, 6, 4, seed=4), 0, 200)


def test_missing_choices_are_drawn_by_popularity() -> None:
    ids = [(0, 1)] * 90 + [(2, 3)] * 10  # 4 and 5 never; of (0, 1)'s tokens 2 or 3 must follow
    trace = Trace(
        TraceInfo("cut", 1, 2, 6), Routing(RoutingPass("decode", ((token,),)) for token in ids)
    )
    tokens = choices(ForcedRouting(trace, 1, 6, 4), 0, 100)
    drawn = Counter(e for token in tokens[90:] for e in token[2:])
    assert drawn[0] + drawn[1] >= 17  # 181 to 1 against each unseen expert
    drawn = Counter(e for token in tokens[:90] for e in token[2:])
    assert drawn[2] + drawn[3] > 3 * (drawn[4] + drawn[5])


def test_experts_beyond_a_byte_are_forced_too() -> None:
    passes = Routing(RoutingPass("decode", (((t, 300 + t),),)) for t in range(5))
    routing = ForcedRouting(Trace(TraceInfo("wide", 1, 2, 512), passes), 1, 512, 2)
    routing.begin_pass(decode=True, n_tokens=5)
    index, _ = routing.choose(0, torch.zeros(5, 2, dtype=torch.int64), torch.ones(5, 2))
    assert index.dtype == torch.int64 and index.tolist() == [[t, 300 + t] for t in range(5)]
    assert routing.notes == []


def test_a_run_on_a_cut_trace_notes_it(tiny_shape: str, run_folder: Path) -> None:
    path = run_folder / "cut.jsonl"
    header = {"routing_trace": 1, "model": "cut", "n_layers": 3, "top_k": 1, "n_experts": 6}
    one = {"phase": "decode", "prompt": 0, "ids": [[[4]], [[5]], [[0]]]}
    path.write_text(f"{json.dumps(header)}\n{json.dumps(one)}\n")
    arguments = ["--dummy-weights", tiny_shape, "--device", "cpu", "--max-tokens", "4"]
    assert generate.main([*arguments, "--routing-trace", str(path)]) == 0
    tokens = [one.ids for one in read_trace(Path("expert_choices.csv")).passes if one.ids]
    assert all(len(set(token)) == 2 for ids in tokens for (token,) in ids)
    assert {(layer[0][0]) for ids in tokens for layer in ids} == {4, 5, 0}
    notes = json.loads(Path("run.json").read_text())["notes"]
    assert any("1 of each token's 2 experts" in note for note in notes)
