"""A model larger than the memory allowed: this tool, and llama.cpp's mmap, under one limit.

    PYTHONPATH=src python3 -m benchmarks.bench_memory_limit --work-dir DIR --limit-gb 2.4 \\
        [--peer PATH/TO/llama-bench ...]

The same random model for all, a few layers of Qwen3-30B-A3B's shape in int8. Each run is a process
in a cgroup of its own, which counts its memory and its share of the page cache: Linux, as root. A
prompt of 512 tokens and some decoded ones, the programs in turns; nothing of a model is in the page
cache when a run begins. Ours chooses by itself what host memory holds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.llama_bench import Peer, find_peer
from benchmarks.side_by_side import write_models

CGROUPS = Path("/sys/fs/cgroup")
SAMPLE_S = 0.05
THREADS = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Speeds:
    """Tokens/s, and the most that the cgroup had: all, of it the page cache, and swap, GB."""

    prompt: float
    decode: float
    used_gb: float = 0.0
    cached_gb: float = 0.0
    swapped_gb: float = 0.0


class Cgroup:
    """A child of the memory controller's root, v1 or v2, that holds at most `limit_bytes`."""

    def __init__(self, limit_bytes: int) -> None:
        self._is_v1 = (CGROUPS / "memory" / "memory.limit_in_bytes").exists()
        name = f"moe-offload-benchmark-{os.getpid()}"
        self._folder = (CGROUPS / "memory" if self._is_v1 else CGROUPS) / name
        self._folder.mkdir()
        limit = "memory.limit_in_bytes" if self._is_v1 else "memory.max"
        (self._folder / limit).write_text(str(limit_bytes))
        self._use = "memory.usage_in_bytes" if self._is_v1 else "memory.current"
        self._names = ("cache", "swap") if self._is_v1 else ("file", "swapcached")
        self.most = [0, 0, 0]

    def run(self, command: Sequence[str]) -> str:
        """The output of `command`, run inside; `most` are the bytes used, cached and swapped."""
        procs = str(self._folder / "cgroup.procs")
        enter = ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', procs, *command]
        ended = threading.Event()
        watch = threading.Thread(target=self._watch, args=(ended,))
        watch.start()
        done = subprocess.run(enter, capture_output=True, text=True)
        ended.set()
        watch.join()
        if done.returncode:
            killed = "the out-of-memory killer, perhaps: " if done.returncode < 0 else ""
            sys.exit(f"{command[0]} ended with {done.returncode}: {killed}{done.stderr[-2000:]}")
        return done.stdout

    def close(self) -> None:
        self._folder.rmdir()  # what it cached goes to its parent

    def _watch(self, ended: threading.Event) -> None:
        while not ended.wait(SAMPLE_S):
            stat = dict(
                line.split() for line in (self._folder / "memory.stat").read_text().splitlines()
            )
            used = int((self._folder / self._use).read_text())
            now = (used, *(int(stat.get(name, 0)) for name in self._names))
            self.most = [max(pair) for pair in zip(self.most, now, strict=True)]


@contextmanager
def limited(limit_gb: float) -> Iterator[Cgroup]:
    cgroup = Cgroup(int(limit_gb * 1e9))
    try:
        yield cgroup
    finally:
        cgroup.close()


def forget(files: Sequence[Path]) -> None:
    """Let go of what the page cache has of `files`: else a run begins with a neighbour's pages."""
    for path in files:
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def ours(prepared: Path, arguments: argparse.Namespace) -> Speeds:
    command = [sys.executable, "-m", "benchmarks.bench_memory_limit", "--inside", str(prepared)]
    command += ["--prompt", str(arguments.prompt), "--decode", str(arguments.decode)]
    with limited(arguments.limit_gb) as cgroup:
        printed = cgroup.run(command)
        *lines, last = printed.strip().splitlines()
        for line in lines:
            print(f"    {line}")
        return Speeds(*json.loads(last), *(n_bytes / 1e9 for n_bytes in cgroup.most))


