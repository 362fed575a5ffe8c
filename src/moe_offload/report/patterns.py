"""How much routing repeats itself across layers and tokens, and how much of that is chance.

Chance means: every token and layer draws K distinct of E experts, all sets equally likely and
independent. At top-2 of 8, two such sets share an expert 46% of the time: a figure of reuse says
something only beside the value that chance gives. First the analysis, then its table and figure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from math import comb
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_offload.errors import UserError
from moe_offload.report.drawing import (
    BLUE,
    GREEN,
    PURPLE,
    RED,
    Drawing,
    Rows,
    new_figure,
    whole_numbers,
)
from moe_offload.simulation.traces import Trace, TraceInfo

Members = npt.NDArray[np.bool_]
_Compare = Callable[[Members], Any]
_MOST_LAGS = 16


@dataclass(frozen=True)
class Reuse:
    """One kind of reuse: how many of `n_pairs` comparisons show it, and what chance would give.

    `measured` and `chance` are shares of 1; `by_layer` [L] is `measured` in each layer (for layers
    compared with the next one, L - 1).
    """

    name: str
    measured: float
    chance: float
    n_pairs: int
    by_layer: tuple[float, ...]


@dataclass(frozen=True)
class Patterns:
    """The pattern analysis of one trace.

    `lags[d - 1]` is the share of its experts that a token has in common with the one d before it;
    `popularity` [L, E] the share of tokens that chose each expert.
    """

    n_layers: int
    n_experts: int
    top_k: int
    n_tokens: int
    reuses: tuple[Reuse, ...]
    lags: tuple[Reuse, ...]
    popularity: npt.NDArray[np.float64]

    @property
    def shared_by_popularity(self) -> float:
        """The share of `lags` if tokens drew independently, but with each layer's popularity."""
        return float((self.popularity**2).sum(axis=1).mean() / self.top_k)


def chance_share_all(E: int, K: int) -> float:
    """Probability that a token's K of E experts are exactly those of another."""
    return 1 / comb(E, K)


def chance_share_one(E: int, K: int) -> float:
    """Probability that two tokens' sets of K of E experts meet."""
    return 1 - comb(E - K, K) / comb(E, K)


def chance_common_expert(E: int, K: int, n_sets: int) -> float:
    """Probability that some expert is in all of `n_sets` sets, by inclusion and exclusion."""
    share_all = (comb(E - j, K - j) / comb(E, K) for j in range(1, K + 1))
    terms = ((-1.0) ** (j + 1) * comb(E, j) * share**n_sets for j, share in enumerate(share_all, 1))
    return sum(terms)


def token_sequences(trace: Trace) -> Iterator[Members]:
    """Each decoded sequence as bool [T, L, E]: which experts token t used in layer l.

    A sequence ends with its prompt, and where a batch loses or gains rows: before a row is gained,
    its prompt is evaluated.
    """
    for (phase, *_), passes in groupby(
        trace.passes, lambda one: (one.phase, one.prompt, len(one.ids[0]) if one.ids else 0)
    ):
        if phase != "decode":
            continue
        ids = np.array([one.ids for one in passes])  # [T, L, B, K]
        members = np.zeros((*ids.shape[:3], trace.n_experts), dtype=bool)
        np.put_along_axis(members, ids, True, axis=3)
        yield from members.transpose(2, 0, 1, 3)


def analyse(trace: Trace) -> Patterns:
    """Reuse across consecutive layers and tokens of a trace's decoded tokens.

    Raises UserError for a trace with fewer than four consecutive decoded tokens.
    """
    E, K, L = trace.n_experts, trace.info.top_k, trace.n_layers
    sequences = list(token_sequences(trace))
    longest = max(len(sequence) for sequence in sequences)
    if longest < 4:
        raise UserError(
            "expected a trace of at least 4 consecutive decoded tokens, found at most "
            f"{longest}: record a longer run"
        )
    one, every = chance_share_one(E, K), chance_share_all(E, K)
    kinds: dict[str, tuple[_Compare, float]] = {
        "next layer: identical set": (lambda s: (s[:, 1:] == s[:, :-1]).all(axis=2), every),
        "next layer: at least one same index": (lambda s: (s[:, 1:] & s[:, :-1]).any(axis=2), one),
        "previous token: at least one": (lambda s: _shared(s, 1) >= 1, one),
        "previous token: all": (lambda s: _shared(s, 1) == K, every),
        "each of the two previous tokens: at least one": (
            lambda s: (_shared(s, 1)[1:] >= 1) & (_shared(s, 2) >= 1),
            one**2,
        ),
        "one expert in common with the two previous tokens": (
            lambda s: _common(s, 3),
            chance_common_expert(E, K, 3),
        ),
        "one expert in common with the three previous tokens or more": (
            lambda s: _common(s, 4),
            chance_common_expert(E, K, 4),
        ),
    }

    def at_lag(lag: int) -> Reuse:
        return _reuse(f"lag {lag}", sequences, lambda s: _shared(s, lag) / K, K / E)

    n_tokens = sum(len(sequence) for sequence in sequences)
    return Patterns(
        *(L, E, K, n_tokens),
        reuses=tuple(_reuse(name, sequences, *kind) for name, kind in kinds.items()),
        lags=tuple(map(at_lag, range(1, min(_MOST_LAGS, longest - 1) + 1))),
        popularity=np.sum([sequence.sum(axis=0) for sequence in sequences], axis=0) / n_tokens,
    )


