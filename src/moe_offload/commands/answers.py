"""The file of answers, `--responses-jsonl`: what is finished is never lost, and is not done twice.

A line for each prompt, written when its answer is finished:
index, id (where the prompt has one), prompt or messages, response, stop, prompt_tokens,
generated_tokens, prefill_s, decode_s, and settings: all that the answer depends on. A prompt in
OpenAI's batch format is answered in that; the line's id then stands for prompt, model and settings.
A prompt that failed has a line with its error, and is done again by a resume: of several lines the
last one counts.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, Final

from moe_offload.checkpoint.folders import MANIFEST_NAME
from moe_offload.commands.openai_format import answer_line, error_line
from moe_offload.commands.prompts import LeftOut, Prompt
from moe_offload.config import Config
from moe_offload.errors import UserError

_LONGEST_LINE_BYTES: Final = 256 << 20  # four times the largest prompt


class Answers:
    """An answers file that no other run can write, until it is closed.

    An existing file is taken only to `resume` it: its finished answers stay as they are, and what
    follows the last of them (an interrupted answer, half a line) goes when the next is written.
    UserError for a file that has answers otherwise, that another run is writing, or that is no
    file of answers. A device or a pipe is written as it is.
    """

    def __init__(self, path: Path, config: Config) -> None:
        self.path = path
        self._model = _model_name(config)
        self._lines: list[dict[str, Any]] = []  # of finished answers
        self._failed: set[tuple[str, str]] = set()  # what is said of requests that failed
        self._was_there = path.exists() or path.is_symlink()
        self._is_file = not path.exists() or path.is_file()
        try:
            self._handle = _locked(path) if self._is_file else _device(path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        self._end = 0  # of the finished answers
        # Which prompt's line was begun last, and where it ends once it is whole.
        self._last: tuple[object, int] = (None, -1)
        try:
            if self._is_file and os.fstat(self._handle).st_size:
                if not config.output.resume:
                    raise UserError(
                        f"{path} holds answers already: go on with them by --resume, or name "
                        "another file with --responses-jsonl"
                    )
                self._read()
        except BaseException:
            self.close()
            raise

    @property
    def n_before(self) -> int:
        """How many finished answers the file had when it was opened."""
        return len(self._lines)

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> None:
        """Take in the finished answers; UserError for a line that is none, unless it is half of one
        and the last.
        """
        place, half = 0, 0
        with os.fdopen(os.dup(self._handle), "rb") as file:
            lines = iter(lambda: file.readline(_LONGEST_LINE_BYTES), b"")
            for number, line in enumerate(lines, start=1):
                place += len(line)
                answer = None if half else _answer(line)
                if answer is None:
                    begins = line.strip(b"\0")[:2]  # a power cut may leave zeros
                    is_half = not line.endswith(b"\n") and begins in (b"", b"{", b'{"')
                    if half or not is_half:
                        raise UserError(
                            f"line {half or number} of {self.path} is no answer of a run: mend or "
                            "remove it, or name another file"
                        )
                    half = number
                elif answer.get("stop") != "interrupted":
                    self._end = place
                    if _is_finished(answer):
                        self._lines.append(answer)
                    elif "custom_id" in answer:
                        self._failed.add(_failure(answer))

    def settings(self, prompt: Prompt) -> dict[str, Any]:
        """All that the answer to `prompt` depends on besides its text."""
        options = asdict(prompt.options)
        del options["batch_size"]
        run = {"model": self._model, "raw": prompt.raw}
        return run | options | {"stop": list(prompt.options.stop)}

    def unanswered(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts that have no finished answer yet: told apart by id, else by their number.

        UserError where an answer is to another prompt, or was made with other settings.
        """
        answers: dict[object, list[dict[str, Any]]] = {}
        for line in self._lines:
            answers.setdefault(_key_of_line(line), []).append(line)
        left = []
        for prompt in prompts:
            if of_prompt := answers.get(_key(prompt.id, prompt.index)):
                self._require_same(of_prompt.pop(0), prompt)
            else:
                left.append(prompt)
        for line in chain.from_iterable(answers.values()):
            name = f"custom_id {line['custom_id']!r}" if "index" not in line else line["index"]
            raise self._other(f"holds an answer to a prompt that is not among these ({name})")
        return left

    def _require_same(self, line: dict[str, Any], prompt: Prompt) -> None:
        if "custom_id" in line:
            if line.get("id") != f"batch_req_{self._identity(prompt)}":
                raise self._other(
                    f"holds an answer to another prompt than that of {prompt.name}, or of another "
                    "model or settings"
                )
            return
        if any(line.get(key) != value for key, value in _source(prompt).items()):
            raise self._other(f"holds an answer to another prompt than that of {prompt.name}")
        before = line.get("settings")
        before = before if isinstance(before, dict) else {}
        for name, value in self.settings(prompt).items():
            if before.get(name) != value:
                raise self._other(
                    f"was answered with {name} {json.dumps(before.get(name))}, now it is "
                    f"{json.dumps(value)}"
                )

    def _other(self, what: str) -> UserError:
        return UserError(
            f"{self.path} {what}: --resume needs the same prompts and settings, or name another "
            "file"
        )

    def write(self, prompt: Prompt, facts: dict[str, Any]) -> None:
        """Append a line; it is whole on disk, or UserError says why it is not there at all.

        An interrupted answer has none in OpenAI's format, which knows no such.
        """
        if prompt.endpoint is None:
            source = _source(prompt) | facts | {"settings": self.settings(prompt)}
            self._append(_head(prompt) | source, prompt.name)
        elif facts["stop"] != "interrupted":
            line = answer_line(
                str(prompt.id), prompt.endpoint, self._identity(prompt), self._model, facts
            )
            self._append(line, prompt.name)

    def write_failure(self, prompt: Prompt, reason: str) -> None:
        """Append a line for a prompt that this run could not answer, though it should have."""
        line = _head(prompt) | {"error": reason}
        if prompt.endpoint is not None:
            line = error_line(str(prompt.id), self._identity(prompt), reason, False)
        self._append(line, prompt.name)

    def write_left_out(self, left_out: LeftOut) -> None:
        """Append a line for each request of a batch that is wrong, unless it is there already."""
        for custom_id, reason in left_out.requests.items():
            line = error_line(custom_id, _digest([custom_id, reason]), reason, True)
            if _failure(line) not in self._failed:
                self._append(line, f"custom_id {custom_id!r}")
                self._failed.add(_failure(line))

    def _identity(self, prompt: Prompt) -> str:
        """The same for the same prompt, model and settings alone."""
        return _digest([prompt.endpoint, _source(prompt), self.settings(prompt)])

    def _append(self, line: dict[str, Any], name: str) -> None:
        data = (json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        whose = line["index"] if "index" in line else line["custom_id"]
        try:
            if self._is_file:
                # Ctrl-C may have come as the last line was just written: it stays, and is not
                # written twice.
                last, end = self._last
                if os.fstat(self._handle).st_size == end:
                    self._end = end
                    if last == whose:
                        return
                os.ftruncate(self._handle, self._end)
                self._last = whose, self._end + len(data)
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self._handle, rest) :]
        except OSError as error:
            with suppress(OSError):
                if self._is_file:
                    os.ftruncate(self._handle, self._end)
            room = "make room and " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
            raise UserError(
                f"cannot write the answer to {name} to {self.path}: {error.strerror}; "
                f"{room}go on with --resume"
            ) from error
        self._end += len(data)

    def close(self) -> None:
        """Give the file up; one that was not there before and got no answer is removed."""
        if self._handle < 0:
            return
        if not self._was_there and not os.fstat(self._handle).st_size:
            with suppress(OSError):
                self.path.unlink()
        os.close(self._handle)
        self._handle = -1


