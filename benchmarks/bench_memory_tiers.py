"""Experts on disk: how near decode comes to the disk, and what the tier costs with all in memory.

    PYTHONPATH=src python3 benchmarks/bench_memory_tiers.py PREPARED --host-memory-gb 0.4

Per budget, in turns: one text's decode, and plain direct reads of as many random experts by as many
threads, the better of two sizes. Then decode steps with all experts in memory, one plainly and the
next through the tier. With --predict: the simulator's tokens/s beside those measured.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import torch

from moe_offload.checkpoint.block_file import BlockFile
from moe_offload.checkpoint.prepared import read_manifest
from moe_offload.config import CacheOptions, GenerationOptions, ModelOptions
from moe_offload.engine.engine import Engine
from moe_offload.engine.loading import load_engine
from moe_offload.experts.cache import make_policy
from moe_offload.experts.disk_reads import N_READERS
from moe_offload.experts.disk_tier import DiskTier
from moe_offload.experts.plan import TRIAL_STEPS
from moe_offload.experts.recorder import NullRecorder, Recorder
from moe_offload.experts.store import ExpertStore
from moe_offload.kernels.bindings import load_kernels
from moe_offload.model.generation import generate_batch
from moe_offload.model.loader import PreparedModel
from moe_offload.report.files import recorded_routing
from moe_offload.simulation.tiers import replay_tiers
from moe_offload.simulation.traces import Routing, Trace

ROUNDS = 5
PROMPT = list(range(20, 36))


def plain_gbps(source: PreparedModel, n_reads: int) -> float:
    """Random blocks past the page cache, into huge pages that each thread uses again.

    No checksum is compared, and nobody looks at the bytes. The better of whole blocks at once, one
    for each thread, and of the tier's pieces.
    """
    layers = source.manifest.moe_layers
    files = [os.open(layer.file, os.O_RDONLY | os.O_DIRECT) for layer in layers]
    block_bytes = layers[0].layout.block_bytes
    with closing(BlockFile(layers[0])) as file:
        pieces = file.pieces
    chosen = random.Random(0)
    places = [(chosen.randrange(len(layers)), chosen.randrange(layers[0].n_experts))
              for _ in range(n_reads)]  # fmt: skip
    store = ExpertStore([layers[0].layout], [N_READERS])  # pages as the tier has them
    buffers = store.blocks(0).zero_().numpy()

    def read(jobs: list[tuple[int, int, slice]], thread: int) -> None:
        view = buffers[thread].data
        for layer, expert, piece in jobs[thread::N_READERS]:
            position = layers[layer].block_offset_bytes(expert) + piece.start
            assert os.preadv(files[layer], [view[piece]], position) == piece.stop - piece.start

    reached = []
    for parts in ([slice(0, block_bytes)], pieces):
        jobs = [(*place, part) for place in places for part in parts]
        began_s = time.perf_counter()
        with ThreadPoolExecutor(N_READERS) as pool:
            list(pool.map(partial(read, jobs), range(N_READERS)))
        reached.append(n_reads * block_bytes / (time.perf_counter() - began_s) / 1e9)
    for descriptor in files:
        os.close(descriptor)
    return max(reached)


@contextmanager
def opened(folder: Path, gb: float | None) -> Iterator[Engine]:
    source = PreparedModel(read_manifest(folder))
    options = ModelOptions(folder, device="cpu", host_memory_gb=gb)
    with load_engine(source, options, CacheOptions()) as engine:
        yield engine


def decode(engine: Engine, n_tokens: int) -> list[float]:
    """The times of the tokens after the first, s."""
    times_s: list[float] = []
    options = GenerationOptions(max_tokens=n_tokens)
    for record, _ in generate_batch(engine.model, [PROMPT], options):
        times_s = record.token_times_s
    return times_s[1:]


def against_disk(folder: Path, gb: float, n_tokens: int) -> None:
    rows = []
    with opened(folder, gb) as engine:
        tier = engine.store
        assert isinstance(tier, DiskTier), "the budget holds all experts"
        source = engine.source
        assert isinstance(source, PreparedModel)
        for _ in range(1 + TRIAL_STEPS // n_tokens):  # until reading ahead is decided on
            decode(engine, n_tokens)
        for _ in range(ROUNDS):
            before, wait_s = tier.disk.n_bytes, tier.disk.wait_s
            hits, misses = tier.disk.hits, tier.disk.misses
            times_s = decode(engine, n_tokens)
            read_bytes = tier.disk.n_bytes - before
            asked = tier.disk.hits - hits + tier.disk.misses - misses
            n_reads = max(1, round(read_bytes / tier.layouts[0].block_bytes))
            plain = plain_gbps(source, n_reads)
            wait_s = tier.disk.wait_s - wait_s
            reached = read_bytes / sum(times_s) / 1e9
            hit_rate = (tier.disk.hits - hits) / asked
            rows.append((len(times_s) / sum(times_s), hit_rate, reached, wait_s, plain))
            print(
                f"  {rows[-1][0]:.2f} tokens/s, {100 * hit_rate:.1f}% there, {reached:.2f} GB/s "
                f"over all of decode, {wait_s:.2f} of {sum(times_s):.2f} s waited for; plain "
                f"reads of {n_reads} blocks {plain:.2f} GB/s: {100 * reached / plain:.0f}%"
            )
        print("  " + "; ".join(tier.notes()))
    shares = [reached / plain for _, _, reached, _, plain in rows]
    print(
        f"{gb:g} GB ({tier.cache.n_ways} ways): median "
        f"{statistics.median(row[0] for row in rows):.2f} tokens/s, "
        f"{100 * statistics.median(shares):.0f}% of plain reads"
    )


def predicted(folder: Path, gb: float, n_tokens: int) -> None:
    """Decode steps of a run from empty memory on, and what the simulator says of its routing.

    The costs are the mean of those measured before and after each text. Nothing is read ahead.
    """
    with opened(folder, gb) as engine:
        tier = engine.store
        assert isinstance(tier, DiskTier)
        tier.trial = None
        recorder = Recorder()
        costs = []
        for _ in range(ROUNDS):
            engine.calibrate(again=True)
            assert engine.costs is not None
            costs.append(engine.costs.model)
            engine.dispatcher.recorder = recorder
            decode(engine, n_tokens)
            engine.dispatcher.recorder = NullRecorder()
        passes = recorder.pass_table()
        measured_s = float(passes["duration_s"][passes["decode"]].sum())
        n_steps = int(passes["decode"].sum())
        experts = tier.n_experts[0]
        info, routing = recorded_routing(recorder, engine.source.name, experts, synthetic=False)
        ways = [len(tier.memory.blocks(layer)) for layer in range(tier.n_layers)]
        trace = Trace(info, Routing(routing))
        replays = [replay_tiers(trace, ways, "LFRU", one) for one in costs]
        predicted_s = statistics.mean(one.decode_us for one in replays) / 1e6
        disks = [one.disk for one in costs if one.disk is not None]
        awake = [replace(one, disk=replace(one.disk, resume_us=0.0)) for one in costs if one.disk]
        awake_s = (
            statistics.mean(replay_tiers(trace, ways, "LFRU", one).decode_us for one in awake) / 1e6
        )
    layers = recorder.layer_table()
    layers = layers[passes["decode"][layers["pass_index"]]]
    asked = int(layers["host_hits"].sum() + layers["host_misses"].sum())
    print(
        f"{gb:g} GB: predicted {n_steps / predicted_s:.2f} tokens/s, measured "
        f"{n_steps / measured_s:.2f}: {100 * (measured_s / predicted_s - 1):+.0f}%; hits "
        f"{replays[0].hit_percent:.1f}% predicted, {100 * layers['host_hits'].sum() / asked:.1f}%; "
        f"disk {min(one.gbps for one in disks):.2f} to "
        f"{max(one.gbps for one in disks):.2f} GB/s; experts behind a wait take "
        f"{statistics.median(one.resume_us for one in disks):.0f} us longer, without which "
        f"{n_steps / awake_s:.2f} tokens/s are predicted"
    )


def cost_in_memory(folder: Path, n_tokens: int) -> None:
    with opened(folder, None) as engine:
        store, source = engine.store, engine.source
        assert isinstance(source, PreparedModel)
        policy, kernels = make_policy("LFRU"), load_kernels()
        tier = DiskTier(source.manifest.moe_layers, store.n_experts, policy, kernels)
        for layer, n in enumerate(store.n_experts):
            tier.warm(layer, list(range(n)))
        steps = count()

        def in_turn() -> None:  # before each layer: a step plainly, one through the tier
            step, layer = divmod(next(steps), store.n_layers)
            if not layer:
                engine.dispatcher.store = tier if step % 2 else store

        engine.dispatcher.on_layer.append(in_turn)
        n_tokens += n_tokens % 2  # so that every prompt goes plainly, and the next step does not
        decode(engine, n_tokens)
        rows = []
        for _ in range(2 * ROUNDS):
            times_s = decode(engine, n_tokens)
            assert len(times_s) == n_tokens - 1
            rows.append([1e3 * statistics.median(times_s[way::2]) for way in (1, 0)])
        engine.dispatcher.on_layer.remove(in_turn)
        engine.dispatcher.store = store
        tier.close()
    plain, through = (statistics.median(times) for times in zip(*rows, strict=True))
    ratios = sorted(after / before for before, after in rows)
    print(
        f"all in memory: median step {plain:.2f} ms plainly, {through:.2f} ms through the tier; "
        f"ratio {statistics.median(ratios):.4f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--host-memory-gb", type=float, nargs="*", default=[])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--predict", action="store_true", help="the simulator's speeds beside")
    arguments = parser.parse_args()
    if arguments.predict:
        for gb in arguments.host_memory_gb:
            with torch.inference_mode():
                predicted(arguments.folder, gb, arguments.tokens)
        return
    tasks: list[Callable[[], None]] = [
        lambda gb=gb: against_disk(arguments.folder, gb, arguments.tokens)
        for gb in arguments.host_memory_gb
    ]
    for task in [*tasks, lambda: cost_in_memory(arguments.folder, arguments.tokens)]:
        with torch.inference_mode():
            task()


if __name__ == "__main__":
    main()
