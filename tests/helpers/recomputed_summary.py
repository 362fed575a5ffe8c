"""The summary's figures recomputed from a run's files alone, sharing no code with the tool.

`python3 tests/helpers/recomputed_summary.py RUN_DIR` prints them.
"""

from __future__ import annotations

import csv
import json
import statistics
import sys
from pathlib import Path


def recompute(folder: Path) -> dict[str, float]:
    """Figures by the names they have under `summary` in run.json."""
    passes = _read(folder / "out.csv")
    hits = [row for row in _read(folder / "cache.csv") if row["Phase"] == "decode"]
    tokens = _read(folder / "token_gen_time.csv")
    decode = [row for row in passes if row["phase"] == "decode"]
    prefill = [row for row in passes if row["phase"] == "prefill"]
    with (folder / "cache.csv").open(newline="") as file:
        n_layers = sum(name.startswith("Block_") for name in next(csv.reader(file)))
    # A batch's tokens share a step, and with it the timestamp's throughput: count each step once.
    throughput = float(tokens[-1]["Accumulated Generation Throughput (tokens/s)"])
    times_s = sorted(float(row["Time"]) for row in tokens)
    n_pairs = sum(int(row["Pairs"]) for row in hits)
    n_hits = sum(int(row["Hits"]) for row in hits)
    n_misses = sum(int(row["Misses"]) for row in hits)
    cpu_bytes = sum(int(row["cpu_bytes"]) for row in decode)
    cpu_s = sum(float(row["cpu"]) * n_layers for row in decode) / 1e3
    figures = {
        "prompt_tokens": sum(int(row["tokens"]) for row in prefill),
        "prompt_s": sum(float(row["step_ms"]) for row in prefill) / 1e3,
        "generated_tokens": len(tokens),
        "generation_s": len(tokens) / throughput,
        "generation_throughput": throughput,
        "tpot_median_s": statistics.median(times_s),
        "tpot_p95_s": _percentile(times_s, 0.95),
        "cache_hit_1_percent": _percent(sum(int(row["At Least One"]) for row in hits), n_pairs),
        "cache_hit_2_percent": _percent(sum(int(row["At Least Two"]) for row in hits), n_pairs),
        "per_expert_hit_percent": _percent(n_hits, n_hits + n_misses),
        "fetched_bytes": sum(int(row["fetch_bytes"]) for row in passes),
        "saved_bytes": sum(int(row["gpu_bytes"]) - int(row["waited_bytes"]) for row in decode),
        "cpu_read_bytes": cpu_bytes,
        "cpu_read_gbps": cpu_bytes / cpu_s / 1e9,
        "step_ms": statistics.mean(float(row["step_ms"]) for row in decode),
    }
    if tokens[0]["CPU Energy (J)"]:
        figures["cpu_j_per_token"] = statistics.mean(float(r["CPU Energy (J)"]) for r in tokens)
    if tokens[0]["GPU Energy (J)"]:
        figures["gpu_j_per_token"] = statistics.mean(float(r["GPU Energy (J)"]) for r in tokens)
    return figures


def first_tokens_s(folder: Path) -> list[float]:
    """Each prompt's time to its first token, s, from the responses file: no CSV has it."""
    lines = (folder / "responses.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = sorted(map(json.loads, lines), key=lambda prompt: prompt["index"])
    return [prompt["prefill_s"] for prompt in prompts]


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _percent(part: int, whole: int) -> float:
    return 100 * part / whole if whole else 0.0


def _percentile(ordered: list[float], share: float) -> float:
    """Linear between the two nearest ranks."""
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


if __name__ == "__main__":
    for name, value in recompute(Path(sys.argv[1])).items():
        print(f"{name}: {value:.6g}")
