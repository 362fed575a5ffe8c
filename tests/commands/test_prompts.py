"""Prompts as files have them: what is one, how each is answered, and what is left out."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_offload.commands.prompts import LeftOut, Prompt, read_prompts
from moe_offload.config import GenerationOptions, PromptOptions
from moe_offload.errors import UserError

RUN = GenerationOptions(max_tokens=9, temperature=0.5, batch_size=4)


def read(path: Path, **options: Any) -> tuple[list[Prompt], LeftOut]:
    return read_prompts(PromptOptions(path=path, **options), RUN)


def from_json(folder: Path, *lines: Any) -> tuple[list[Prompt], LeftOut]:
    path = folder / "p.jsonl"
    path.write_text(
        "".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in lines)
    )
    return read(path)


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        (b"  indented \r\n\n\ttab\rlast", ["  indented ", "\ttab", "last"]),
        ("one\u2028line\nof\x85them\n".encode(), ["one\u2028line", "of\x85them"]),
        (b"form\ffeed\n\f\nvertical\vtab", ["form\ffeed", "vertical\vtab"]),
        ("\ufeffafter a mark\n".encode(), ["after a mark"]),
        (b'{"prompt": "text, for the name does not end in .jsonl"}', None),
    ],
)
def test_a_prompt_is_a_line_as_it_stands(
    content: bytes, prompts: list[str] | None, tmp_path: Path
) -> None:
    (tmp_path / "prompts").write_bytes(content)
    found, left_out = read(tmp_path / "prompts")
    assert [one.text for one in found] == (prompts or [content.decode()])
    assert [one.index for one in found] == list(range(len(found)))
    assert all(one.options == RUN for one in found)
    assert not left_out.reasons


def test_more_prompts_than_lines_start_again(tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("a\n\nb\n")
    found, _ = read(tmp_path / "prompts", n_prompts=5)
    assert [(one.index, one.text) for one in found] == list(enumerate("ababa"))
    assert found[3].name == f"line 3 of {tmp_path / 'prompts'}"


def test_lines_of_json_bring_their_settings(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be."}, {"role": "user", "content": "Hi"}]
    found, left_out = from_json(
        tmp_path,
        {"prompt": "plain"},
        {"messages": chat, "id": "x", "max_tokens": 3, "seed": 5, "top_p": 0.5, "stop": "."},
        {"prompt": "two\nlines", "id": 7, "temperature": 0, "stop": ["a", "b"]},
    )
    assert not left_out.reasons
    assert [one.text for one in found] == ["plain", tuple(chat), "two\nlines"]
    assert [one.id for one in found] == [None, "x", 7]
    assert [one.shown for one in found] == ["plain", "Hi", "two\nlines"]
    assert found[0].options == RUN
    second = GenerationOptions(3, temperature=0.5, top_p=0.5, seed=5, batch_size=4, stop=(".",))
    assert found[1].options == second
    assert (found[2].options.temperature, found[2].options.stop) == (0, ("a", "b"))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "half', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "is list, expected an object"),
        ({}, "needs a prompt or messages"),
        ({"prompt": "a", "messages": []}, "and not both"),
        ({"prompt": "a", "topp": 1}, "unknown field 'topp'"),
        ({"prompt": 3}, "has no text as prompt: 3"),
        ({"prompt": ""}, "has an empty prompt"),
        ({"prompt": "\ud800"}, "is not Unicode"),
        ({"messages": []}, "has no messages"),
        ({"messages": ["x"]}, "not an object with role and content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "of role 'robot'"),
        ({"prompt": "a", "id": 1.5}, "has the id 1.5"),
        ({"prompt": "a", "id": True}, "has the id True"),
        ({"prompt": "a", "id": "x"}, "has the id 'x' of line 1"),
        ({"prompt": "a", "max_tokens": 0}, "--max-tokens of at least 1, found 0"),
        ({"prompt": "a", "max_tokens": True}, "--max-tokens as a whole number, found True"),
        ({"prompt": "a", "max_tokens": "9"}, "--max-tokens as a whole number, found '9'"),
        ('{"prompt": "a", "temperature": NaN}', "finite number, found nan"),
        ({"prompt": "a", "max_tokens": 10**400}, "--max-tokens of at most"),
        ({"prompt": "a", "temperature": -(10**400)}, "--temperature of at least 0"),
        ({"prompt": "a", "stop": [1]}, "--stop"),
        ({"prompt": "a", "stop": 1}, "--stop"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_broken_line_is_left_out_and_the_others_are_not(
    line: Any, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, left_out = from_json(tmp_path, {"prompt": "one", "id": "x"}, line, "", {"prompt": "two"})
    assert [(one.index, one.text) for one in found] == [(0, "one"), (2, "two")]
    (said,) = left_out.reasons
    assert said.startswith(f"line 2 of {tmp_path / 'p.jsonl'} ")
    assert reason in said
    assert capsys.readouterr().err.count("left out: line 2") == 1


def test_a_file_without_a_usable_line_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"line 1 of .* is not JSON"):
        from_json(tmp_path, "text", "more text")


def test_many_broken_lines_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, left_out = from_json(tmp_path, *["{"] * 1000, {"prompt": "good"})
    assert [one.index for one in found] == [1000]
    assert len(left_out.reasons) == 1000
    assert len(capsys.readouterr().err.splitlines()) < 20
    assert left_out.notes()[-1] == "left out: 990 more lines"


def test_a_large_file_of_prompts(tmp_path: Path) -> None:
    long = "x" * (1 << 20)
    found, _ = from_json(tmp_path, *({"prompt": str(i)} for i in range(100_000)), {"prompt": long})
    assert (len(found), found[-1].text) == (100_001, long)


@pytest.mark.parametrize("own", [False, True])
def test_a_system_message_comes_first_unless_the_chat_has_one(own: bool, tmp_path: Path) -> None:
    user = {"role": "user", "content": "Hi"}
    system = {"role": "system", "content": "own" if own else "given"}
    lines = {"messages": [system, user]} if own else {"prompt": "Hi"}
    (tmp_path / "p.jsonl").write_text(json.dumps(lines))
    (prompt,), _ = read(tmp_path / "p.jsonl", system="given")
    assert prompt.text == (system, user)


def test_a_prompt_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def stdin(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    stdin("two\nlines: \u00e9\n".encode())
    (prompt,), _ = read_prompts(PromptOptions("-"), RUN)
    assert prompt.text == "two\nlines: \u00e9"
    stdin(b"\xff\xfe")
    with pytest.raises(UserError, match="standard input is not a UTF-8 text"):
        read_prompts(PromptOptions("-"), RUN)
    stdin(b"\n")
    with pytest.raises(UserError, match="prompt is empty"):
        read_prompts(PromptOptions("-"), RUN)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin-1").write_bytes(b"one\ntwo\ncaf\xe9\n")
    with pytest.raises(UserError, match="in line 3"):
        read(tmp_path / "latin-1")
