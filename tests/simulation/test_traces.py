"""Routing in bytes against the tuples it stands for."""

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_offload.simulation.traces import NEVER, Routing, RoutingPass, Trace, TraceInfo


@st.composite
def routings(draw: st.DrawFn) -> list[RoutingPass]:
    n_layers, top_k = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    most = draw(st.sampled_from([4, 255, 256, 700, 65535]))
    token = st.lists(st.integers(0, most), min_size=top_k, max_size=top_k).map(tuple)

    def layers(counts: list[int]) -> tuple[tuple[tuple[int, ...], ...], ...]:
        return tuple(tuple(draw(token) for _ in range(n)) for n in counts)

    passes = []
    for number in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(["token", "batch", "prompt", "unknown"]))
        if kind == "unknown":
            passes.append(RoutingPass("prefill", (), number))
        elif kind == "prompt":
            counts = [draw(st.integers(1, 4)) for _ in range(n_layers)]
            waited = tuple(draw(token) for _ in range(n_layers)) if draw(st.booleans()) else ()
            passes.append(RoutingPass("prefill", layers(counts), number, waited))
        else:
            n_tokens = 1 if kind == "token" else draw(st.integers(1, 4))
            passes.append(RoutingPass("decode", layers([n_tokens] * n_layers), number))
    return passes


@settings(max_examples=200, deadline=None)
@given(passes=routings())
def test_what_is_held_comes_back(passes):
    routing = Routing(passes)
    assert list(routing) == passes and list(routing) == passes  # any number of times
    assert len(routing) == len(passes) and routing[-1] == passes[-1]
    assert pickle.loads(pickle.dumps(routing)) == routing == Routing(routing)
    ids = [e for one in passes for tokens in one.ids for token in tokens for e in token]
    assert routing.highest == max(ids, default=-1)
    decoded = [one for one in passes if one.phase == "decode"]
    assert routing.n_decoded == sum(len(one.ids[0]) for one in decoded)
    for layer in range(len(decoded[0].ids) if decoded else 0):
        of_layer = [list(token) for one in decoded for token in one.ids[layer]]
        assert routing.decoded(layer).tolist() == of_layer
        prompts = [one.ids[layer] for one in passes if one.phase == "prefill" and one.ids]
        of_layer = [list(token) for tokens in prompts for token in tokens]
        assert routing.prompted(layer).tolist() == of_layer


@settings(max_examples=200, deadline=None)
@given(passes=routings(), data=st.data())
def test_the_next_use_is_the_first_place_that_holds_the_expert(passes, data):
    routing = Routing(passes)
    decoded = [one for one in passes if one.phase == "decode"]
    if not decoded:
        return
    layer = data.draw(st.integers(0, len(decoded[0].ids) - 1))
    ids = [e for one in decoded for token in one.ids[layer] for e in token]
    expert = data.draw(st.one_of(st.sampled_from(ids), st.integers(0, routing.highest)))
    place = data.draw(st.integers(0, len(ids)))
    expected = ids.index(expert, place) if expert in ids[place:] else NEVER
    assert routing.next_use(layer, expert, place) == expected


def test_an_expert_that_two_tokens_of_a_batch_chose_counts_once():
    passes = [
        RoutingPass("prefill", (((0, 1),), ((0, 1),))),
        RoutingPass("decode", (((0, 1), (1, 2)), ((0, 1), (0, 1)))),
        RoutingPass("decode", (((0, 300),), ((5, 1),))),
    ]
    trace = Trace(TraceInfo("t", n_layers=2, top_k=2, n_experts=301), Routing(passes))
    assert trace.n_chosen == 3 + 2 + 2 + 2


def test_a_token_of_another_top_k_is_our_mistake():
    with pytest.raises(AssertionError):
        Routing([RoutingPass("decode", (((0, 1),),)), RoutingPass("decode", (((0, 1, 2),),))])
