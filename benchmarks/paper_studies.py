"""The paper's measured studies: speed by CPU cores, by cache layout and by policy.

    python3 benchmarks/paper_studies.py --output-dir study -- --dummy-weights mixtral-8x7b

Each run is a process of its own, src/main.py with what stands behind `--`, and leaves its files in
a folder of --output-dir, which `src/plots.py study/cores-*` draws. A run that has ended is not
repeated: the same command goes on where an earlier one was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

MAIN = Path(__file__).resolve().parents[1] / "src" / "main.py"


@dataclass(frozen=True)
class Run:
    """One run: its folder's name, its CPU threads, and its cache, N x M."""

    name: str
    threads: int
    cache: str
    policy: str

    def flags(self, folder: Path) -> list[str]:
        n_indexes, n_ways = self.cache.split("x")
        flags = ["--cache-nblocks", n_indexes, "--cache-nways", n_ways]
        return [*flags, "--cache-replace-policy", self.policy, "--output-dir", str(folder)]


def planned(
    cores: Sequence[int], caches: Sequence[str], policies: Sequence[str], most_cores: int
) -> Iterator[Run]:
    """The first cache and policy on every number of cores; every cache and policy on the most."""
    for threads in cores:
        yield Run(f"cores-{threads}", threads, caches[0], policies[0])
    for cache in caches:
        yield Run(f"cache-{cache}", most_cores, cache, policies[0])
    for policy in policies:
        yield Run(f"policy-{policy}", most_cores, caches[0], policy)


def tokens_per_s(folder: Path) -> float | None:
    """The decode speed of a run that has ended; None where none has."""
    try:
        document = json.loads((folder / "run.json").read_text())
        return float(document["summary"]["generation_throughput"])
    except (OSError, ValueError, KeyError):
        return None


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    own, model = argv, []
    if "--" in argv:
        own, model = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    parser = argparse.ArgumentParser(description="Run the paper's studies with src/main.py.")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--cores", type=int, nargs="+", default=[2, 8, 24])
    parser.add_argument("--caches", nargs="+", default=["14x4", "7x8", "28x2"])
    parser.add_argument("--policies", nargs="+", default=["LRU", "FIFO", "RANDOM"])
    options = parser.parse_args(own)
    here = os.cpu_count() or 1
    cores = [n for n in options.cores if n <= here] or [here]
    if cores != options.cores:
        print(f"this machine has {here} cores: measured on {', '.join(map(str, cores))}")
    for run in planned(cores, options.caches, options.policies, max(cores)):
        folder = options.output_dir / run.name
        if tokens_per_s(folder) is None:
            command = [sys.executable, str(MAIN), *run.flags(folder), *model]
            environment = os.environ | {"OMP_NUM_THREADS": str(run.threads)}
            done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False)
            if done.returncode:
                print(f"{run.name} ended with exit code {done.returncode}", file=sys.stderr)
                return done.returncode
        print(f"{run.name:<20} {tokens_per_s(folder):.2f} tokens/s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