def theirs(peer: Peer, model: Path, arguments: argparse.Namespace) -> Speeds:
    """By llama-bench, whose kernels must not repack: a copy of the weights has no room."""
    mapped = ["-mmp", "1", "-rtr", "0"] if peer.is_ik else ["-lm", "mmap", "--repack", "0"]
    command = [str(peer.path), "-m", str(model), "-t", str(THREADS), "-r", "1", "-fa", "1"]
    command += ["-p", str(arguments.prompt), "-n", str(arguments.decode), "-o", "json", *mapped]
    with limited(arguments.limit_gb) as cgroup:
        printed = cgroup.run(command)
        tests: list[dict[str, Any]] = json.loads(printed[printed.index("[") :])
        prompt, decode = (
            next(test["avg_ts"] for test in tests if bool(test["n_gen"]) is decodes)
            for decodes in (False, True)
        )
        return Speeds(prompt, decode, *(n_bytes / 1e9 for n_bytes in cgroup.most))


def inside(arguments: argparse.Namespace) -> None:
    """One run of ours; the last line printed has its tokens/s."""
    import torch  # not before: whoever only starts runs needs no memory

    from moe_offload.config import CacheOptions, GenerationOptions, ModelOptions
    from moe_offload.engine.loading import load_engine, open_prepared
    from moe_offload.model.generation import generate_batch

    options = ModelOptions(arguments.inside, device="cpu")
    n_tokens = arguments.prompt + arguments.decode

    def times_s(n_prompt: int, n_decoded: int) -> list[float]:
        prompt = [(37 * place + 11) % 30_000 for place in range(n_prompt)]
        limits = GenerationOptions(max_tokens=1 + n_decoded)
        record, _ = [*generate_batch(engine.model, [prompt], limits)][-1]
        return record.token_times_s

    with (
        torch.inference_mode(),
        load_engine(
            open_prepared(options), options, CacheOptions(), context_tokens=n_tokens
        ) as engine,
    ):
        engine.calibrate_for(arguments.prompt)
        times_s(16, 2)  # as llama-bench, which warms up
        prompt_s = times_s(arguments.prompt, 0)[0]
        decode_s = sum(times_s(1, arguments.decode)[1:])
        print(*engine.notes, *engine.learnt(), sep="\n")
        print(json.dumps([arguments.prompt / prompt_s, arguments.decode / decode_s]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work-dir", type=Path, help="where the model is kept")
    parser.add_argument("--layers", type=int, default=8, help="of the model; 0.76 GB each")
    parser.add_argument("--limit-gb", type=float, default=2.4)
    parser.add_argument("--peer", type=Path, action="append", default=[], metavar="PATH")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside is not None:
        inside(arguments)
        return
    if arguments.work_dir is None:
        parser.error("--work-dir is needed")
    peers = [find_peer(path) for path in arguments.peer]
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    depths = (arguments.layers, arguments.layers)
    made = write_models(arguments.work_dir, "qwen3-30b-a3b", depths, "int8", bool(peers))
    (model, _), prepared = made
    found: dict[str, list[Speeds]] = {}
    for _ in range(arguments.rounds):
        for peer in [None, *peers]:
            forget([model, *prepared.glob("*.safetensors")])
            name = "ours" if peer is None else peer.name
            one = ours(prepared, arguments) if peer is None else theirs(peer, model, arguments)
            found.setdefault(name, []).append(one)
            print(
                f"  {name}: prompt {one.prompt:.1f}, decode {one.decode:.2f} tokens/s; at most "
                f"{one.used_gb:.2f} GB used, {one.cached_gb:.2f} of it page cache, "
                f"{one.swapped_gb:.2f} swapped",
                flush=True,
            )
    mine = found.pop("ours")
    for name, others in found.items():
        for what in ("prompt", "decode"):
            ratios = sorted(
                getattr(a, what) / getattr(b, what) for a, b in zip(mine, others, strict=True)
            )
            print(
                f"{what}: {statistics.median(ratios):.2f} times as fast as {name} "
                f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
            )


if __name__ == "__main__":
    main()
