"""The prompts of a run: of the command line, of standard input, or of the lines of a file.

And which of a file's this machine answers: prompt number k (from 0) is of shard k % n + 1, so that
long and short parts of a file are shared evenly, and an answer keeps its prompt's number whatever
the shards are.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, Final

from moe_offload.commands.openai_format import Endpoint, is_request, read_request
from moe_offload.config import GenerationOptions, PromptOptions, flag_of
from moe_offload.errors import UserError
from moe_offload.machine.terminal import say

Messages = tuple[dict[str, str], ...]  # of a chat: each a role and its content

_LARGEST_FILE_BYTES: Final = 64 << 20  # a million long prompts; more is a wrong file
_TOLD: Final = 10  # so many lines that are left out are told of one by one
_ROLES: Final = ("system", "user", "assistant")
# What a line of JSON may say besides its prompt: how it alone is answered.
_SETTINGS: Final = {one.name for one in fields(GenerationOptions)} - {"batch_size"}
# A zero, and half of a surrogate pair, which bytes that are no UTF-8 and JSON escapes give.
_NO_TEXT: Final = re.compile("[\0\ud800-\udfff]")


@dataclass(frozen=True)
class Prompt:
    """A prompt, how it is to be answered, and where it comes from.

    `text` is a prompt, or the messages of a chat. `index` counts the prompts of the run from 0.
    `name` is what messages call it: its line of the file. `raw`: no chat template around it.
    With an `endpoint` it came, and is answered, in OpenAI's batch format, its `id` the custom_id.
    """

    index: int
    text: str | Messages
    options: GenerationOptions
    id: str | int | None = None
    name: str = "the prompt"
    raw: bool = False
    endpoint: Endpoint | None = None

    @property
    def shown(self) -> str:
        """What a person sees of it: of a chat its last message."""
        return self.text if isinstance(self.text, str) else self.text[-1]["content"]


@dataclass(frozen=True)
class Unusable:
    """A line of a file that holds no prompt, why, and whose it is where it says so."""

    error: UserError
    custom_id: str | None = None


class LeftOut:
    """The prompts of a file that cannot be answered: each is told of, and the others are run."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.reasons: list[str] = []
        self.requests: dict[str, str] = {}  # by custom_id: those of a batch expect a line

    def add(self, error: UserError, custom_id: str | None = None) -> None:
        """Raises it where there is no file, and so no other prompt."""
        if self.path is None:
            raise error
        if custom_id is not None:
            self.requests[custom_id] = str(error)
        if str(error) not in self.reasons:  # of a file that is run several times over
            self.reasons.append(str(error))
            if len(self.reasons) <= _TOLD:
                say(f"left out: {error}")

    def require_some(self, prompts: Sequence[Prompt]) -> None:
        """UserError where nothing is left to run; why has been said."""
        if not prompts and self.reasons:
            raise UserError(f"no prompt of {self.path} can be answered (left out, see above)")

    def notes(self) -> list[str]:
        """Lines for the summary."""
        n_more = len(self.reasons) - _TOLD
        notes = [f"left out: {reason}" for reason in self.reasons[:_TOLD]]
        return notes + ([f"left out: {n_more} more lines"] if n_more > 0 else [])


def read_prompts(
    options: PromptOptions, generation: GenerationOptions
) -> tuple[list[Prompt], LeftOut]:
    """The prompts to run, in order; more than the file has cycles through it.

    A file's line ends at a line feed, a carriage return or both, and keeps its spaces; lines
    without text are skipped. Of a file called *.jsonl each line is an object (docs: README). A line
    that cannot be used is left out; where none is left that is a UserError, except for requests of
    a batch, which are to be answered first. UserError for an empty prompt, and for a file that is
    missing, empty, binary or too large to be a list of prompts.
    """
    left_out = LeftOut(options.path)
    place, n_shards = (0, 1) if options.shard is None else parse_shard(options.shard)
    found: Sequence[Prompt | Unusable]
    if options.path is None:
        text = options.prompt or ""
        if text == "-":
            text = _read(sys.stdin.buffer, "standard input").removesuffix("\n")
        if not text.strip():
            raise UserError("the prompt is empty: give --prompt some text")
        found = [Prompt(0, text, generation)]
    elif options.path.suffix == ".jsonl":
        found = list(_json_prompts(options.path, generation))
    else:
        lines = _lines(options.path)
        found = [Prompt(0, text, generation, None, name) for name, text in lines]
    prompts = []
    for index in range(place, options.n_prompts or len(found), n_shards):
        one = found[index % len(found)]
        if isinstance(one, Unusable):  # it keeps its number
            left_out.add(one.error, one.custom_id)
            continue
        one = replace(one, index=index, raw=options.raw or one.raw)
        prompts.append(one if one.raw else replace(one, text=_chat(one.text, options.system)))
    if not left_out.requests:
        left_out.require_some(prompts)
    return prompts, left_out


def _chat(text: str | Messages, system: str | None) -> str | Messages:
    if system is None:
        return text
    if isinstance(text, str):
        text = ({"role": "user", "content": text},)
    # A chat that has a system message of its own keeps it.
    return text if text[0]["role"] == "system" else ({"role": "system", "content": system}, *text)


