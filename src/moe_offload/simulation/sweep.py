"""Many cache settings on one trace: a row of figures for each, on all cores of this machine."""

from __future__ import annotations

import csv
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from functools import partial
from pathlib import Path

from moe_offload.errors import UserError
from moe_offload.experts.cost_model import CostModel
from moe_offload.experts.expert_cache import ExpertCache
from moe_offload.experts.replacement_policies import POLICIES, ReplacementPolicy, make_policy
from moe_offload.simulation.belady import Belady, distinct_experts, most_hits
from moe_offload.simulation.packed_routing import N_IDS, RoutingPass, collected
from moe_offload.simulation.replay import Replay, replay
from moe_offload.simulation.time_model import Busy, Timeline, bound_us
from moe_offload.simulation.traces import Trace

BELADY = "BELADY"
# Okabe and Ito's palette, told apart with every kind of colour vision.
_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#000000")


@dataclass(frozen=True)
class Setting:
    """One cache: N indexes x M ways, a policy by name (`BELADY` for the optimum), its quota."""

    n_indexes: int
    n_ways: int
    policy: str
    quota: int = 64


@dataclass(frozen=True)
class SweepRow:
    """What one setting yields; hit rates in percent of decode's cached layers.

    `hit_expert` and `bound_bypass`, the rate that no policy can exceed, count an expert once in a
    pass, however many tokens of a batch chose it; so does `all_hits`, in percent of every layer's
    experts, cached or not. Times are 0 without a cost model.
    """

    n_indexes: int
    n_ways: int
    policy: str
    slots: int
    hit_one: float
    hit_two: float
    hit_expert: float
    bound_bypass: float
    all_hits: float
    fetches: int
    evictions: int
    tokens_per_s: float
    bound_tokens_per_s: float
    synthetic: bool


@dataclass(frozen=True)
class Outcome:
    """A replay, the optimum beside it, and the modelled time of its decode.

    `n_chosen` counts the experts of every decode pass and layer, cached or not, each once.
    """

    replay: Replay
    most_hits: int
    n_chosen: int
    busy: Busy
    tokens_per_s: float = 0.0
    bound_tokens_per_s: float = 0.0


def run_setting(trace: Trace, setting: Setting, costs: CostModel | None = None) -> Outcome:
    """Replay `trace` with one setting, on a modelled clock where `costs` are given."""
    cache = ExpertCache(setting.n_indexes, setting.n_ways, _policy(setting.policy, trace))
    timeline = Timeline(costs) if costs is not None else None
    result = replay(trace.passes, cache, setting.quota, timeline)
    best = most_hits(trace.packed, cache.n_indexes, setting.n_ways)
    n_chosen = sum(
        len(distinct_experts(tokens))
        for one in trace.passes
        if one.phase == "decode"
        for tokens in one.ids
    )
    if timeline is None or costs is None or not result.decode_us:
        return Outcome(result, best, n_chosen, Busy())
    n = result.n_decode_passes
    least_us = n * bound_us(costs, trace.n_layers, best / n, (n_chosen - best) / n)
    return Outcome(
        result,
        best,
        n_chosen,
        timeline.busy,
        tokens_per_s=result.n_decode_tokens / result.decode_us * 1e6,
        bound_tokens_per_s=result.n_decode_tokens / least_us * 1e6,
    )


