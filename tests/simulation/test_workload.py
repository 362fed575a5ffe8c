"""Synthetic routing: seeded, labelled, as popular and as repetitive as what it was fitted to."""

import json
from collections import Counter

import pytest

from moe_offload.errors import UserError
from moe_offload.experts.cache import ExpertCache, make_policy
from moe_offload.simulation.replay import replay
from moe_offload.simulation.trace_files import read_trace
from moe_offload.simulation.traces import write_trace
from moe_offload.simulation.workload import (
    Workload,
    even_workload,
    fit_workload,
    lag_overlap,
    popularity_workload,
    typical_workload,
    with_overlap,
)


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


def test_popularity_is_kept():
    workload = Workload("w", 1, ((6.0, 3.0, 1.0, 0.0001),), (0.0,))
    workload = with_overlap(workload, [0.7])
    counts = Counter(expert for (expert,) in decoded(workload.generate(8000, seed=3), 0))
    shares = [counts[e] / 8000 for e in range(4)]
    assert shares == pytest.approx([0.6, 0.3, 0.1, 0.0], abs=0.05)


def test_a_fit_resembles_its_source():
    popularity = tuple(tuple(1 / (1 + (e + layer) % 16) for e in range(16)) for layer in range(4))
    source = Workload("source", 2, popularity, (0.4,) * 4, memory_tokens=4.0).generate(800, seed=5)
    made = fit_workload(source).generate(800, seed=6)
    for lag, margin in ((1, 0.04), (8, 0.06)):
        overlaps = [
            sum(lag_overlap(decoded(trace, layer), lag) for layer in range(4)) / 4
            for trace in (source, made)
        ]
        assert overlaps[1] == pytest.approx(overlaps[0], abs=margin)
    hits = [
        replay(trace.passes, ExpertCache(4, 6, make_policy("LRU"))).decode.rates()[2]
        for trace in (source, made)
    ]
    assert hits[1] == pytest.approx(hits[0], abs=5)


def test_published_popularity(tmp_path):
    path = tmp_path / "model.popularity.json"
    path.write_text(json.dumps({"expert_popularity": [[5, 1, 1, 1], [1, 1, 1, 5]]}))
    trace = popularity_workload(path, top_k=1, overlap=0.5).generate(600)
    assert trace.info.synthetic and trace.info.model == "synthetic model"
    assert Counter(decoded(trace, 0)).most_common(1)[0][0] == (0,)
    assert Counter(decoded(trace, 1)).most_common(1)[0][0] == (3,)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[", "found Expecting value"),
        ("{}", "found no such entry; give"),
        ("[1]", "found no such entry; give"),
        ('{"c4": 1, "math": 2}', "found no such entry beside c4, math; give"),
        ('{"expert_popularity": 3}', "not iterable; give"),
        ('{"expert_popularity": [[1, 2], [1]]}', "as many experts in every layer"),
        ("[" * 100_000, "found maximum recursion depth"),
    ],
    ids=lambda text: text[:20],
)
def test_a_popularity_file_that_is_none_is_a_sentence(tmp_path, text, found):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(UserError, match=found):
        popularity_workload(tmp_path / "p.json", 2)


def test_many_experts_are_taken_to_be_reused_more():
    few, many = typical_workload(1, 8, 2), typical_workload(1, 128, 8)
    reuse = [
        lag_overlap(decoded(w.generate(2000), 0), 1) - w.top_k / len(w.popularity[0])
        for w in (few, many)
    ]
    assert 0.04 < reuse[0] < 0.14 < reuse[1] < 0.32
