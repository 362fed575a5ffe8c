"""Folders as runs leave them, for the tests of what reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "report" / "golden"
LAYERS = 3  # of golden/single


def run_dir(
    folder: Path,
    case: str = "single",
    threads: int = 2,
    cache: tuple[int, int] = (2, 4),
    throughput: float = 10.0,
    policy: str = "lru",
    batch: int = 1,
) -> Path:
    """A run's folder: the golden CSVs and the part of run.json that figures read."""
    shutil.copytree(GOLDEN / case, folder)
    document = {
        "n_threads": threads,
        "model": {
            "name": "a model",
            "device": "cpu",
            "cache_nblocks": cache[0],
            "cache_nways": cache[1],
            "n_experts": [8] * LAYERS,
        },
        "hardware": {"cpu": "a CPU", "gpu": {"name": "an idle GPU"}},
        "settings": {"cache": {"policy": policy}, "generation": {"batch_size": batch}},
        "summary": {"generation_throughput": throughput},
        "files": {
            "breakdown": "out.csv",
            "cachehit": "cache.csv",
            "expert_choices": "expert_choices.csv",
            "token_gen_time": "token_gen_time.csv",
        },
    }
    (folder / "run.json").write_text(json.dumps(document))
    return folder
