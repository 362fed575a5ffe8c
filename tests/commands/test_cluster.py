"""The driver of a Ray cluster, with workers that fail as they are told; Ray itself: tests/whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_offload.commands import generate
from moe_offload.commands.answers import Answers
from moe_offload.commands.cluster import Place, Queue, _needed_bytes, _Run, resources_of_workers
from moe_offload.commands.prompts import Prompt
from moe_offload.config import (
    CacheOptions,
    Config,
    GenerationOptions,
    ModelOptions,
    OutputOptions,
    PromptOptions,
)
from moe_offload.errors import UserError
from moe_offload.model.dummy import DummyModel

GB = 1 << 30
FACTS = {"response": "x", "stop": "eos", "generated_tokens": 1}


class WorkerError(Exception):
    """As Ray's exceptions: `cause` is what the worker raised, None where it died."""

    def __init__(self, cause: Exception | None = None) -> None:
        super().__init__("first\nlast line")
        self.cause = cause


class WorkerDiedError(WorkerError):
    """Its process, or its machine."""


@dataclass(eq=False)
class Ref:
    """What Ray will know later."""

    value: Callable[[], Any]


@dataclass(eq=False)
class Actor:
    """Answers one prompt at a time; dies with those of `deadly`, and at its first `n_bad_loads`."""

    deadly: Sequence[int] = ()
    wrong: Sequence[int] = ()  # those that raise, and leave it alive
    n_starts: int = 0
    n_bad_loads: int = 0
    load_error: Exception = field(default_factory=WorkerError)
    given: list[list[int]] = field(default_factory=list)

    @property
    def load(self) -> Any:
        return SimpleNamespace(remote=lambda: Ref(self._load))

    @property
    def answer(self) -> Any:
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._answer))

    def _load(self) -> str:
        self.n_bad_loads -= 1
        if self.n_bad_loads >= 0:
            raise self.load_error
        return "machine"

    def _answer(self, encoded: Sequence[Any]) -> Iterator[Any]:
        self.given.append([prompt.index for prompt, _ in encoded])
        for prompt, _ in encoded:

            def value(index: int = prompt.index) -> tuple[int, dict[str, Any]]:
                if index in self.deadly:
                    raise WorkerDiedError
                if index in self.wrong:
                    raise WorkerError(ValueError("no"))
                return index, FACTS

            yield Ref(value)


def started(actor: Actor) -> Actor:
    actor.n_starts += 1
    return actor


RAY = SimpleNamespace(
    wait=lambda pending, timeout: (pending, []),
    get=lambda ref: ref.value(),
    kill=lambda actor: None,
    exceptions=SimpleNamespace(RayError=WorkerError, RayActorError=WorkerDiedError),
)


def driven(
    folder: Path, actors: Sequence[Actor], n_prompts: int = 8
) -> tuple[_Run, dict[int, dict[str, Any]]]:
    """A run on `actors` and the lines of its answers, by index."""
    path = folder / "answers"
    config = Config(
        ModelOptions(None, dummy_shape="mixtral-8x7b"), CacheOptions(), GenerationOptions(4),
        PromptOptions("text"), OutputOptions(responses_jsonl=path, quiet=True),
    )  # fmt: skip
    prompts = [Prompt(n, f"prompt {n}", config.generation) for n in range(n_prompts)]
    places = [Place(number, partial(started, actor)) for number, actor in enumerate(actors)]
    with Answers(path, config) as answers:
        run = _Run(RAY, config, [(one, [1]) for one in prompts], answers, places)
        run.work()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["index"] for line in lines}) == len(lines), "none is written twice"
    return run, {line["index"]: line for line in lines}


def test_all_are_answered_once(tmp_path: Path) -> None:
    actors = [Actor(), Actor(), Actor()]
    run, lines = driven(tmp_path, actors, 100)
    assert sorted(lines) == list(range(100))
    assert run.n_answered == 100 and not run.n_failed
    sizes = [len(given) for given in actors[0].given]
    assert sizes[0] == 16 and sizes[-1] == 1
    assert all(actor.given for actor in actors)


def test_what_kills_workers_is_found_and_written_and_the_others_are_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    actors = [Actor(deadly=[1, 5]), Actor(deadly=[1])]
    run, lines = driven(tmp_path, actors)
    assert sorted(lines) == list(range(8))
    assert [index for index, line in lines.items() if "error" in line] == [1]
    assert lines[1]["error"] == "WorkerDiedError: last line"
    assert (run.n_answered, run.n_failed) == (7, 1)
    tries = [sum(1 in given for given in actor.given) for actor in actors]
    assert tries == [1, 1], "on each worker once, the second time alone"
    assert [1] in actors[0].given + actors[1].given
    assert "what it had is done again" in capsys.readouterr().err