def _lines(path: Path) -> list[tuple[str, str]]:
    """The names of the lines that have text, and their texts."""
    try:
        if not path.is_file() and path.exists():
            raise UserError(f"{path} is not a file: expected one of prompts, one per line")
        with path.open("rb") as file:
            text = _read(file, str(path))
    except OSError as error:
        raise UserError(f"cannot read the prompt file {path}: {error.strerror}") from error
    if "\0" in text:
        raise UserError(f"{path} is a binary file: expected text, one prompt per line")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    found = [
        (f"line {number} of {path}", line)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not found:
        raise UserError(f"{path} holds no prompt: expected one per line")
    return found


def _read(file: BinaryIO, name: str) -> str:
    data = file.read(_LARGEST_FILE_BYTES + 1)
    if len(data) > _LARGEST_FILE_BYTES:
        raise UserError(
            f"{name} has more than {_LARGEST_FILE_BYTES / 1e6:.0f} MB, expected a text of prompts: "
            "split it"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name} is not a UTF-8 text file (byte {error.start}, in line {line}): expected one "
            "prompt per line; convert it to UTF-8"
        ) from error


def _json_prompts(path: Path, generation: GenerationOptions) -> Iterator[Prompt | Unusable]:
    """What each line of JSON holds."""
    lines_of_ids: dict[str, str] = {}
    for name, line in _lines(path):
        custom_id: str | None = None
        try:
            found = _json_object(line)
            given = found.get("custom_id")
            if isinstance(given, str) and repr(given) not in lines_of_ids:
                custom_id = given
            if is_request(found):
                given, endpoint, body = read_request(found, generation.temperature)
                prompt = replace(
                    _json_prompt(body, name, generation),
                    id=given,
                    endpoint=endpoint,
                    raw=endpoint == "/v1/completions",
                )
            else:
                prompt = _json_prompt(found, name, generation)
            first = name if prompt.id is None else lines_of_ids.setdefault(repr(prompt.id), name)
            if first != name:
                raise UserError(f"has the id {prompt.id!r} of {first}: ids must differ")
            yield prompt
        except UserError as error:
            yield Unusable(UserError(f"{name} {error}"), custom_id)


def _json_object(line: str) -> dict[str, Any]:
    """The object of a line; UserError, to be read after the line's name, for what is none."""
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"is not JSON ({error.msg}, character {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"is {type(found).__name__}, expected an object with a prompt or messages")
    return found


def _json_prompt(found: dict[str, Any], line_name: str, generation: GenerationOptions) -> Prompt:
    """The prompt of a line; UserError, to be read after the line's name, for what is none."""
    known = {"prompt", "messages", "id"} | _SETTINGS
    if unknown := sorted(found.keys() - known):
        raise UserError(
            f"has the unknown field {unknown[0]!r}: known are {', '.join(sorted(known))}"
        )
    if ("prompt" in found) == ("messages" in found):
        raise UserError("needs a prompt or messages, and not both")
    text = _text(found["prompt"]) if "prompt" in found else _messages(found["messages"])
    name = found.get("id")
    if name is not None and (isinstance(name, bool) or not isinstance(name, (str, int))):
        raise UserError(f"has the id {name!r}: expected a text or a whole number")
    return Prompt(0, text, _own_options(found, generation), name, line_name)


def _own_options(found: dict[str, Any], generation: GenerationOptions) -> GenerationOptions:
    settings = {name: found[name] for name in _SETTINGS if found.get(name) is not None}
    if "stop" in settings:
        stop = settings["stop"]
        settings["stop"] = tuple(stop) if isinstance(stop, list) else (stop,)
    try:
        return replace(generation, **settings)
    except UserError as error:
        reason = str(error)
        for one in fields(GenerationOptions):  # the line's words, not the command line's
            reason = reason.replace(flag_of(one).name, one.name)
        raise UserError(f"has other settings than can be: {reason}") from error


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(
            "has an empty prompt" if value == "" else f"has no text as prompt: {value!r}"
        )
    if _NO_TEXT.search(value):
        raise UserError("has text that is not Unicode")
    return value


def _messages(value: object) -> Messages:
    if not isinstance(value, list) or not value:
        raise UserError("has no messages: expected a list of objects with role and content")
    messages = []
    for message in value:
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise UserError("has a message that is not an object with role and content alone")
        if message["role"] not in _ROLES:
            raise UserError(f"has a message of role {message['role']!r}, expected {_ROLES}")
        messages.append({"role": str(message["role"]), "content": _text(message["content"])})
    return tuple(messages)


def parse_shard(text: str) -> tuple[int, int]:
    """The (place, count from 0; how many there are) of `--shard`; UserError for what is none."""
    if text == "auto":
        return _of_scheduler()
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"expected --shard as i/n with i from 1 to n, or auto, found '{text}'")
    return int(found[1]) - 1, int(found[2])


def _of_scheduler() -> tuple[int, int]:
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
            place, count = 0, 1
            for inner_place, inner_count in known:
                place, count = place * inner_count + inner_place, count * inner_count
            return place, count
    raise UserError(
        "--shard auto needs the variables of a Slurm array, of srun or of SkyPilot, found none: "
        "name the shard as i/n"
    )


def _of_array() -> tuple[int, int] | None:
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


def _counted(place: str | None, count: str | None) -> tuple[int, int] | None:
    if place is None or count is None:
        return None
    if not int(place) < int(count):
        raise UserError(f"--shard auto found place {place} of {count}: name the shard as i/n")
    return int(place), int(count)