def _reuse(name: str, sequences: list[Members], compare: _Compare, chance: float) -> Reuse:
    """`compare` gives [pairs of tokens, layers] of a sequence; its mean over all sequences."""
    found = np.concatenate([compare(sequence) for sequence in sequences])
    if not found.size:  # one layer has no next
        return Reuse(name, float("nan"), chance, 0, ())
    return Reuse(name, float(found.mean()), chance, found.size, tuple(found.mean(axis=0).tolist()))


def _shared(sequence: Members, lag: int) -> npt.NDArray[np.int64]:
    """[T - lag, L]: how many experts each token shares with the one `lag` before."""
    earlier = sequence[: max(len(sequence) - lag, 0)]
    return np.asarray((sequence[lag:] & earlier).sum(axis=2))


def _common(sequence: Members, n_sets: int) -> npt.NDArray[np.bool_]:
    """[T - n_sets + 1, L]: whether some expert is in each of `n_sets` consecutive tokens."""
    n_tokens = max(len(sequence) - n_sets + 1, 0)
    windows = [sequence[offset : offset + n_tokens] for offset in range(n_sets)]
    return np.asarray(np.logical_and.reduce(windows).any(axis=2))


def format_patterns(patterns: Patterns, info: TraceInfo) -> list[str]:
    """The table for people, in lines."""
    synthetic = " (synthetic routing: no model chose it)" if info.synthetic else ""
    return [
        f"{info.model}{synthetic}: {patterns.n_layers} layers, top-{patterns.top_k} of "
        f"{patterns.n_experts} experts, {patterns.n_tokens} decoded tokens",
        *info.notes,
        "",
        f"{'reuse, % of pairs':60}{'measured':>10}{'chance':>10}{'pairs':>10}",
        *(
            f"{reuse.name:60}{_percent(reuse.measured):>10}{_percent(reuse.chance):>10}"
            f"{reuse.n_pairs:>10}"
            for reuse in patterns.reuses
        ),
        "",
    ]


def _percent(share: float) -> str:
    """Two decimals, or two digits where those would be zeros; '-' where there is no pair."""
    if share != share:
        return "-"
    return f"{100 * share:.2f}" if share == 0 or share >= 1e-4 else f"{100 * share:.1e}"


def draw_patterns(patterns: Patterns, model: str) -> Drawing:
    """All kinds of reuse beside chance, and three of them by layer."""
    figure = new_figure(6.8, 6.4, model)
    top, bottom = figure.subplots(2, 1, height_ratios=[3, 2])
    places = np.arange(len(patterns.reuses))
    for offset, name, colour, look in (
        (-0.2, "measured", BLUE, {}),
        (0.2, "chance", RED, {"hatch": "///", "alpha": 0.6}),
    ):
        percents = [100 * getattr(reuse, name) for reuse in patterns.reuses]
        top.barh(places + offset, percents, height=0.36, color=colour, label=name, **look)
        for place, percent in enumerate(percents):
            if percent == percent:
                text = f" {percent:.2f}" if percent == 0 or percent >= 0.01 else " below 0.01"
                top.text(percent, place + offset, text, va="center", size=7)
    # Long names take two lines.
    names = [r.name.replace(": ", ":\n").replace(" with ", "\nwith ") for r in patterns.reuses]
    top.set_yticks(places, names, size=8)
    top.invert_yaxis()
    top.margins(x=0.12)
    top.grid(False, axis="y")
    title = (
        f"Reuse of experts: top-{patterns.top_k} of {patterns.n_experts}, "
        f"{patterns.n_layers} layers, {patterns.n_tokens} tokens"
    )
    top.set(title=title, xlabel="pairs that show it (%)")
    top.legend(loc="lower right")
    by_name = {reuse.name: reuse for reuse in patterns.reuses}
    for name, colour, marker in (
        ("previous token: at least one", BLUE, "o"),
        ("previous token: all", GREEN, "s"),
        ("next layer: at least one same index", PURPLE, "^"),
    ):
        shares = [100 * share for share in by_name[name].by_layer]
        bottom.plot(shares, color=colour, marker=marker, markersize=3.5, label=name)
    one = 100 * by_name["previous token: at least one"].chance
    bottom.axhline(one, color=RED, linestyle="--", label="chance: at least one")
    bottom.set(title="By layer", xlabel="MoE layer", ylabel="pairs that show it (%)", ylim=(0, 105))
    whole_numbers(bottom.xaxis)
    figure.legend(*bottom.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    rows: Rows = []
    for reuse in patterns.reuses:
        layers = list(enumerate(reuse.by_layer))
        n_pairs = [reuse.n_pairs] + [reuse.n_pairs // len(layers) for _ in layers]
        rows += [
            (reuse.name, layer, 100 * share, 100 * reuse.chance, n)
            for (layer, share), n in zip([("all", reuse.measured), *layers], n_pairs, strict=True)
        ]
    header = ("Reuse", "Layer", "Measured (%)", "Chance (%)", "Pairs")
    return Drawing("patterns", figure, header, rows)
