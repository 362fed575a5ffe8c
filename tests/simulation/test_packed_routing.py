"""Packed routing against the tuples it stands for."""

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_offload.simulation.traces import (
    NEVER,
    PackedRouting,
    RoutingPass,
    collected,
    packed,
)


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
def test_what_is_packed_comes_back(passes):
    routing = PackedRouting(passes)
    assert list(routing) == passes and list(routing) == passes  # any number of times
    assert len(routing) == len(passes)
    assert list(pickle.loads(pickle.dumps(routing))) == passes
    ids = [e for one in passes for tokens in one.ids for token in tokens for e in token]
    assert (routing.n_ids, routing.highest) == (len(ids), max(ids, default=-1))
    decoded = [one for one in passes if one.phase == "decode"]
    assert routing.n_decoded == sum(len(one.ids[0]) for one in decoded)
    assert packed(routing) is routing


@settings(max_examples=200, deadline=None)
@given(passes=routings(), data=st.data())
def test_the_next_use_is_the_first_place_that_holds_the_expert(passes, data):
    routing = PackedRouting(passes)
    decoded = [one for one in passes if one.phase == "decode"]
    if not decoded:
        return
    layer = data.draw(st.integers(0, len(decoded[0].ids) - 1))
    ids = [e for one in decoded for token in one.ids[layer] for e in token]
    expert = data.draw(st.one_of(st.sampled_from(ids), st.integers(0, routing.highest)))
    place = data.draw(st.integers(0, len(ids)))
    expected = ids.index(expert, place) if expert in ids[place:] else NEVER
    assert routing.next_use(layer, expert, place) == expected


def test_few_ids_stay_tuples_and_many_are_packed(monkeypatch):
    passes = (RoutingPass("decode", (((0, 1),), ((2, 3),))),) * 3
    assert collected(iter(passes)) == passes
    monkeypatch.setattr("moe_offload.simulation.traces.MAX_TUPLE_IDS", 11)
    many = collected(iter(passes))
    assert isinstance(many, PackedRouting) and tuple(many) == passes


def test_a_token_of_another_top_k_is_our_mistake():
    routing = PackedRouting([RoutingPass("decode", (((0, 1),),))])
    with pytest.raises(AssertionError):
        routing.append(RoutingPass("decode", (((0, 1, 2),),)))