def test_the_only_worker_has_two_tries(tmp_path: Path) -> None:
    actor = Actor(deadly=[0])
    run, lines = driven(tmp_path, [actor], 3)
    assert actor.given.count([0]) == 2
    assert run.n_failed == 1
    assert sorted(lines) == [0, 1, 2]


def test_a_worker_that_died_is_another_one_and_one_that_raised_is_kept(tmp_path: Path) -> None:
    actors = [Actor(deadly=[0]), Actor(wrong=[7])]
    _, lines = driven(tmp_path, actors, 8)
    assert sorted(lines) == list(range(8))
    assert (actors[0].n_starts > 1) == any(0 in given for given in actors[0].given)
    assert actors[1].n_starts == 1


def test_a_worker_that_cannot_load_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for error, n_loads in ((WorkerError(), 3), (WorkerError(UserError("too small")), 1)):
        bad = Actor(n_bad_loads=99, load_error=error)
        (folder := tmp_path / str(n_loads)).mkdir()
        run, _ = driven(folder, [bad, Actor(n_bad_loads=2)])
        assert run.n_answered == 8
        assert 99 - bad.n_bad_loads == n_loads
        assert "cannot load the model" in capsys.readouterr().err
    with pytest.raises(UserError, match="no worker could load the model: UserError: too small"):
        driven(tmp_path, [Actor(n_bad_loads=99, load_error=WorkerError(UserError("too small")))])


def test_a_suspect_waits_for_a_worker_that_it_has_not_failed_on() -> None:
    places = [Place(n, None, name="loaded") for n in range(2)]
    queue = Queue([(Prompt(0, "x", GenerationOptions(1)), [1])], 1)
    (task,) = queue.take(places[0], places)
    task.suspect, task.failed_on = True, [0]
    queue.put_back([task])
    assert queue.take(places[0], places) == []
    places[1].name = ""  # the other is gone
    assert queue.take(places[0], places) == [task]


@pytest.mark.parametrize(
    ("memories", "needed_gb", "n_workers", "memory_bytes"),
    [
        ([10, 10], 4, 2, 5 * GB + 1),
        ([10, 10], 8, 2, 8 * GB),
        ([10, 10, 3], 4, 2, 5 * GB + 1),
        ([10, 4], 4, 1, 5 * GB + 1),  # else the larger might have two
    ],
)
def test_no_machine_has_room_for_two_workers(
    memories: list[int], needed_gb: int, n_workers: int, memory_bytes: int
) -> None:
    machines = [{"CPU": 8.0, "memory": float(gb * GB)} for gb in memories]
    claims, count = resources_of_workers(machines, needed_gb * GB, "auto")
    assert claims == {"num_cpus": 8, "num_gpus": 0, "memory": memory_bytes}
    assert count == n_workers
    assert all(2 * claims["memory"] > machine["memory"] for machine in machines)


def test_a_worker_needs_memory_for_the_experts_that_it_holds() -> None:
    source = DummyModel(ModelOptions(None, dummy_shape="mixtral-8x7b", dummy_layers=1))
    expert_bytes = 8 * source.layouts[0].block_bytes
    prepared = ModelOptions(Path("folder"))
    all_bytes = _needed_bytes(source, prepared, context_tokens=10)
    assert all_bytes > expert_bytes + source.dense_bytes
    for asked_gb, held_bytes in ((1.5, 1_500_000_000), (1000, expert_bytes)):
        asked = replace(prepared, host_memory_gb=asked_gb)
        needed_bytes = _needed_bytes(source, asked, context_tokens=10)
        assert all_bytes - needed_bytes == expert_bytes - held_bytes


def test_machines_that_cannot_serve_are_left_out() -> None:
    gpu = {"CPU": 4.0, "memory": 9.0 * GB, "GPU": 2.0}
    cpu = {"CPU": 16.0, "memory": 9.0 * GB}
    no_work = {"memory": 9.0 * GB}
    assert resources_of_workers([gpu, cpu, no_work], GB, "auto")[1] == 1
    claims, count = resources_of_workers([gpu, cpu, no_work], GB, "cpu")
    assert (claims["num_cpus"], claims["num_gpus"], count) == (4, 0, 2)
    for machines, device in (([cpu], "cuda"), ([], "auto"), ([no_work], "cpu")):
        with pytest.raises(UserError, match=r"a machine in the Ray cluster with 1\.1 GB"):
            resources_of_workers(machines, GB, device)


def test_a_missing_ray_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate, "find_spec", lambda name: None if name == "ray" else name)
    flags = ("--prompt-path", "p", "--responses-jsonl", "a", "--ray", "local")
    assert generate.main(["--model-path", "m", "--max-tokens", "4", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--ray needs Ray: pip install -r requirements-ray.txt" in line
