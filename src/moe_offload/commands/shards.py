"""Which part of the prompts this machine answers: `--shard i/n`, or what its scheduler says.

Prompt number k (from 0) is of shard k % n + 1, so that long and short parts of a file are shared
evenly, and an answer keeps its prompt's number whatever the shards are.
"""

from __future__ import annotations

import os
import re
from typing import Final

from moe_offload.errors import UserError

Shard = tuple[int, int]  # its place, counted from 0, and how many there are

WHOLE: Final[Shard] = (0, 1)


def parse_shard(text: str) -> Shard:
    """The shard that `--shard` names; UserError for what is none."""
    if text == "auto":
        return _of_scheduler()
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"expected --shard as i/n with i from 1 to n, or auto, found '{text}'")
    return int(found[1]) - 1, int(found[2])


def _of_scheduler() -> Shard:
    """Of SkyPilot's jobs and their nodes, else of Slurm's array and the tasks of its `srun`."""
    # A line of SKYPILOT_NODE_IPS for each node; before its release 0.6 nothing else counts them.
    n_nodes = str(len(os.environ.get("SKYPILOT_NODE_IPS", "").split()))
    skypilot = (
        _counted(os.environ.get("SKYPILOT_JOB_RANK"), os.environ.get("SKYPILOT_NUM_JOBS")),
        _counted(
            os.environ.get("SKYPILOT_NODE_RANK"), os.environ.get("SKYPILOT_NUM_NODES", n_nodes)
        ),
    )
    slurm = (
        _of_array(),
        _counted(os.environ.get("SLURM_PROCID"), os.environ.get("SLURM_STEP_NUM_TASKS")),
    )
    for scheduler in (skypilot, slurm):
        known = [level for level in scheduler if level is not None]
        if known:
            place, count = WHOLE
            for inner_place, inner_count in known:
                place, count = place * inner_count + inner_place, count * inner_count
            return place, count
    raise UserError(
        "--shard auto needs the variables of a Slurm array, of srun or of SkyPilot, found none: "
        "name the shard as i/n"
    )


def _of_array() -> Shard | None:
    place = os.environ.get("SLURM_ARRAY_TASK_ID")
    count = os.environ.get("SLURM_ARRAY_TASK_COUNT")
    first = os.environ.get("SLURM_ARRAY_TASK_MIN")
    last = os.environ.get("SLURM_ARRAY_TASK_MAX")
    if place is None or count is None or first is None or last is None:
        return None
    step, uneven = divmod(int(last) - int(first), max(int(count) - 1, 1))
    number, between = divmod(int(place) - int(first), max(step, 1))
    if uneven or between:
        raise UserError(
            f"--shard auto cannot count the {count} indexes of this Slurm array from {first} to "
            f"{last}: use evenly spaced ones such as --array=0-9, or name the shard as i/n"
        )
    return _counted(str(number), count)


def _counted(place: str | None, count: str | None) -> Shard | None:
    if place is None or count is None:
        return None
    if not int(place) < int(count):
        raise UserError(f"--shard auto found place {place} of {count}: name the shard as i/n")
    return int(place), int(count)
