"""Reuse and its chance values against brute force, and the script's table, files and refusals."""

from __future__ import annotations

import csv
import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from plotted import is_drawn
from written_trace import write_trace

from moe_offload.commands import draw
from moe_offload.errors import UserError
from moe_offload.report.patterns import (
    Reuse,
    analyse,
    chance_common_expert,
    chance_share_all,
    chance_share_one,
    draw_patterns,
)
from moe_offload.simulation.traces import Routing, RoutingPass, Trace, TraceInfo

Token = Sequence[Sequence[int]]  # [layer][k]


def trace_of(
    tokens: Sequence[Token], n_experts: int = 8, prompts: Sequence[int] | None = None
) -> Trace:
    """A trace of one-row decode passes."""
    passes = Routing(
        RoutingPass(
            "decode", tuple((tuple(ids),) for ids in token), 0 if prompts is None else prompts[t]
        )
        for t, token in enumerate(tokens)
    )
    info = TraceInfo("made up", len(tokens[0]), len(tokens[0][0]), n_experts)
    return Trace(info, passes)


def by_name(reuses: Sequence[Reuse]) -> dict[str, Reuse]:
    return {reuse.name: reuse for reuse in reuses}


@pytest.mark.parametrize(("E", "K"), [(4, 1), (4, 2), (5, 3), (6, 2)])
def test_chance_is_what_counting_all_sets_gives(E: int, K: int) -> None:
    sets = [frozenset(chosen) for chosen in itertools.combinations(range(E), K)]
    pairs = list(itertools.product(sets, repeat=2))
    assert chance_share_all(E, K) == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    assert chance_share_one(E, K) == pytest.approx(sum(bool(a & b) for a, b in pairs) / len(pairs))
    for n_sets in (2, 3, 4):
        if len(sets) ** n_sets < 20000:
            groups = list(itertools.product(sets, repeat=n_sets))
            common = sum(bool(frozenset.intersection(*group)) for group in groups) / len(groups)
            assert chance_common_expert(E, K, n_sets) == pytest.approx(common)


def test_the_figures_that_mislead() -> None:
    """At top-2 of 8, chance alone shares an expert 46.4% of the time and a pair of them 3.6%."""
    assert chance_share_one(8, 2) == pytest.approx(0.464, abs=5e-4)
    assert chance_share_all(8, 2) == pytest.approx(1 / 28)


def test_a_hand_worked_trace() -> None:
    """One token per line: layer 0, layer 1."""
    tokens = [
        [(0, 1), (0, 1)],
        [(1, 2), (3, 4)],
        [(2, 1), (4, 5)],
        [(1, 3), (6, 7)],
        [(4, 5), (7, 5)],
    ]
    result = analyse(trace_of(tokens))
    found = {reuse.name: (reuse.measured, reuse.by_layer) for reuse in result.reuses}
    assert found == {
        "next layer: identical set": (1 / 5, (1 / 5,)),
        "next layer: at least one same index": (2 / 5, (2 / 5,)),
        # Layer 0 meets at tokens 1, 2, 3; layer 1 at tokens 2 and 4.
        "previous token: at least one": (5 / 8, (3 / 4, 2 / 4)),
        "previous token: all": (1 / 8, (1 / 4, 0)),
        # Token 4 of layer 1 shares 7 with the one before, 5 with the one before that.
        "each of the two previous tokens: at least one": (3 / 6, (2 / 3, 1 / 3)),
        "one expert in common with the two previous tokens": (2 / 6, (2 / 3, 0)),
        "one expert in common with the three previous tokens or more": (1 / 4, (1 / 2, 0)),
    }
    assert by_name(result.reuses)["previous token: at least one"].n_pairs == 8
    # Lag 1: layer 0 shares 1, 2, 1, 0 of 2, layer 1 shares 0, 1, 0, 1.
    assert result.lags[0].measured == pytest.approx(6 / 16)
    assert result.lags[0].chance == 2 / 8
    assert len(result.lags) == 4
    assert result.popularity[0].tolist() == [1 / 5, 4 / 5, 2 / 5, 1 / 5, 1 / 5, 1 / 5, 0, 0]


def test_tokens_of_different_prompts_are_not_neighbours() -> None:
    tokens = [[(0, 1)]] * 4 + [[(2, 3)]] * 4
    reuse = by_name(analyse(trace_of(tokens, prompts=[0] * 4 + [1] * 4)).reuses)
    assert reuse["previous token: all"].measured == 1.0
    assert reuse["previous token: all"].n_pairs == 6