def sweep(
    trace: Trace, settings: Sequence[Setting], costs: CostModel | None = None, processes: int = 1
) -> list[SweepRow]:
    """Run every setting, on so many processes; the rows keep the settings' order."""
    row = partial(_row, trace, costs)
    if processes <= 1 or len(settings) < 2 * processes:
        return [row(setting) for setting in settings]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        # Four chunks a process: the trace travels with each, and slow settings spread.
        return pool.map(row, settings, chunksize=-(-len(settings) // (4 * processes)))


def grid(trace: Trace, policies: Iterable[str] = ()) -> list[Setting]:
    """The settings of a sweep: N x M x policy, each number doubling up to the model's own."""
    names = [*(policies or POLICIES), BELADY]
    return [
        Setting(n, m, policy)
        for n in _doubling(trace.n_layers, 3)
        for m in _doubling(trace.n_experts, 5)
        for policy in names
    ]


def write_rows(path: Path, rows: Sequence[SweepRow]) -> None:
    """Write a sweep as CSV; raises UserError where the file cannot be written."""
    try:
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([field.name for field in fields(SweepRow)])
            for row in rows:
                values = (f"{v:.4f}" if isinstance(v, float) else v for v in astuple(row))
                writer.writerow(values)
    except OSError as error:
        raise UserError(f"expected to write {path}, found {error}; choose another folder") from None


def draw_rows(path: Path, rows: Sequence[SweepRow], title: str) -> None:
    """Draw hit rate over ways, one line for each policy, at the sweep's largest N."""
    import matplotlib  # a second of import that only figures need

    matplotlib.use("Agg")
    from matplotlib import pyplot

    widest = max(row.n_indexes for row in rows)
    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    shown = [row for row in rows if row.n_indexes == widest]
    policies = dict.fromkeys(row.policy for row in shown)
    for policy, marker, colour in zip(policies, "os^Dvx*", _COLOURS, strict=False):
        points = sorted((row.n_ways, row.hit_expert) for row in shown if row.policy == policy)
        axes.plot(*zip(*points, strict=True), marker=marker, color=colour, label=policy)
    bound = sorted({(row.n_ways, row.bound_bypass) for row in shown})
    axes.plot(*zip(*bound, strict=True), "k--", label="optimum with bypass")
    axes.set_xscale("log", base=2)
    ways = [row.n_ways for row in shown]
    axes.set_xticks(sorted(set(ways)), [str(n) for n in sorted(set(ways))])
    axes.set(xlabel="ways M", ylabel="experts hit in decode (%)", ylim=(0, 100), title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def share_one_index(trace: Trace) -> Trace:
    """The same routing for one index that all layers share, as other tools cache.

    Each layer becomes a pass of one layer, its experts numbered apart from the other layers'.
    """
    E = trace.n_experts
    if trace.n_layers * E > N_IDS:
        raise UserError(f"--one-index numbers up to {N_IDS} experts, found {trace.n_layers} x {E}")
    info = replace(trace.info, n_layers=1, n_experts=trace.n_layers * E)
    return Trace(info, collected(_layer_by_layer(trace)))


def _layer_by_layer(trace: Trace) -> Iterator[RoutingPass]:
    E = trace.n_experts
    for one in trace.passes:
        for layer, tokens in enumerate(one.ids):
            first = layer * E
            shifted = tuple(tuple(first + expert for expert in token) for token in tokens)
            yield RoutingPass(one.phase, (shifted,), one.prompt)
        for layer, seen in enumerate(one.seen):
            pairs = tuple((layer * E + expert, n) for expert, n in seen)
            yield RoutingPass(one.phase, (), one.prompt, seen=(pairs,))


def _policy(name: str, trace: Trace) -> ReplacementPolicy:
    return Belady(trace.packed) if name == BELADY else make_policy(name)


def _row(trace: Trace, costs: CostModel | None, setting: Setting) -> SweepRow:
    outcome = run_setting(trace, setting, costs)
    decode = outcome.replay.decode
    one, two, _ = decode.rates()
    return SweepRow(
        **{name: value for name, value in asdict(setting).items() if name != "quota"},
        slots=setting.n_indexes * setting.n_ways,
        hit_one=one,
        hit_two=two,
        hit_expert=decode.distinct_percent,
        bound_bypass=100 * outcome.most_hits / max(decode.experts, 1),
        all_hits=100 * decode.expert_hits / outcome.n_chosen,
        fetches=outcome.replay.fetches,
        evictions=outcome.replay.evictions,
        tokens_per_s=outcome.tokens_per_s,
        bound_tokens_per_s=outcome.bound_tokens_per_s,
        synthetic=trace.info.synthetic,
    )


def _doubling(limit: int, count: int) -> list[int]:
    """`limit` and its halves, `count` in all, ascending."""
    return sorted({max(1, limit >> shift) for shift in range(count)})
