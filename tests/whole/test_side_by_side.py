"""The comparison with other programs: its models, what it reads from them, what it computes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from against_transformers import greedy, prepared
from cpu_oracle import unpack_block

from benchmarks import llama_bench, side_by_side
from benchmarks.llama_bench import Peer, Work
from benchmarks.our_engine import between_kernels_us
from benchmarks.random_gguf import n_bytes, weights_per_token, write_random_gguf
from benchmarks.side_by_side import FORMATS, Row, Timed
from moe_offload.checkpoint.prepared import read_block, read_manifest
from moe_offload.engine.loading import load_model
from moe_offload.errors import UserError

_COMMON = {
    "vocab_size": 40,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": _COMMON | {"model_type": "mixtral", "intermediate_size": 96, "num_local_experts": 4},
    "qwen3": _COMMON
    | {"model_type": "qwen3_moe", "intermediate_size": 96, "moe_intermediate_size": 64}
    | {"num_experts": 6, "head_dim": 64},
}


@pytest.mark.parametrize(
    ("model", "weight_format"), [("mixtral", "bf16"), ("mixtral", "int4"), ("qwen3", "int8")]
)
def test_the_file_is_the_prepared_model(model: str, weight_format: str, tmp_path: Path) -> None:
    """Equal experts, as the gguf package reads them; and the model counts."""
    config = CONFIGS[model]
    path = tmp_path / "model.gguf"
    write_random_gguf(path, config, FORMATS[weight_format])
    folder = prepared(path, tmp_path / "prepared", "--dense-dtype", weight_format)
    manifest = read_manifest(folder)
    assert manifest.weight_format == weight_format
    tensors = {one.name: one for one in gguf.GGUFReader(path).tensors}

    def matrix(layer: int, name: str) -> torch.Tensor:
        stored = tensors[f"blk.{layer}.ffn_{name}_exps.weight"]
        return torch.from_numpy(np.array(gguf.dequantize(stored.data, stored.tensor_type)))

    for number, layer in enumerate(manifest.moe_layers):
        gate, up, down = (matrix(number, name) for name in ("gate", "up", "down"))
        for expert in range(layer.n_experts):
            block = torch.empty(layer.layout.block_bytes, dtype=torch.uint8)
            read_block(layer, expert, block)
            found = unpack_block(layer.layout, block)
            assert torch.equal(found["gate_up"], torch.cat((gate[expert], up[expert])))
            assert torch.equal(found["down"], down[expert])
    assert greedy(load_model(folder, device="cpu"), [[5, 20]], 10) == [[*range(21, 31)]]


def test_weights_are_counted() -> None:
    """By hand: attention, router, two of four experts and head of one token; all of the file."""
    config = CONFIGS["mixtral"]
    layer = 128 * (128 + 64 + 64 + 128) + 4 * 128 + 2 * 3 * 128 * 96
    assert weights_per_token(config) == (2 * layer, 40 * 128)
    assert n_bytes(config, "bf16") == 2 * (2 * (layer + 2 * 3 * 128 * 96) + 2 * 40 * 128)


PROMPT, DECODE = Work("prompt", 64), Work("decode", 64)


def test_commands_of_both_kinds() -> None:
    """ik_llama.cpp takes all in one command, llama.cpp one for each: its depth is of all tests."""
    (ik,) = Peer(Path("bench"), is_ik=True).commands(Path("m"), [PROMPT, DECODE], 2, 3)
    assert " ".join(ik) == (
        "bench -m m -t 2 -r 3 -o json -fa 1 -fmoe 1 -rtr 1 -n 0 -p 64 -gp 64,64"
    )
    plain = Peer(Path("bench"), is_ik=False)
    both = [" ".join(one) for one in plain.commands(Path("m"), [PROMPT, DECODE], 2, 3)]
    common = "bench -m m -t 2 -r 3 -o json -fa 1"
    assert both == [f"{common} -n 0 -p 64", f"{common} -p 0 -n 64 -d 64"]
    assert len(plain.commands(Path("m"), [PROMPT], 2, 3)) == 1


@pytest.mark.parametrize("depth", [{}, {"n_depth": 64}])
def test_llama_bench_is_read(depth: dict[str, int]) -> None:
    tests = [
        {"n_prompt": 64, "n_gen": 0, "samples_ts": [30.0, 32.0, 40.0]},
        {"n_prompt": 0 if depth else 64, "n_gen": 64, "samples_ts": [8.0]} | depth,
    ]
    found = llama_bench.parse_seconds("noise\n" + json.dumps(tests), [PROMPT, DECODE])
    assert found == {PROMPT: 2.0, DECODE: 8.0}


@pytest.mark.parametrize("text", ["", "no JSON", "[]", '[{"n_prompt": 64}]', "[1]"])
def test_other_output_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="expected llama-bench to print its tests as JSON"):
        llama_bench.parse_seconds(text, [PROMPT])


def test_ratios_are_of_full_depth_and_within_rounds() -> None:
    """By hand: 4 layers, measured at 1 and 2. Ours takes 1 s and 2 a layer, later twice that."""
    row = Row("m", "int4", PROMPT, (1, 2), 4)
    row.ours = [Timed(3.0, 5.0), Timed(6.0, 10.0), Timed(3.0, 5.0)]
    row.peers = {"peer": [Timed(3.0, 8.0), Timed(6.0, 16.0), Timed(3.0, 5.0)]}
    row.limit_s = [4.5, 9.0, 9.0]
    assert row.full_s(row.ours) == [9.0, 18.0, 9.0]
    assert row.full_s(row.peers["peer"]) == [18.0, 36.0, 9.0]
    ratio = row.ratios()["peer"]
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 1.0, 2.0)
    assert row.layer_ms(row.ours).median == 2000.0
    assert row.speed(row.ours).median == 64 / 9
    limit = row.percent_of_limit()
    assert limit is not None and limit.low == 50.0
    document = row.to_json()
    assert document["ratio"]["peer"]["median"] == 2.0
    assert "2.00x [1.00, 2.00]" in row.line()


def test_a_disturbed_round_does_not_count() -> None:
    row = Row("m", "int4", DECODE, (1, 2), 2)
    row.ours = [Timed(1.0, 2.0), Timed(1.0, 2.0)]
    row.peers = {"peer": [Timed(5.0, 4.0), Timed(1.0, 3.0)]}
    row.limit_s = [1.0, 1.0]
    assert row.steady == [1]
    assert row.ratios()["peer"].median == 1.5
    assert "1 disturbed rounds left out" in row.line()


def test_the_time_between_kernels_is_each_layers() -> None:
    """By hand, in seconds: two gaps of 1 and 2 in the second layer, one of 4 in the third."""
    step = [("norm", 0, 1), ("run", 5, 6), ("norm", 7, 8), ("run", 10, 11), ("run", 15, 16)]
    assert between_kernels_us([*step, ("head", 20, 21)]) == [3e6, 4e6]
    assert between_kernels_us([]) == []


def test_what_is_no_llama_bench_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="to be a llama-bench, but"):
        llama_bench.find_peer(tmp_path / "missing")
    with pytest.raises(UserError, match="names no --n-prompt"):
        llama_bench.find_peer(Path(sys.executable))


def test_a_model_that_does_not_fit_is_left_out(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it needs 1000001\.1 GB of memory, .* GB are available"):
        side_by_side.require_room(10**15, tmp_path, 0)
    with pytest.raises(UserError, match=r"it needs 1000000\.0 GB of disk"):
        side_by_side.require_room(0, tmp_path, 10**15)
