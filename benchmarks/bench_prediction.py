"""Predicted against measured tokens/s and hit rates on this machine.

    PYTHONPATH=src python3 benchmarks/bench_prediction.py [--rounds 6] [--tokens 48] [--only TEXT]

Runs the real engine on random weights of Mixtral's shape (2 layers: 5.6 GB of memory): on the CPU
alone, and with two N x M on the GPU or, without one, on the emulated accelerator behind three
throttled links. Each run's own routing is then replayed with the costs that were calibrated before
and after it. The emulation is for trying the mechanism: its speed is not predicted, only its hits.

A shared machine's speed drifts within minutes, so a round is short, calibrated before and after,
and predicted as the mean of replays on machines between its two calibrations; an error is the
median of the rounds' own. Whether a copy ends just before a layer or just behind it is luck: two
replays whose copies differ by 2% differ by several points in the hits of 48 tokens. So hit rates
are those of all rounds together: the engine's; the replay's on the modelled clock, and how far it
is off, with the standard error of the rounds' differences; and the replay's with the run's own
layer times, in which only the copies are modelled.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from moe_offload.config import CacheOptions, GenerationOptions, ModelOptions
from moe_offload.engine.engine import Engine
from moe_offload.engine.loading import load_engine
from moe_offload.experts.cache import ExpertCache, make_policy
from moe_offload.experts.costs import CostModel, SideCost
from moe_offload.experts.recorder import Recorder
from moe_offload.model.dummy import DummyModel, dummy_routing
from moe_offload.model.generation import generate_batch
from moe_offload.report.files import recorded_routing
from moe_offload.simulation.replay import Replay, Timeline, replay
from moe_offload.simulation.traces import Routing, Trace

PROMPT = list(range(1, 17))
QUOTA = 64
BETWEEN = 5  # machines between two calibrations, these included, that are replayed


def settings(layers: int, on_gpu: bool) -> list[CacheOptions]:
    cached = [
        CacheOptions(n_indexes=n, n_ways=m, policy="LRU", emulate_pcie_gbps=gbps)
        for gbps in ((None,) if on_gpu else (2.0, 6.0, 12.0))
        for n, m in ((layers, 4), (1, 2))
    ]
    return [CacheOptions(), *cached]


def name_of(options: CacheOptions) -> str:
    if not options.n_slots:
        return "CPU alone"
    link = options.emulate_pcie_gbps
    return f"{options.n_indexes} x {options.n_ways}" + (f" at {link:g} GB/s" if link else "")


class RunClock(Timeline):
    """A run's own layer times, in the order in which `replay` lets them pass.

    Copies are modelled, at the speed calibrated beside the CPU's work.
    """

    def __init__(self, costs: CostModel, recorder: Recorder) -> None:
        super().__init__(costs)
        self._spans = self._of_layers(recorder)

    @staticmethod
    def _of_layers(recorder: Recorder) -> Iterator[tuple[float, float]]:
        """Until the layer looks at its copies, and from there to its end, us."""
        layers, passes = recorder.layer_table(), recorder.pass_table()
        left = 0.0  # of the pass before: its head, after its last layer
        for number in range(len(passes)):
            rows = layers[layers["pass_index"] == number]
            within = 0.0
            for row in rows:
                before = float(row["attention_us"] + row["router_us"])
                after = float(
                    row["plan_us"] + row["cpu_us"] + row["copy_wait_us"] + row["combine_us"]
                )
                within += before + after
                yield left + before, after
                left = 0.0
            left = 1e6 * float(passes["duration_s"][number]) - within

    def pass_dense(self) -> None:
        before, self._after = next(self._spans)
        self._pass(before, 1.0, self._slowdown)

    def pass_rest(self) -> None:
        """The head is in the spans."""

    def _pass_both(self, cpu_work_us: float, gpu_work_us: float) -> None:
        self._pass(self._after, 1.0, self._slowdown)
        self._after = 0.0  # of a prompt's layer, the first of two calls


@dataclass
class Round:
    """One run: its measured and predicted s per token, hits of the engine and of both replays."""

    measured_s: float
    predicted_s: float
    lookups: int
    hits: int
    modelled_hits: float
    run_clock_hits: float


def measure(engine: Engine, n_tokens: int) -> Recorder:
    recorder = engine.dispatcher.recorder = Recorder()
    for _ in generate_batch(engine.model, [PROMPT], GenerationOptions(max_tokens=n_tokens)):
        pass
    return recorder


def replayed(trace: Trace, options: CacheOptions, timeline: Timeline) -> Replay:
    cache = ExpertCache(options.n_indexes, options.n_ways, make_policy("LRU"))
    return replay(trace.passes, cache, QUOTA, timeline)


def calibrated(engine: Engine) -> CostModel:
    engine.calibrate(again=True)
    assert engine.costs is not None
    return engine.costs.model


def between(one: CostModel, other: CostModel, share: float) -> CostModel:
    """A machine on the way from `one` (share 0) to `other` (1): each cost in between."""

    def mixed(a: Any, b: Any) -> Any:
        if isinstance(a, SideCost):
            pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(a)]
            return SideCost(*(mixed(*pair) for pair in pairs))
        if isinstance(a, tuple):
            return tuple(mixed(*pair) for pair in zip(a, b, strict=True))
        if a is None or a == b:  # such as infinity
            return a
        return a + (b - a) * share

    return CostModel(
        **{f.name: mixed(getattr(one, f.name), getattr(other, f.name)) for f in fields(one)}
    )


def empty_cache(engine: Engine, options: CacheOptions, costs: CostModel) -> None:
    """Begin with nothing in the slots, and with the costs just measured."""
    accelerator = engine.accelerator
    if accelerator is not None:
        accelerator.fetcher.drain()
        accelerator.cache = ExpertCache(options.n_indexes, options.n_ways, make_policy("LRU"))
        accelerator.costs = costs


def run_rounds(
    engine: Engine, source: DummyModel, options: CacheOptions, n_tokens: int, n_rounds: int
) -> Iterator[Round]:
    engine.use_cache(options)
    before = calibrated(engine)
    for seed in range(n_rounds):
        empty_cache(engine, options, before)
        engine.dispatcher.forced_routing = dummy_routing(source, None, seed)
        recorder = measure(engine, n_tokens)
        after = calibrated(engine)
        yield compared(recorder, source, options, (before, after))
        before = after


def compared(
    recorder: Recorder,
    source: DummyModel,
    options: CacheOptions,
    costs: tuple[CostModel, CostModel],
) -> Round:
    passes, layers = recorder.pass_table(), recorder.layer_table()
    measured_s = statistics.mean(passes["duration_s"][passes["decode"]].tolist())
    info, routing = recorded_routing(recorder, source.name, source.n_experts[0], synthetic=True)
    trace = Trace(info, Routing(routing))
    machines = [between(*costs, n / (BETWEEN - 1)) for n in range(BETWEEN)]
    modelled = [replayed(trace, options, Timeline(one)) for one in machines]
    on_run_clock = [replayed(trace, options, RunClock(one, recorder)) for one in machines]
    return Round(
        measured_s,
        statistics.mean(one.decode_us / one.n_decode_passes / 1e6 for one in modelled),
        int(layers["hits"].sum() + layers["misses"].sum()),
        int(layers["hits"].sum()),
        statistics.mean(one.decode.hits for one in modelled),
        statistics.mean(one.decode.hits for one in on_run_clock),
    )


def speed_figures(rounds: Sequence[Round], emulated: bool) -> str:
    """Measured tokens/s; the predicted ones and how far they are off, where they mean anything."""
    measured = f"{1 / statistics.median(one.measured_s for one in rounds):7.2f}"
    if emulated:
        return f"{measured}{'-':>10}{'-':>8}{hit_figures(rounds, emulated):>41}"
    errors = [100 * (one.measured_s / one.predicted_s - 1) for one in rounds]
    return (
        f"{measured}{1 / statistics.median(one.predicted_s for one in rounds):10.2f}"
        f"{statistics.median(errors):+8.1f}{hit_figures(rounds, emulated):>41}   "
        f"{' '.join(f'{error:+.1f}' for error in errors)}"
    )


def hit_figures(rounds: Sequence[Round], emulated: bool) -> str:
    """The engine's hit rate, the modelled one, how far it is off, and the run clock's."""
    lookups = sum(one.lookups for one in rounds)
    if not lookups:
        return ""
    hits, modelled, run_clock = (
        100 * sum(getattr(one, field) for one in rounds) / lookups
        for field in ("hits", "modelled_hits", "run_clock_hits")
    )
    if emulated:
        return f"{hits:8.1f}{'-':>9}{'-':>14}{run_clock:10.1f}"
    off = [100 * (one.modelled_hits - one.hits) / one.lookups for one in rounds]
    error = statistics.stdev(off) / len(off) ** 0.5 if len(off) > 1 else float("nan")
    return f"{hits:8.1f}{modelled:9.1f}{modelled - hits:+7.1f} +- {error:.1f}{run_clock:10.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--only", default="", help="only settings whose name holds this text")
    arguments = parser.parse_args()
    options = ModelOptions(
        None, device=arguments.device, dummy_shape="mixtral-8x7b", dummy_layers=arguments.layers
    )
    source = DummyModel(options)
    print(
        f"{'setting':<20}{'tok/s':>7}{'predicted':>10}{'error %':>8}"
        f"{'hit %':>8}{'modelled':>9}{'off':>14}{'run clock':>10}   error of the rounds, %"
    )
    with load_engine(source, options, CacheOptions()) as engine:
        on_gpu = engine.device.type == "cuda"
        for cache_options in settings(arguments.layers, on_gpu):
            name = name_of(cache_options)
            if arguments.only not in name:
                continue
            rounds = list(
                run_rounds(engine, source, cache_options, arguments.tokens, arguments.rounds)
            )
            emulated = cache_options.n_slots > 0 and not on_gpu
            print(f"{name:<20}{speed_figures(rounds, emulated)}", flush=True)


if __name__ == "__main__":
    main()
