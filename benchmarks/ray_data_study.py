"""What Ray Data makes of a prompt file: how soon an answer is there, and what a worker's end costs.

python3 benchmarks/ray_data_study.py

The reason why commands/cluster.py uses Ray's core. Two nodes on this machine, a worker on each, 24
prompts that take 0.3 s each; the workers' function is a generator and the blocks are as small as
they can be, so that each answer leaves as soon as it is finished. One worker is killed after eight
answers; in a second run, prompt 5 ends every worker that has it. Needs pip install 'ray[data]'.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

N_PROMPTS, PROMPT_S, N_BEFORE_KILL, DEADLY = 24, 0.3, 8, 5


class Worker:
    """Answers one prompt after the other; notes each in `folder`."""

    def __init__(self, folder: str, deadly: int) -> None:
        self._answered = Path(folder) / "answered"
        self._deadly = deadly

    def __call__(self, batch: Any) -> Iterator[Any]:
        for index in batch["index"]:
            time.sleep(PROMPT_S)
            if index == self._deadly:
                os._exit(1)
            with self._answered.open("a") as file:
                file.write(f"{os.getpid()}\n")
            yield {"index": [index], "finished_s": [time.time()]}


def run(folder: Path, batch_size: int, deadly: int = -1, retries: int = -1) -> str:
    prompts, answered = folder / "prompts.jsonl", folder / "answered"
    prompts.write_text("".join(json.dumps({"index": n}) + "\n" for n in range(N_PROMPTS)))
    answered.write_text("")

    def kill() -> None:
        while len(pids := answered.read_text().split()) < N_BEFORE_KILL:
            time.sleep(0.01)
        os.kill(int(pids[-1]), signal.SIGKILL)

    if deadly < 0:
        threading.Thread(target=kill, daemon=True).start()
    # what a worker claims leaves a CPU for reading, without which nothing would begin
    answers = ray.data.read_json(str(prompts), lines=True).map_batches(
        Worker, fn_constructor_args=(str(folder), deadly), batch_size=batch_size,
        compute=ray.data.ActorPoolStrategy(size=2), num_cpus=1, memory=(1 << 30) + 1,
        max_restarts=-1, max_task_retries=retries,
    )  # fmt: skip
    found, waited_s = set(), []
    for one in answers.iter_batches(batch_size=1, prefetch_batches=0):
        found.add(int(one["index"][0]))
        waited_s.append(time.time() - float(one["finished_s"][0]))
    n_answered = len(answered.read_text().split())
    missing = sorted(set(range(N_PROMPTS)) - found)
    return (
        f"{len(found)} of {N_PROMPTS} prompts, {n_answered} answers computed, missing {missing}; "
        f"an answer reached the driver after {statistics.median(waited_s):.2f} s (median)"
    )


def main() -> None:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    node = {"num_cpus": 2, "memory": 2 << 30, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    cluster.add_node(**node)
    ray.init(cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = 1
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # what fails is left out, the others go on
    with tempfile.TemporaryDirectory() as folder:
        print("a worker killed:", run(Path(folder), batch_size=N_PROMPTS))
        print("a deadly prompt:", run(Path(folder), batch_size=N_PROMPTS, deadly=DEADLY, retries=1))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