def test_rows_of_a_batch_are_sequences_of_their_own() -> None:
    rows = ((0, 1), (2, 3))
    passes = Routing(RoutingPass("decode", (rows,), 0) for _ in range(5))
    reuse = by_name(analyse(Trace(TraceInfo("batch", 1, 2, 8), passes)).reuses)
    assert reuse["previous token: all"].measured == 1.0
    assert reuse["previous token: all"].n_pairs == 8


def test_random_routing_measures_chance() -> None:
    rng = random.Random(5)
    tokens = [[rng.sample(range(8), 2) for _ in range(8)] for _ in range(3000)]
    result = analyse(trace_of(tokens))
    for reuse in [*result.reuses, *result.lags]:
        assert reuse.measured == pytest.approx(reuse.chance, abs=0.01), reuse.name
    assert result.shared_by_popularity == pytest.approx(0.25, abs=0.01)


def test_popularity_alone_explains_reuse_without_memory() -> None:
    rng = random.Random(6)
    tokens = [[(0, rng.randrange(1, 8))] for _ in range(3000)]  # expert 0 always, one more evenly
    result = analyse(trace_of(tokens))
    assert result.shared_by_popularity == pytest.approx((1 + 1 / 7) / 2, abs=0.01)
    assert result.lags[0].measured == pytest.approx(result.shared_by_popularity, abs=0.01)


def test_a_single_layer_has_no_next() -> None:
    reuse = by_name(analyse(trace_of([[(0, 1)]] * 4)).reuses)
    assert reuse["next layer: identical set"].n_pairs == 0
    assert reuse["previous token: all"].measured == 1.0


def test_too_short_a_trace_is_refused() -> None:
    with pytest.raises(UserError, match="at least 4 consecutive decoded tokens, found at most 3"):
        analyse(trace_of([[(0, 1)]] * 3))


def test_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(7)
    trace = trace_of([[rng.sample(range(8), 2) for _ in range(3)] for _ in range(40)])
    write_trace(tmp_path / "trace.jsonl", trace.info, trace.passes)
    out = tmp_path / "out"
    assert draw.patterns([str(tmp_path / "trace.jsonl"), "--output-dir", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "made up: 3 layers, top-2 of 8 experts, 40 decoded tokens" in printed
    assert sorted(path.name for path in out.iterdir()) == [
        "patterns.csv", "patterns.pdf", "patterns.png", "patterns.svg"
    ]  # fmt: skip
    assert is_drawn(out / "patterns.png")
    with (out / "patterns.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    totals = {row["Reuse"]: row for row in rows if row["Layer"] == "all"}
    for reuse in analyse(trace).reuses:
        row = totals[reuse.name]
        assert float(row["Measured (%)"]) == pytest.approx(100 * reuse.measured, rel=1e-5)
        assert float(row["Chance (%)"]) == pytest.approx(100 * reuse.chance, rel=1e-5)
        assert f"{reuse.name:60}{100 * reuse.measured:10.2f}{100 * reuse.chance:10.2f}" in printed


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "expected a routing trace at"),
        ("Index,Block_0,Block_0\n0\n1,3,4\n2,3\n", "line 4: expected 2 expert ids"),
        ("Index,Block_0,Block_0\n0\n1,3,x\n", "line 3: expected whole numbers"),
        ("Index,Block_0,Block_0\n0\n1,3,9\n", "line 3: expected distinct expert ids of 0 to 7"),
    ],
)
def test_bad_traces_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, sentence: str
) -> None:
    path = tmp_path / "expert_choices.csv"
    if text is not None:
        path.write_text(text)
    assert draw.patterns([str(path), "--n-experts", "8", "--output-dir", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert sentence in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("number", ["0", "-3", "10000000000"])
def test_a_number_of_experts_that_is_none(capsys: pytest.CaptureFixture[str], number: str) -> None:
    assert draw.patterns(["trace.csv", "--n-experts", number]) == 2
    expected = f"error: expected 1 to 65536 experts a layer, found {number}\n"
    assert capsys.readouterr() == ("", expected)


def test_a_missing_argument_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert draw.patterns([]) == 2
    expected = "error: the following arguments are required: trace; see --help\n"
    assert capsys.readouterr() == ("", expected)


def test_the_figure_has_no_number_that_its_axis_cannot_show() -> None:
    """With top-8 of 128 two tokens draw the same set by chance in 7e-11% of the pairs."""
    rng = random.Random(8)
    tokens = [[rng.sample(range(128), 8) for _ in range(2)] for _ in range(6)]
    drawn = draw_patterns(analyse(trace_of(tokens, n_experts=128)), "made up")
    labels = [text.get_text().strip() for text in drawn.figure.axes[0].texts]
    assert "below 0.01" in labels
    for label in labels:
        assert label == "below 0.01" or float(label) == round(float(label), 2)