def _locked(path: Path) -> int:
    """The file, opened and locked; UserError where another run has it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise UserError(
                f"another run is writing {path}: wait for its end, or name another file"
            ) from None
        except OSError:  # a file system without locks
            return handle
        with suppress(OSError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        os.close(handle)  # removed by its owner between the two calls


def _device(path: Path) -> int:
    """A device or a pipe, opened; OSError for a pipe without a reader, which would wait for one."""
    handle = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    os.set_blocking(handle, True)
    return handle


def _answer(line: bytes) -> dict[str, Any] | None:
    """The answer, or failure, that a line holds; None for what is not a whole one."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not (line.endswith(b"\n") and isinstance(found, dict)):
        return None
    if "custom_id" in found:
        response = found.get("response")
        is_answer = isinstance(response, dict) and type(response.get("status_code")) is int
        return found if is_answer else None
    if type(found.get("index")) is not int:
        return None
    is_answer = isinstance(found.get("response"), str) and isinstance(found.get("stop"), str)
    return found if is_answer or isinstance(found.get("error"), str) else None


def _is_finished(answer: dict[str, Any]) -> bool:
    if "custom_id" in answer:
        return bool(answer["response"]["status_code"] == 200)
    return "error" not in answer


def _failure(line: dict[str, Any]) -> tuple[str, str]:
    return str(line["custom_id"]), json.dumps(line["response"])


def _key(name: object, index: int) -> object:
    return index if name is None else ("id", repr(name))


def _key_of_line(line: dict[str, Any]) -> object:
    return _key(line.get("custom_id", line.get("id")), line.get("index", -1))


def _head(prompt: Prompt) -> dict[str, Any]:
    return {"index": prompt.index} | ({} if prompt.id is None else {"id": prompt.id})


def _digest(of: object) -> str:
    return hashlib.sha256(json.dumps(of).encode()).hexdigest()[:24]


def _source(prompt: Prompt) -> dict[str, Any]:
    if isinstance(prompt.text, str):
        return {"prompt": prompt.text}
    return {"messages": list(prompt.text)}


def _model_name(config: Config) -> str:
    """Which weights answer: the folder's name and what its manifest says of its bytes."""
    options = config.model
    if options.model_path is None:
        layers = "all" if options.dummy_layers is None else options.dummy_layers
        return f"random weights of {options.dummy_shape}, {layers} layers, {options.dummy_format}"
    manifest = (options.model_path / MANIFEST_NAME).read_bytes()
    return f"{options.model_path.resolve().name} {hashlib.sha256(manifest).hexdigest()[:12]}"
