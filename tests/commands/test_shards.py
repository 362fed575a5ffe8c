"""Which prompts are a machine's: by hand, by Slurm's variables, by SkyPilot's."""

from __future__ import annotations

import pytest

from moe_offload.commands.shards import parse_shard
from moe_offload.errors import UserError


def array(place: int, count: int, first: int, last: int) -> dict[str, object]:
    names = ("ID", "COUNT", "MIN", "MAX")
    values = zip(names, (place, count, first, last), strict=True)
    return {f"SLURM_ARRAY_TASK_{name}": value for name, value in values}


STEP = {"SLURM_PROCID": 1, "SLURM_STEP_NUM_TASKS": 4}
NODE = {"SKYPILOT_NODE_RANK": 2, "SKYPILOT_NUM_NODES": 3}
JOB = {"SKYPILOT_JOB_RANK": 1, "SKYPILOT_NUM_JOBS": 5}


@pytest.mark.parametrize(
    ("variables", "shard"),
    [
        (array(3, 10, 0, 9), (3, 10)),
        (array(1, 10, 1, 10), (0, 10)),
        (array(5, 4, 1, 7), (2, 4)),
        (array(8, 1, 8, 8), (0, 1)),
        (STEP, (1, 4)),
        (array(2, 3, 0, 2) | STEP, (9, 12)),
        (NODE, (2, 3)),
        ({"SKYPILOT_NODE_RANK": 1, "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n"}, (1, 2)),
        (JOB | NODE, (5, 15)),
        (STEP | NODE, (2, 3)),  # SkyPilot started on Slurm
        ({"SLURM_PROCID": 0, "SLURM_NTASKS": 4} | NODE, (2, 3)),
    ],
)
def test_a_scheduler_says_it(
    variables: dict[str, object], shard: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    assert parse_shard("auto") == shard


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "found none: name the shard as i/n"),
        # a batch script's own variables, outside srun: one process for all of its tasks
        ({"SLURM_PROCID": 0, "SLURM_NTASKS": 4}, "found none"),
        (array(3, 3, 1, 7), "evenly spaced"),
        (array(2, 3, 1, 7), "evenly spaced"),
        (array(9, 3, 1, 5), "place 4 of 3"),
    ],
)
def test_what_a_scheduler_does_not_say_is_not_guessed(
    variables: dict[str, object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=said):
        parse_shard("auto")


def test_a_shard_by_hand() -> None:
    assert [parse_shard(text) for text in ("1/1", "1/3", "3/3")] == [(0, 1), (0, 3), (2, 3)]
    for text in ("0/3", "4/3", "1", "a/b", "-1/3", "1/0", "", "1/3/5"):
        with pytest.raises(UserError, match="with i from 1 to n, or auto"):
            parse_shard(text)
