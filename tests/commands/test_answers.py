"""The file of answers: nothing finished is lost, nothing is done twice, one run at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from moe_offload.commands import answers as answers_module
from moe_offload.commands.answers import Answers
from moe_offload.commands.prompts import LeftOut, Prompt
from moe_offload.config import (
    CacheOptions,
    Config,
    GenerationOptions,
    ModelOptions,
    OutputOptions,
    PromptOptions,
)
from moe_offload.errors import UserError

GREEDY = GenerationOptions(4)
TEXTS = ("zero", "one", "two", "three")
PROMPTS = [Prompt(index, text, GREEDY) for index, text in enumerate(TEXTS)]


def config(path: Path, resume: bool = True) -> Config:
    return Config(
        ModelOptions(None, dummy_shape="mixtral-8x7b"),
        CacheOptions(),
        GREEDY,
        PromptOptions("text"),
        OutputOptions(responses_jsonl=path, resume=resume),
    )


def opened(path: Path, **options: bool) -> Answers:
    return Answers(path, config(path, **options))


def facts(stop: str = "eos") -> dict[str, Any]:
    return {"response": "an answer", "stop": stop}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Answers to the prompts 0 and 2."""
    path = tmp_path / "answers.jsonl"
    with opened(path, resume=False) as answers:
        for prompt in (PROMPTS[0], PROMPTS[2]):
            answers.write(prompt, facts())
    return path


def test_finished_answers_are_refused_or_gone_on_with(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(UserError, match="holds answers already: go on with them by --resume"):
        opened(path, resume=False)
    assert path.read_bytes() == before
    with opened(path) as answers:
        left = answers.unanswered(PROMPTS)
        assert [one.index for one in left] == [1, 3]
        for prompt in left:
            answers.write(prompt, facts())
    assert path.read_bytes().startswith(before)
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()] == [0, 2, 1, 3]
    with opened(path) as answers:
        assert answers.unanswered(PROMPTS) == []


@pytest.mark.parametrize(
    "rest",
    [
        b'{"index": 3, "prompt": "three", "respo',
        b'{"index": 3, "prompt": "three", "response": "an answer", "stop": "eos"}',  # no line end
        b"{",
        b"\0" * 100,
        b'{"ind\0\0',
        b'{"index": 3, "prompt": "three", "response": "an", "stop": "interrupted"}\n',
        b'{"index": 3, "prompt": "three", "response": "an", "stop": "interrupted"}\n{"ind',
    ],
)
def test_what_follows_the_finished_answers_is_done_again(rest: bytes, path: Path) -> None:
    before = path.read_bytes()
    path.write_bytes(before + rest)
    with opened(path) as answers:
        assert [one.index for one in answers.unanswered(PROMPTS)] == [1, 3]
        assert path.read_bytes() == before + rest, "nothing goes before something comes"
        answers.write(PROMPTS[3], facts())
    assert path.read_bytes().startswith(before)
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()] == [0, 2, 3]


def test_ids_tell_prompts_apart_wherever_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "a"
    named = [
        replace(prompt, id=name) for prompt, name in zip(PROMPTS, ("a", 1, "1", "d"), strict=True)
    ]
    with opened(path) as answers:
        answers.write(named[1], facts())
        answers.write(named[3], facts())
    moved = [replace(one, index=3 - one.index) for one in named]
    with opened(path) as answers:
        assert [one.id for one in answers.unanswered(moved)] == ["a", "1"]


