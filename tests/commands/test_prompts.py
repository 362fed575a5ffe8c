"""Prompts as files have them: what is one, how each is answered, and what is left out."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_offload.commands.prompts import LeftOut, Prompt, parse_shard, read_prompts
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
        ('{"prompt": "half', "is not JSON (Unterminated string starting at, character 12)"),
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
        ({"prompt": "a", "max_tokens": 0}, "expected max_tokens of at least 1, found 0"),
        ({"prompt": "a", "max_tokens": True}, "expected max_tokens as a whole number, found True"),
        ({"prompt": "a", "max_tokens": "9"}, "expected max_tokens as a whole number, found '9'"),
        ('{"prompt": "a", "temperature": NaN}', "finite number, found nan"),
        ({"prompt": "a", "max_tokens": 10**400}, "expected max_tokens of at most"),
        ({"prompt": "a", "temperature": -(10**400)}, "expected temperature of at least 0"),
        ({"prompt": "a", "stop": [1]}, "expected stop as"),
        ({"prompt": "a", "top_p": 2}, "expected top_p of at most 1"),
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


def test_a_file_without_a_usable_line_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"no prompt of .*p.jsonl can be answered \(left out"):
        from_json(tmp_path, "text", "more text")
    first, second = capsys.readouterr().err.splitlines()
    assert "line 1 of" in first and "line 2 of" in second


def test_many_broken_lines_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, left_out = from_json(tmp_path, *["{"] * 1000, {"prompt": "good"})
    assert [one.index for one in found] == [1000]
    assert len(left_out.reasons) == 1000
    assert len(capsys.readouterr().err.splitlines()) < 20
    assert left_out.notes()[-1] == "left out: 990 more lines"


def test_a_file_of_json_from_another_system(tmp_path: Path) -> None:
    """With a byte order mark and carriage returns."""
    content = b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b\\r\\n"}\r\n'
    (tmp_path / "p.jsonl").write_bytes(content)
    found, left_out = read(tmp_path / "p.jsonl")
    assert [one.text for one in found] == ["a", "b\r\n"]
    assert not left_out.reasons


def test_a_large_file_of_prompts(tmp_path: Path) -> None:
    long = "x" * (1 << 20)
    found, _ = from_json(tmp_path, *({"prompt": str(i)} for i in range(100_000)), {"prompt": long})
    assert (len(found), found[-1].text) == (100_001, long)


CHAT_URL, TEXT_URL = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "clock"}}


def request(custom_id: Any = "a", url: str = CHAT_URL, **body: Any) -> dict[str, Any]:
    body = body or {"messages": HI}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def test_lines_of_openais_batch_format(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = {"max_completion_tokens": 3, "top_p": 0.5, "seed": 2, "stop": ["."], "n": 1}
    found, left_out = from_json(
        tmp_path,
        request("x", model="gpt", messages=HI, **asked, stream=False, user="me", logprobs=None),
        request("y", TEXT_URL, prompt="raw text", temperature=0, top_p=0.9),
        request("z", messages=[{"role": "developer", "content": parts, "name": "Ann"}, *HI]),
        {"prompt": "own format", "id": "w"},
    )
    assert not left_out.reasons
    assert [one.id for one in found] == ["x", "y", "z", "w"]
    assert [one.endpoint for one in found] == [CHAT_URL, TEXT_URL, CHAT_URL, None]
    assert [one.raw for one in found] == [False, True, False, False]
    assert found[0].text == tuple(HI)
    expected = GenerationOptions(3, temperature=0.5, top_p=0.5, seed=2, batch_size=4, stop=(".",))
    assert found[0].options == expected
    assert (found[1].text, found[1].options.temperature) == ("raw text", 0)
    assert found[2].text == ({"role": "system", "content": "a\nb"}, *HI)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"body": {}}, "has the custom_id None"),
        (request(7), "has the custom_id 7: expected a text"),
        (request("a") | {"method": "GET"}, "has the method 'GET'"),
        (request("a", "/v1/embeddings", input="x"), "has the url '/v1/embeddings'"),
        (request("a") | {"body": None}, "has no body"),
        (request("a") | {"id": 3}, "unknown field 'id'"),
        (request("a", prompt="x"), "cannot be served: messages: Field required"),
        (request("a", TEXT_URL, prompt=["x"]), "cannot be served: prompt: "),
        (request("a", messages=HI, n=2), "cannot be served: n is served only as 1"),
        (request("a", messages=HI, stream=True), "has stream, which a server serves"),
        (request("a", messages=HI, tools=[{}]), "cannot be served: tools.0.type"),
        (request("a", messages=HI, tools=[TOOL]), "has tools, which a server serves"),
        (request("a", messages=[{"role": "tool", "content": "x"}]), "of role 'tool'"),
        (request("a", messages=HI, audio={}), "cannot be served: audio: "),
        (
            request("a", messages=[{"role": "user", "content": [{"image_url": "x"}]}]),
            "messages.0.content",
        ),
        (request("a", messages=HI, max_tokens=0), "cannot be served: max_tokens: "),
        (request("first"), "has the id 'first' of line 1"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_request_that_cannot_be_served_is_left_out(
    line: Any, reason: str, tmp_path: Path
) -> None:
    found, left_out = from_json(tmp_path, request("first"), line, request("last"))
    assert [(one.index, one.id) for one in found] == [(0, "first"), (2, "last")]
    (said,) = left_out.reasons
    assert said.startswith(f"line 2 of {tmp_path / 'p.jsonl'} ")
    assert reason in said
    named = {"a": said} if line.get("custom_id") == "a" else {}
    assert left_out.requests == named


def test_what_shapes_no_draw_is_not_in_a_requests_way(tmp_path: Path) -> None:
    """As at the server: a client may say top_p and the like where nothing is drawn."""
    path = tmp_path / "p.jsonl"
    lines = [
        request("a", messages=HI, top_p=0.9, tools=[]),
        request("b", messages=HI, temperature=1),
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    found, left_out = read_prompts(PromptOptions(path=path), GenerationOptions(9))
    assert not left_out.reasons
    assert [(one.options.temperature, one.options.top_p) for one in found] == [(0, 1), (1, 1)]


def test_shards_share_all_prompts_and_keep_their_numbers(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": str(number)}) for number in range(8)]
    lines[3] = "broken"
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    shards = [read(tmp_path / "p.jsonl", shard=f"{number}/3") for number in (1, 2, 3)]
    indexes = [[one.index for one in found] for found, _ in shards]
    assert indexes == [[0, 6], [1, 4, 7], [2, 5]]
    assert [len(left_out.reasons) for _, left_out in shards] == [1, 0, 0]
    assert all(one.text == str(one.index) for found, _ in shards for one in found)
    assert read(tmp_path / "p.jsonl", shard="9/9")[0] == []


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
