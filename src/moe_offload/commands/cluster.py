"""A prompt file on all machines of a Ray cluster: on each a worker that holds one engine.

The driver, which is the command itself, reads the prompts and alone writes the answers. A worker is
given some prompts, batches them as a run on one machine does, and hands over each answer as soon as
it is finished; so what was finished is on disk, whatever happens to the worker. What a worker that
failed had not finished is given out again, one prompt at a time, and one that fails so on two
workers is written with its error.

Ray's core is used and not its Data, whose unit of failure is a task: what a worker had finished of
its task would be computed again, and a prompt that kills workers would take the rest of its task
with it (`benchmarks/ray_data_study.py`).
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any, Final

from moe_offload.commands.answers import Answers
from moe_offload.commands.conversations import Conversation, Encoded, converse, encode_prompts
from moe_offload.commands.prompts import LeftOut, Prompt
from moe_offload.commands.run import open_model
from moe_offload.config import Config, ModelOptions
from moe_offload.engine.engine import Engine
from moe_offload.engine.loading import load_engine
from moe_offload.engine.memory import kv_cache_bytes
from moe_offload.errors import UserError
from moe_offload.machine.terminal import EXIT_USER_ERROR, Interruption, RunProgress, say, show
from moe_offload.model.dummy import ModelSource
from moe_offload.model.generation import context_length, unused_suggestions
from moe_offload.model.loader import PreparedModel

_MOST_BATCHES: Final = 16  # given to a worker at once: at their end its batch runs empty
_MOST_LOADS: Final = 3  # of a worker that dies each time
_OBJECTS_BYTES: Final = 128 << 20  # Ray's own store, of a cluster that is started here


class Worker:
    """What runs on a machine, in a process of its own."""

    def __init__(self, config: Config, context_tokens: int) -> None:
        self._config = config
        self._context_tokens = context_tokens
        self._loaded: tuple[Engine, Any] | None = None

    def load(self) -> str:
        """Load the model, unless it is loaded; returns the machine's name."""
        if self._loaded is None:
            config = self._config
            source, tokenizer = open_model(config.model)
            engine = load_engine(
                source, config.model, config.cache, context_tokens=self._context_tokens
            )
            engine.calibrate_for(self._context_tokens // config.generation.batch_size)
            self._loaded = engine, tokenizer
        return socket.gethostname()

    def answer(self, encoded: Sequence[Encoded]) -> Iterator[tuple[int, dict[str, Any]]]:
        """A prompt's index and what a line of answers says of it, as soon as it is finished."""
        assert self._loaded is not None
        begun: dict[int, Conversation] = {}
        batch_size = self._config.generation.batch_size
        for one, _ in converse(*self._loaded, encoded, batch_size, begun):
            if one.is_finished:
                one.finish()
                del begun[one.prompt.index]
                yield one.prompt.index, one.facts()


@dataclass(eq=False)
class Task:
    """A prompt to be answered. `suspect`: a worker failed while it had it, so it is run alone."""

    encoded: Encoded
    suspect: bool = False
    failed_on: list[int] = field(default_factory=list)

    @property
    def prompt(self) -> Prompt:
        return self.encoded[0]


@dataclass(eq=False)
class Place:
    """A worker as the driver sees it: it loads, or it answers `tasks`, or it is idle.

    `start` gives a new worker, wherever there is room. `pending` is what Ray will tell of this one
    next, None when it is idle.
    """

    number: int
    start: Callable[[], Any]
    actor: Any = None
    pending: Any = None
    tasks: dict[int, Task] = field(default_factory=dict)
    name: str = ""
    n_loads: int = 0

    @property
    def is_loaded(self) -> bool:
        return bool(self.name)

    def load(self) -> None:
        if self.actor is None:
            self.actor = self.start()
        self.name, self.n_loads = "", self.n_loads + 1
        self.pending = self.actor.load.remote()


class Queue:
    """The tasks that wait, and who may have which of them."""

    def __init__(self, encoded: Sequence[Encoded], batch_size: int) -> None:
        self._tasks = deque(Task(one) for one in encoded)
        self._batch_size = batch_size

    def __len__(self) -> int:
        return len(self._tasks)

    def put_back(self, tasks: Sequence[Task]) -> None:
        self._tasks.extendleft(reversed(tasks))

    def take(self, place: Place, places: Sequence[Place]) -> list[Task]:
        """The next tasks of an idle worker: fewer towards the end, so that all end together.

        A suspect is taken alone, by a worker that it has not failed on while there is one.
        """
        loaded = {other.number for other in places if other.is_loaded}
        for task in self._tasks:
            if task.suspect and (
                place.number not in task.failed_on or loaded <= set(task.failed_on)
            ):
                self._tasks.remove(task)
                return [task]
            if not task.suspect:
                break
        fair = len(self._tasks) // (2 * len(places))
        count = max(self._batch_size, min(fair, _MOST_BATCHES * self._batch_size))
        taken = [task for task in self._tasks if not task.suspect][:count]
        self._tasks = deque(task for task in self._tasks if task not in taken)
        return taken


def run_on_cluster(
    config: Config,
    prompts: Sequence[Prompt],
    left_out: LeftOut,
    answers: Answers,
    interruption: Interruption,
) -> int:
    """Answer `prompts` on the machines of the cluster that `config` names; returns the exit code.

    Each answer is in `answers` as soon as the driver has it. UserError without Ray, without a
    machine that can hold the model, and where no worker is left.
    """
    source, tokenizer = open_model(config.model)
    encoded = encode_prompts(tokenizer, prompts, source.config, left_out)
    answers.write_left_out(left_out)
    left_out.require_some([prompt for prompt, _ in encoded])
    longest = max(len(ids) + prompt.options.max_tokens for prompt, ids in encoded)
    longest = min(longest, context_length(source.config) or longest)
    context_tokens = longest * config.generation.batch_size
    if isinstance(source, PreparedModel):
        suggested = source.manifest.generation_config or {}
        for line in unused_suggestions(suggested, config.generation):
            say(line)
    address = config.model.ray or "local"
    started_s = time.monotonic()
    with _connected(address) as ray:
        needed_bytes = _needed_bytes(source, config.model, context_tokens)
        resources, n_machines = resources_of_workers(
            [node["Resources"] for node in ray.nodes() if node["Alive"]],
            needed_bytes,
            config.model.device,
        )
        kind = ray.remote(Worker).options(**resources)
        start = partial(kind.remote, config, context_tokens)
        places = [Place(n, start) for n in range(n_machines)]
        if not config.output.quiet:
            say(f"loading {source.name} on {n_machines} machine{'s'[: n_machines > 1]} ...")
        run = _Run(ray, config, encoded, answers, places)
        try:
            run.work()
            status = ""
        except KeyboardInterrupt:
            run.collect()
            status = f"interrupted ({interruption.name}): "
        finally:
            interruption.drops_signals = True
            run.close()
    lines = run.summary(time.monotonic() - started_s)
    if answers.n_before:
        lines.append(f"{answers.n_before} prompts were answered before")
    if not config.output.quiet:
        show("\n".join(lines))
    if status:
        say(f"{status}{run.n_answered} of {len(encoded)} prompts finished; go on with --resume")
        return interruption.exit_code
    if run.n_failed:
        say(f"{run.n_failed} prompts failed: their lines in {answers.path} say why")
        return EXIT_USER_ERROR
    return 0


class _Run:
    """The driver's loop: who is idle is given prompts, who has an answer hands it over."""

    def __init__(
        self,
        ray: Any,
        config: Config,
        encoded: Sequence[Encoded],
        answers: Answers,
        places: list[Place],
    ) -> None:
        self._ray = ray
        self._answers = answers
        self._places = places
        self._queue = Queue(encoded, config.generation.batch_size)
        self._progress = RunProgress(
            [],
            len(encoded),
            config.generation.max_tokens,
            streamed=False,
            logged=not config.output.quiet,
        )
        self.n_failed = 0
        self._n_prompts: Counter[str] = Counter()  # answered, by machine
        self._n_tokens: Counter[str] = Counter()

    @property
    def n_answered(self) -> int:
        return self._n_prompts.total()

    def work(self) -> None:
        for place in self._places:
            place.load()
        while self._queue or any(place.tasks for place in self._places):
            for place in self._places:
                if place.pending is None and (tasks := self._queue.take(place, self._places)):
                    self._give(place, tasks)
            self._hear(timeout_s=1.0)

    def _give(self, place: Place, tasks: Sequence[Task]) -> None:
        place.tasks = {task.prompt.index: task for task in tasks}
        answer = place.actor.answer.options(num_returns="streaming")
        place.pending = answer.remote([task.encoded for task in tasks])

    def _hear(self, timeout_s: float) -> bool:
        """Take in what workers tell, if any does so in time."""
        waited = {place.pending: place for place in self._places if place.pending is not None}
        ready, _ = self._ray.wait(list(waited), timeout=timeout_s)
        for pending in ready:
            place = waited[pending]
            try:
                self._take_in(place)
            except self._ray.exceptions.RayError as error:
                self._failed(place, error)
        return bool(ready)

    def _take_in(self, place: Place) -> None:
        if not place.is_loaded:
            place.name = self._ray.get(place.pending)
            place.pending, place.n_loads = None, 0
            return
        try:
            index, facts = self._ray.get(next(place.pending))
        except StopIteration:
            assert not place.tasks
            place.pending = None
            return
        self._answers.write(place.tasks[index].prompt, facts)
        del place.tasks[index]
        self._n_prompts[place.name] += 1
        self._n_tokens[place.name] += facts["generated_tokens"]
        self._progress.token(facts["generated_tokens"])
        self._progress.prompt_done()

    def _failed(self, place: Place, error: Exception) -> None:
        """Give out again what the worker had and load it anew; one that cannot is left out."""
        reason = _reason(error)
        was_loaded, tasks = place.is_loaded, list(place.tasks.values())
        place.tasks = {}
        if was_loaded:
            say(f"a worker on {place.name} failed ({reason}): what it had is done again")
        again = []
        for task in tasks:
            if len(tasks) == 1:
                task.failed_on.append(place.number)
            task.suspect = True
            if len(task.failed_on) < 2:
                again.append(task)
            else:
                self._answers.write_failure(task.prompt, reason)
                self.n_failed += 1
                self._progress.prompt_done()
        self._queue.put_back(again)
        if isinstance(error, self._ray.exceptions.RayActorError):
            # Another is started: Ray's own restart refuses calls until it is there. A worker that
            # has only raised lives, and has its model.
            self._ray.kill(place.actor)
            place.actor = None
        is_hopeless = isinstance(getattr(error, "cause", None), UserError)
        if not was_loaded and (is_hopeless or place.n_loads >= _MOST_LOADS):
            self._places.remove(place)
            say(f"a worker is left out: it cannot load the model ({reason})")
            if not self._places:
                raise UserError(f"no worker could load the model: {reason}")
            return
        place.load()

    def collect(self) -> None:
        """Take in what workers have handed over already."""
        with suppress(KeyboardInterrupt):
            while self._hear(timeout_s=0):
                pass

    def close(self) -> None:
        self._progress.close()
        for place in self._places:
            if place.actor is not None:
                self._ray.kill(place.actor)

    def summary(self, seconds: float) -> list[str]:
        n_tokens = self._n_tokens.total()
        machines = ", ".join(
            f"{name}: {count} prompts, {self._n_tokens[name]} tokens"
            for name, count in sorted(self._n_prompts.items())
        )
        return [
            f"{self.n_answered} prompts answered in {seconds:.1f} s, loading included: "
            f"{n_tokens} tokens, {n_tokens / seconds:.1f} tok/s",
            f"by machine: {machines or 'none'}",
        ]


def resources_of_workers(
    machines: Sequence[Mapping[str, float]], needed_bytes: int, device: str
) -> tuple[dict[str, Any], int]:
    """What a worker claims of its machine, so that none has two, and how many machines have that.

    `machines` are what Ray says that each has. Of memory a worker claims what it needs, and in
    any case more than half of the largest machine. UserError where no machine is large enough.
    """
    wants_gpu = device == "cuda" or (
        device == "auto" and any(one.get("GPU", 0) >= 1 for one in machines)
    )
    able = [
        one
        for one in machines
        if one.get("memory", 0) >= needed_bytes
        and one.get("CPU", 0) >= 1
        and (not wants_gpu or one.get("GPU", 0) >= 1)
    ]
    if not able:
        largest = max((one.get("memory", 0) for one in machines), default=0)
        also = " and a GPU" if wants_gpu else ""
        raise UserError(
            f"expected a machine in the Ray cluster with {needed_bytes / 1e9:.1f} GB of memory"
            f"{also} for the model, found {len(machines)} with at most {largest / 1e9:.1f} GB: add "
            "larger ones, prepare the model with --expert-dtype int4, or hold fewer experts with "
            "--host-memory-gb"
        )
    memory_bytes = max(needed_bytes, int(max(one["memory"] for one in able)) // 2 + 1)
    able = [one for one in able if one["memory"] >= memory_bytes]
    if len(able) < len(machines):
        say(f"{len(machines) - len(able)} of {len(machines)} machines are too small, left out")
    claims = {
        "num_cpus": int(min(one["CPU"] for one in able)),
        "num_gpus": int(wants_gpu),
        "memory": memory_bytes,
    }
    return claims, len(able)


def _needed_bytes(source: ModelSource, options: ModelOptions, context_tokens: int) -> int:
    """Of memory, for the experts that a worker holds, the dense weights and the KV cache."""
    expert_bytes = source.expert_bytes
    if options.host_memory_gb is not None:
        expert_bytes = min(expert_bytes, int(options.host_memory_gb * 1e9))
    kv_bytes = kv_cache_bytes(source.config, context_tokens, source.dtype.itemsize)
    return expert_bytes + source.dense_bytes + kv_bytes


def _reason(error: Exception) -> str:
    """What a worker's exception says, or the end of what Ray says of its death."""
    cause = getattr(error, "cause", None)
    lines = str(cause or error).strip().splitlines() or [""]
    line = shorten(lines[0] if cause else lines[-1], 300, placeholder=" ...")
    return f"{type(cause or error).__name__}: {line}"


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Ray, connected to the cluster at `address`, or to one that is started for this command."""
    import ray

    package = Path(__file__).parents[1]  # every machine runs this code, whatever it has itself
    settings: dict[str, Any] = {
        "address": address,
        "log_to_driver": False,
        "runtime_env": {"py_modules": [str(package)]},
    }
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        settings |= {"include_dashboard": False, "object_store_memory": _OBJECTS_BYTES}
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**settings, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot reach a Ray cluster at {address} ({str(error).splitlines()[0]}): start one "
            "with ray start --head, on a machine of which this command runs, or use --ray local"
        ) from error
    try:
        with suppress(ValueError):  # Ray has put its own handler there
            signal.signal(signal.SIGTERM, before)
        yield ray
    finally:
        ray.shutdown()