def test_a_file_that_is_run_twice_over_has_two_answers_to_an_id(tmp_path: Path) -> None:
    twice = [replace(PROMPTS[0], id="a", index=index) for index in range(2)]
    with opened(tmp_path / "a") as answers:
        answers.write(twice[0], facts())
    with opened(tmp_path / "a") as answers:
        assert len(answers.unanswered(twice)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: replace(one, text=one.text + "!"), "an answer to another prompt"),
        (lambda one: replace(one, text=({"role": "user", "content": one.text},)), "another prompt"),
        (lambda one: replace(one, index=one.index + 4), "not among these"),
        (
            lambda one: replace(one, options=GenerationOptions(5)),
            "was answered with max_tokens 4, now it is 5",
        ),
        (
            lambda one: replace(one, options=GenerationOptions(4, temperature=0.5)),
            "with temperature 0.0, now it is 0.5",
        ),
        (lambda one: replace(one, options=GenerationOptions(4, seed=1)), "with seed 0"),
        (
            lambda one: replace(one, options=GenerationOptions(4, repetition_penalty=1.5)),
            "with repetition_penalty 1.0, now it is 1.5",
        ),
        (lambda one: replace(one, options=GenerationOptions(4, stop=("x",))), "with stop []"),
    ],
)
def test_answers_to_other_prompts_or_settings_are_refused(
    change: Callable[[Prompt], Prompt], message: str, path: Path
) -> None:
    before = path.read_bytes()
    with opened(path) as answers, pytest.raises(UserError) as refused:
        answers.unanswered(list(map(change, PROMPTS)))
    assert message in str(refused.value)
    assert path.read_bytes() == before


def test_how_many_are_done_at_a_time_is_no_other_setting(path: Path) -> None:
    with opened(path) as answers:
        larger = [replace(one, options=replace(GREEDY, batch_size=4)) for one in PROMPTS]
        assert len(answers.unanswered(larger)) == 2
    raw = [replace(one, raw=True) for one in PROMPTS]
    with opened(path) as answers, pytest.raises(UserError, match="with raw false"):
        answers.unanswered(raw)


def test_another_file_is_never_taken_for_answers(path: Path) -> None:
    good = path.read_bytes()
    for damaged in (
        b"hello\n" + good,
        good + b"hello\n" + good,
        b'{"index": 1}\n' + good,
        good + b'{"index": 1}\n',
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"line \d of .* is no answer of a run"):
            opened(path)
        assert path.read_bytes() == damaged


@pytest.mark.parametrize("note", [b"Notes of years", b'{"' + b"x" * 300])
def test_a_file_of_one_line_is_not_taken_for_half_an_answer(
    note: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is what never ends read into memory."""
    monkeypatch.setattr(answers_module, "_LONGEST_LINE_BYTES", 100)
    (tmp_path / "note").write_bytes(note)
    with pytest.raises(UserError, match=r"line 1 of .* is no answer of a run"):
        opened(tmp_path / "note")
    assert (tmp_path / "note").read_bytes() == note


def test_one_run_at_a_time(path: Path) -> None:
    with opened(path), pytest.raises(UserError, match="another run is writing"):
        opened(path)
    opened(path).close()


def test_nothing_written_leaves_nothing(tmp_path: Path) -> None:
    with opened(tmp_path / "new"):
        assert (tmp_path / "new").exists()
    assert not (tmp_path / "new").exists()
    (tmp_path / "made").touch()  # as mktemp does
    with opened(tmp_path / "made", resume=False):
        pass
    assert (tmp_path / "made").exists()


def test_a_full_disk_leaves_whole_lines(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()
    write = os.write

    def half(handle: int, data: Any) -> int:
        if len(data) < 100:
            raise OSError(28, "No space left on device")
        return write(handle, data[: len(data) - 50])

    with opened(path) as answers:
        answers.unanswered(PROMPTS)
        monkeypatch.setattr(os, "write", half)
        with pytest.raises(UserError, match=r"cannot write .*answers.jsonl: No space .* --resume"):
            answers.write(PROMPTS[1], facts())
    monkeypatch.undo()
    assert path.read_bytes() == before


@pytest.mark.parametrize("again", [1, 3])
def test_ctrl_c_just_behind_a_line_loses_and_doubles_nothing(
    again: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run then tells what it had begun: the same prompt, or another that was cut off."""
    write = os.write

    def interrupted(handle: int, data: Any) -> int:
        write(handle, data)
        raise KeyboardInterrupt

    with opened(path) as answers:
        answers.unanswered(PROMPTS)
        monkeypatch.setattr(os, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            answers.write(PROMPTS[1], facts())
        monkeypatch.undo()
        answers.write(PROMPTS[again], facts("interrupted"))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["index"], line["stop"]) for line in lines] == [
        *[(0, "eos"), (2, "eos"), (1, "eos")],
        *([(3, "interrupted")] if again == 3 else []),
    ]


