"""Predicted against measured tokens/s and hit rates on this machine, without a GPU.

    PYTHONPATH=src python3 benchmarks/bench_prediction.py [--layers 2] [--tokens 48]

Runs the real engine on random weights of Mixtral's shape (2 layers: 5.6 GB of memory): on the CPU
alone, and on the emulated accelerator behind three throttled links and two N x M. Each run's own
routing is then replayed with the costs that were calibrated before it.
"""

from __future__ import annotations

import argparse
import statistics

from config import CacheOptions, ModelOptions
from dummy_model import DummyModel, dummy_routing
from engine import Engine, load_engine
from expert_cache import ExpertCache, make_policy
from generation import generate_batch, make_sampler
from recorded_routing import recorded_trace
from recorder import Recorder
from replay import replay
from time_model import Timeline

PROMPT = list(range(1, 17))
QUOTA = 64


def settings(layers: int) -> list[CacheOptions]:
    cached = [
        CacheOptions(n_indexes=n, n_ways=m, policy="LRU", emulate_pcie_gbps=gbps)
        for gbps in (2.0, 6.0, 12.0)
        for n, m in ((layers, 4), (1, 2))
    ]
    return [CacheOptions(), *cached]


def measure(engine: Engine, n_tokens: int) -> Recorder:
    recorder = engine.dispatcher.recorder = Recorder()
    sampler = make_sampler(0.0, 1.0, 0, engine.device)
    for _ in generate_batch(
        engine.model, [PROMPT], max_tokens=n_tokens, sampler=sampler, eos_ids=frozenset()
    ):
        pass
    return recorder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=48)
    arguments = parser.parse_args()
    options = ModelOptions(
        None, device="cpu", dummy_shape="mixtral-8x7b", dummy_layers=arguments.layers
    )
    source = DummyModel(options)
    print(f"{'setting':<28}{'measured':>9}{'predicted':>10}{'error':>8}{'hit %':>8}{'replay %':>9}")
    with load_engine(source, options, CacheOptions()) as engine:
        for cache_options in settings(arguments.layers):
            engine.use_cache(cache_options)
            engine.dispatcher.forced_routing = dummy_routing(source, None)
            engine.calibrate(again=True)
            assert engine.costs is not None
            recorder = measure(engine, arguments.tokens)
            passes = recorder.pass_table()
            measured_s = statistics.mean(passes["duration_s"][passes["decode"]].tolist())
            trace = recorded_trace(recorder, source.name, 8, synthetic=True)
            cache = ExpertCache(cache_options.n_indexes, cache_options.n_ways, make_policy("LRU"))
            result = replay(trace.passes, cache, QUOTA, Timeline(engine.costs.model))
            predicted_s = result.decode_us / result.n_decode_passes / 1e6
            layers = recorder.layer_table()
            hits, misses = int(layers["hits"].sum()), int(layers["misses"].sum())
            name = "CPU alone"
            if cache_options.n_slots:
                name = f"{cache_options.n_indexes} x {cache_options.n_ways}"
                name += f" at {cache_options.emulate_pcie_gbps:g} GB/s"
            print(
                f"{name:<28}{1 / measured_s:9.2f}{1 / predicted_s:10.2f}"
                f"{100 * (measured_s / predicted_s - 1):+7.1f}%"
                f"{100 * hits / max(hits + misses, 1):8.1f}{result.decode.rates()[2]:9.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
