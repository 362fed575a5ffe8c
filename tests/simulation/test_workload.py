"""Synthetic routing: seeded, labelled, as repetitive as was asked for."""

import pytest
from written_trace import write_trace

from moe_offload.simulation.trace_files import read_trace
from moe_offload.simulation.workload import even_workload, lag_overlap, typical_workload


def decoded(trace, layer: int) -> list[tuple[int, ...]]:
    return [one.ids[layer][0] for one in trace.passes if one.phase == "decode"]


def test_the_seed_decides_and_layers_are_apart():
    workload = even_workload(3, 8, 2, overlap=0.4)
    assert workload.generate(20, seed=1) == workload.generate(20, seed=1)
    assert workload.generate(20, seed=1) != workload.generate(20, seed=2)
    trace = workload.generate(20, seed=1)
    assert decoded(trace, 0) != decoded(trace, 1)
    fewer = even_workload(2, 8, 2, overlap=0.4).generate(20, seed=1)
    assert [decoded(fewer, layer) for layer in (0, 1)] == [decoded(trace, n) for n in (0, 1)]


def test_prompt_and_decode_are_one_sequence():
    workload = even_workload(2, 8, 2, overlap=0.4)
    whole = workload.generate(30)
    split = workload.generate(20, n_prompt_tokens=10)
    assert split.passes[0].phase == "prefill" and len(split.passes) == 21
    for layer in range(2):
        tokens = [*split.passes[0].ids[layer], *decoded(split, layer)]
        assert tokens == decoded(whole, layer)


def test_it_says_that_it_is_synthetic_also_on_disk(tmp_path):
    trace = even_workload(2, 4, 1).generate(3)
    assert trace.info.synthetic and trace.info.model.startswith("synthetic")
    write_trace(tmp_path / "t.jsonl", trace.info, trace.passes)
    again = read_trace(tmp_path / "t.jsonl")
    assert again == trace and "synthetic" in again.info.notes[0]


@pytest.mark.parametrize(("n_experts", "top_k"), [(8, 2), (64, 8), (4, 4)])
@pytest.mark.parametrize("overlap", [0.3, 0.6])
def test_overlap_is_what_was_asked_for(n_experts, top_k, overlap):
    trace = even_workload(1, n_experts, top_k, overlap).generate(3000, seed=7)
    tokens = decoded(trace, 0)
    assert all(len(set(token)) == top_k for token in tokens)
    reached = lag_overlap(tokens, 1)
    if top_k == n_experts:
        assert reached == 1  # every expert every time
    else:
        assert reached == pytest.approx(max(overlap, top_k / n_experts), abs=0.04)


def test_many_experts_are_taken_to_be_reused_more():
    few, many = typical_workload(1, 8, 2), typical_workload(1, 128, 8)
    reuse = [
        lag_overlap(decoded(w.generate(2000), 0), 1) - w.top_k / w.n_experts for w in (few, many)
    ]
    assert 0.04 < reuse[0] < 0.14 < reuse[1] < 0.32
