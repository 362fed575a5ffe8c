"""Random weights of known shapes with forced routing: the choices are the trace's, in its order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import dummy_model
import main
from errors import UserError
from forced_routing import ForcedRouting
from traces import RoutingPass, Trace, TraceInfo, read_trace
from workload import even_workload

TINY_SHAPE = {
    "model_type": "qwen3_moe",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
}


@pytest.fixture
def tiny_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    shapes = tmp_path / "shapes.yaml"
    shapes.write_text(yaml.safe_dump({"tiny": TINY_SHAPE}))
    monkeypatch.setattr(dummy_model, "SHAPES_PATH", shapes)
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
    code = main.main(
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
    for name in dummy_model.shape_names():
        options = main.ModelOptions(None, dummy_shape=name, dummy_layers=2)
        source = dummy_model.DummyModel(options)
        assert len(source.layouts) in (1, 2)
        assert source.top_k < source.n_experts[0]


def test_published_sizes() -> None:
    """One expert in bf16, as the paper gives it: 352 MB for Mixtral, 157 MB for Phi-3.5-MoE."""
    for name, megabytes in (("mixtral-8x7b", 352), ("phi-3.5-moe", 157)):
        source = dummy_model.DummyModel(main.ModelOptions(None, dummy_shape=name, dummy_layers=1))
        assert source.layouts[0].block_bytes / 1e6 == pytest.approx(megabytes, abs=1)


def test_unknown_shape_and_foreign_trace_are_sentences(
    tiny_shape: str, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["--dummy-weights", "gpt-9", "--max-tokens", "2"]) == 2
    assert "choose one of tiny" in capsys.readouterr().err
    write_trace(run_folder / "trace.jsonl", [[[0, 1]]])  # one layer only
    trace = str(run_folder / "trace.jsonl")
    arguments = ["--dummy-weights", tiny_shape, "--routing-trace", trace, "--max-tokens", "2"]
    assert main.main(arguments) == 2
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
    trace = Trace(TraceInfo("other", 1, 3, 6), (RoutingPass("decode", (((0, 1, 2),),)),))
    with pytest.raises(UserError, match="top-3"):
        ForcedRouting(trace, 1, 6, 2)