def test_a_pipe_is_written_and_waited_for_by_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"cannot write .*pipe"):
        opened(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with opened(tmp_path / "pipe") as answers:
        answers.write(PROMPTS[1], facts())
    assert json.loads(os.read(reader, 1 << 16))["prompt"] == "one"
    os.close(reader)
    with opened(Path("/dev/full")) as answers, pytest.raises(UserError, match="No space left"):
        answers.write(PROMPTS[1], facts())


REQUESTS = [
    replace(one, id=name, endpoint=url, raw=url == "/v1/completions")
    for one, name, url in zip(
        PROMPTS,
        "abcd",
        ("/v1/chat/completions", "/v1/completions", "/v1/chat/completions", "/v1/completions"),
        strict=True,
    )
]
COUNTS = {"prompt_tokens": 3, "generated_tokens": 2}


def test_requests_of_a_batch_are_answered_in_openais_format(tmp_path: Path) -> None:
    path = tmp_path / "a"
    left_out = LeftOut(tmp_path / "prompts")
    left_out.add(UserError("line 9 has no body"), "wrong")
    with opened(path) as answers:
        for prompt, stop in zip(REQUESTS, ("eos", "context", "interrupted", "stop"), strict=True):
            answers.write(prompt, facts(stop) | COUNTS)
        answers.write_failure(REQUESTS[2], "the worker died")
        answers.write_left_out(left_out)
        answers.write_left_out(left_out)
    lines = {line["custom_id"]: line for line in map(json.loads, path.read_text().splitlines())}
    assert list(lines) == ["a", "b", "d", "c", "wrong"]
    fields = {"id", "custom_id", "response", "error"}
    assert all(line.keys() == fields and line["error"] is None for line in lines.values())
    of = {name: line["response"] for name, line in lines.items()}
    status = {name: response["status_code"] for name, response in of.items()}
    assert status == {"a": 200, "b": 200, "d": 200, "c": 500, "wrong": 400}
    chat, text = of["a"]["body"], of["b"]["body"]
    assert chat["choices"][0]["message"] == {"role": "assistant", "content": "an answer"}
    assert text["choices"][0]["text"] == "an answer"
    reasons = [of[name]["body"]["choices"][0]["finish_reason"] for name in "abd"]
    assert reasons == ["stop", "length", "stop"]
    assert chat["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert of["wrong"]["body"]["error"]["message"] == "line 9 has no body"
    ChatCompletion.model_validate(chat, strict=True)
    Completion.model_validate(text, strict=True)


def test_a_batch_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with opened(path) as answers:
        answers.write(REQUESTS[0], facts() | COUNTS)
        answers.write_failure(REQUESTS[1], "the worker died")
    before = path.read_bytes()
    with opened(path) as answers:
        assert answers.n_before == 1
        assert [one.id for one in answers.unanswered(REQUESTS)] == ["b", "c", "d"]
        answers.write(REQUESTS[1], facts() | COUNTS)
    assert path.read_bytes().startswith(before)
    with opened(path) as answers:  # of two lines the last counts
        assert [one.id for one in answers.unanswered(REQUESTS)] == ["c", "d"]
        for other in (
            replace(REQUESTS[0], text="another"),
            replace(REQUESTS[0], options=GenerationOptions(5)),
            replace(REQUESTS[0], endpoint="/v1/completions"),
        ):
            with pytest.raises(UserError, match=r"another prompt than that of .* or of another"):
                answers.unanswered([other, *REQUESTS[1:]])
        with pytest.raises(UserError, match=r"not among these \(custom_id 'b'\)"):
            answers.unanswered([REQUESTS[0], *REQUESTS[2:]])


def test_a_failed_prompt_is_done_again(path: Path) -> None:
    with opened(path) as answers:
        answers.write_failure(PROMPTS[1], "it failed")
    assert json.loads(path.read_text().splitlines()[-1]) == {"index": 1, "error": "it failed"}
    with opened(path) as answers:
        assert [one.index for one in answers.unanswered(PROMPTS)] == [1, 3]
