"""The server as its clients meet it: a real process, the real openai package, real mistakes."""

from __future__ import annotations

import inspect
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import transformers
from against_transformers import greedy as own_greedy
from chat_model import write_chat_model
from pretended_gpu import pretended_gpu

from moe_offload.checkpoint.prepared import read_manifest
from moe_offload.commands import generate, serve
from moe_offload.commands.gate import ClientGone, Metrics
from moe_offload.commands.server import Generator
from moe_offload.config import CacheOptions, ModelOptions
from moe_offload.engine.loading import load_engine
from moe_offload.experts.recorder import LayerEvent, Recorder
from moe_offload.model.loader import PreparedModel

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = 6000
KEY = "a-key-of-this-test"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "w7 w8 w9"}]
CACHE = ("--cache-nblocks", "2", "--cache-nways", "2", "--cache-replace-policy", "LRU")


class Served:
    """A server process, and its clients."""

    def __init__(self, folder: Path, *flags: str) -> None:
        command = [sys.executable, ROOT / "src" / "serve.py", "--model-path", folder]
        self.process = subprocess.Popen(
            [*command, "--port", "0", "--device", "cpu", *flags], stderr=subprocess.PIPE, text=True
        )
        assert self.process.stderr is not None
        self.lines: list[str] = []
        for line in self.process.stderr:
            self.lines.append(line)
            if match := re.match(r"serving (\S+) at (http://\S+)/v1", line):
                self.name, self.url = match.groups()
                break
        else:
            raise AssertionError("".join(self.lines))
        self._reader = threading.Thread(target=self.lines.extend, args=(self.process.stderr,))
        self._reader.start()
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0)

    def post(
        self, path: str, body: Any, key: str = KEY, content_type: str = "application/json"
    ) -> tuple[int, Any]:
        """Status and JSON of an answer; `body` may be bytes."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {key}", "Content-Type": content_type}
        try:
            request = urllib.request.Request(self.url + path, data, headers)
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def begin(self, path: str, body: Any) -> HTTPConnection:
        """A connection whose request is sent, and whose answer nobody has read."""
        connection = HTTPConnection(self.url.removeprefix("http://"), timeout=120)
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        connection.request("POST", path, json.dumps(body), headers)
        return connection

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        request = urllib.request.Request(
            f"{self.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read().decode()
        pattern = rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$"
        return sum(map(float, re.findall(pattern, text, flags=re.MULTILINE)))

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        code = self.process.wait(timeout=60)
        self._reader.join(timeout=60)
        return code


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("model"), CONTEXT)


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[Served]:
    one = Served(model, "--api-key", KEY, *CACHE)
    yield one
    if one.process.poll() is None:
        one.process.kill()
        one.process.wait()


@pytest.fixture(scope="module")
def greedy(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the command line answers, by the texts of the messages or the prompt."""
    folder = tmp_path_factory.mktemp("answers")
    lines: list[dict[str, Any]] = [
        {"messages": HELLO},
        {"messages": [{"role": "system", "content": "w20"}, *HELLO]},
    ]
    prompts, raw, answers = folder / "a.jsonl", folder / "b.txt", {}
    prompts.write_text("\n".join(map(json.dumps, lines)))
    raw.write_text("w11 w12 w13")
    for path, flags in ((prompts, ()), (raw, ("--raw-prompt",))):
        result = path.with_suffix(".out.jsonl")
        arguments = (
            "--model-path",
            model,
            "--prompt-path",
            path,
            "--max-tokens",
            20,
            "--no-record",
        )
        more = ("--hide-resp", "--responses-jsonl", result, "--device", "cpu", *flags)
        assert generate.main([str(one) for one in (*arguments, *more)]) == 0
        for line in map(json.loads, result.read_text().splitlines()):
            said = line.get("prompt") or " ".join(m["content"] for m in line["messages"])
            answers[said] = line["response"]
    return answers


def streamed(pieces: Any) -> tuple[str, str, Any]:
    """Text, finish reason and usage of a stream."""
    text, reason, usage = "", "", None
    for piece in pieces:
        choice = piece.choices[0]
        text += (choice.text if hasattr(choice, "text") else choice.delta.content) or ""
        reason, usage = choice.finish_reason or reason, piece.usage or usage
    return text, reason, usage


def test_the_answers_are_the_command_lines(served: Served, greedy: dict[str, str]) -> None:
    asked = {"model": "tiny-chat", "max_tokens": 20, "temperature": 0}
    for messages in (HELLO, [{"role": "system", "content": "w20"}, *HELLO]):
        expected = greedy[" ".join(one["content"] for one in messages)]
        assert len(expected.split()) == 20
        done = served.client.chat.completions.create(messages=messages, **asked)
        assert done.choices[0].message.content == expected
        assert (done.model, done.choices[0].finish_reason) == ("tiny-chat", "length")
        assert done.usage.completion_tokens == 20
        stream = served.client.chat.completions.create(messages=messages, stream=True, **asked)
        text, reason, usage = streamed(stream)
        assert (text, reason, usage.completion_tokens) == (expected, "length", 20)
    done = served.client.completions.create(prompt="w11 w12 w13", **asked)
    assert done.choices[0].text == greedy["w11 w12 w13"]
    stream = served.client.completions.create(prompt="w11 w12 w13", stream=True, **asked)
    assert streamed(stream)[0] == greedy["w11 w12 w13"]


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_stream_ends_as_openais_does(path: str, served: Served) -> None:
    asked = {"messages": HELLO} if path == CHAT else {"prompt": "w7"}
    connection = served.begin(path, asked | {"stream": True, "max_tokens": 3})
    lines = connection.getresponse().read().decode().strip().split("\n\n")
    connection.close()
    assert lines[-1] == "data: [DONE]" and lines.count("data: [DONE]") == 1
    assert json.loads(lines[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"


def test_a_conversation_that_goes_on_keeps_its_cache(served: Served, model: Path) -> None:
    """The second turn's answer is the one of a server that never saw the first."""
    asked = {"model": "tiny-chat", "max_tokens": 12, "temperature": 0}
    first = served.client.chat.completions.create(messages=HELLO, **asked)
    answer = {"role": "assistant", "content": first.choices[0].message.content}
    messages = [*HELLO, answer, {"role": "user", "content": "w30 w31"}]
    held = served.metric('moe_prompt_tokens_total{source="cache"}')
    second = served.client.chat.completions.create(messages=messages, **asked)
    # all of the first turn but its last token, which was never evaluated
    n_first = first.usage.total_tokens - 1
    assert served.metric('moe_prompt_tokens_total{source="cache"}') - held == n_first
    served.client.completions.create(model="tiny-chat", prompt="w80", max_tokens=1)
    again = served.client.chat.completions.create(messages=messages, **asked)
    assert again.choices[0].message.content == second.choices[0].message.content


def test_stop_texts_end_an_answer_and_are_not_in_it(served: Served, greedy: dict[str, str]) -> None:
    expected = greedy["w7 w8 w9"]
    words = expected.split()
    n_kept = next(n for n in range(3, 20) if words[n] not in words[:n])
    stop = f"{words[n_kept - 1][-1:]} {words[n_kept]}"  # over the edge of two tokens
    asked: dict[str, Any] = {
        "model": "tiny-chat",
        "messages": HELLO,
        "max_tokens": 20,
        "temperature": 0,
        "stop": [stop, "never said"],
    }
    done = served.client.chat.completions.create(**asked)
    assert done.choices[0].message.content == expected[: expected.index(stop)]
    assert done.choices[0].finish_reason == "stop"
    text, reason, _ = streamed(served.client.chat.completions.create(stream=True, **asked))
    assert (text, reason) == (expected[: expected.index(stop)], "stop")


def test_a_seed_repeats_a_sample(served: Served) -> None:
    def sample(seed: int) -> str:
        done = served.client.completions.create(
            model="tiny-chat", prompt="w5", max_tokens=16, temperature=1.5, seed=seed
        )
        return str(done.choices[0].text)

    assert sample(1) == sample(1) != sample(2)


def test_a_replayed_step_leaves_the_model_within_one_layer(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a pretended GPU: no hook of the model's is called while graphs replay a step."""
    options = ModelOptions(model, device="cuda")
    with (
        pretended_gpu(monkeypatch),
        load_engine(PreparedModel(read_manifest(model)), options, CacheOptions()) as engine,
    ):
        assert engine.graphs is not None
        generator = Generator(engine, None, 100, Metrics({}))
        layers: list[int] = []

        def end() -> None:
            layers.append(len(layers))
            if engine.graphs.replayed == 2:
                generator.close()

        engine.dispatcher.on_layer.insert(0, end)
        with pytest.raises(ClientGone):
            own_greedy(engine.model, [[5, 17, 40]], 20)
        n_whole = 5  # a prompt, a rehearsal, a recording and two replays
        assert len(layers) == n_whole * engine.store.n_layers + 1


MALFORMED: list[tuple[str, Any, str | None]] = [
    (CHAT, b"{", None),
    (CHAT, b"", None),
    (CHAT, b"\xff\xfe", None),
    (CHAT, b"[" * 100_000, None),
    (CHAT, [1], None),
    (CHAT, {}, "messages"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "w7"}, "messages"),
    (CHAT, {"messages": ["w7"]}, "messages.0"),
    (CHAT, {"messages": [{"content": "w7"}]}, "messages.0.role"),
    (CHAT, {"messages": [{"role": "wizard", "content": "w7"}]}, "messages.0.role"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages.0.content"),
    (CHAT, {"messages": [{"role": "user", "content": 7}]}, None),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None),
    (CHAT, {"messages": [{"role": "tool", "content": "w7", "tool_call_id": "1"}]}, None),
    (
        CHAT,
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "["}}],
                }
            ]
        },
        "messages.0.tool_calls.0.function.arguments",
    ),
    (CHAT, {"messages": HELLO, "max_tokens": -1}, "max_tokens"),
    (CHAT, {"messages": HELLO, "max_tokens": 1.5}, "max_tokens"),
    (CHAT, {"messages": HELLO, "max_tokens": True}, "max_tokens"),
    (CHAT, {"messages": HELLO, "max_tokens": 10**400}, "max_tokens"),
    (CHAT, {"messages": HELLO, "temperature": "hot"}, "temperature"),
    (CHAT, {"messages": HELLO, "temperature": 1e9}, "temperature"),
    (CHAT, b'{"messages": [{"role": "user", "content": "w7"}], "temperature": NaN}', "temperature"),
    (CHAT, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', None),
    (CHAT, {"messages": HELLO, "top_p": 0}, "top_p"),
    (CHAT, {"messages": HELLO, "n": 2}, "n"),
    (CHAT, {"messages": HELLO, "seed": 2**80}, "seed"),
    (CHAT, {"messages": HELLO, "stop": ["w"] * 1000}, None),
    (CHAT, {"messages": HELLO, "stop": ""}, None),
    (CHAT, {"messages": HELLO, "stream": "yes"}, "stream"),
    (CHAT, {"messages": HELLO, "tools": [{"type": "function"}]}, "tools.0.function"),
    (CHAT, {"messages": HELLO, "logprobs": True}, "logprobs"),
    (CHAT, {"messages": HELLO, "no_such_field": 1}, "no_such_field"),
    (CHAT, {"messages": HELLO, "generation_config": "{"}, None),
    (CHAT, {"messages": HELLO, "generation_config": '{"top_k": "x"}'}, "top_k"),
    (CHAT, {"messages": HELLO, "chat_template_kwargs": {"tokenize": False}}, None),
    (CHAT, {"messages": [{"role": "user", "content": "w7 " * CONTEXT}]}, None),
    (TEXT, {"prompt": "w7 " * CONTEXT}, None),
    (TEXT, {"prompt": "w7 " * CONTEXT, "stream": True}, None),
    (TEXT, {"prompt": ""}, "prompt"),
    (TEXT, {"prompt": "   "}, None),
    (TEXT, {"prompt": ["w7", "w8"]}, "prompt"),
    (TEXT, {"messages": HELLO}, "prompt"),
    ("/load_model", {"model": 7}, "model"),
]


@pytest.mark.parametrize(
    ("path", "body", "param"), MALFORMED, ids=[str(n) for n in range(len(MALFORMED))]
)
def test_a_malformed_request_is_told_what_is_wrong(
    path: str, body: Any, param: str | None, served: Served
) -> None:
    status, answer = served.post(path, body)
    assert status == 400
    error = answer["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    if param is not None:
        assert error["param"] == param


def test_what_is_not_served_is_refused(served: Served) -> None:
    assert served.post("/reset", {})[0] == 404
    assert served.post("/v1/responses", {})[0] == 404
    assert served.post("/v1/models", {})[0] == 405
    assert served.post(TEXT, {"prompt": "w7"}, content_type="text/plain")[0] == 400
    assert served.post(TEXT, b" " * (17 << 20))[0] == 413
    status, answer = served.post(CHAT, {"messages": HELLO, "model": "another"})
    assert status == 404 and answer["error"]["code"] == "model_not_found"
    assert "'another' is not served here, 'tiny-chat' is" in answer["error"]["message"]
    assert served.post("/load_model", {"model": "another"})[0] == 404
    assert [one.id for one in served.client.models.list()] == ["tiny-chat"]


def test_without_the_key_nobody_comes_in(served: Served) -> None:
    for key in ("", "another", KEY[:-1], KEY + "x"):
        status, answer = served.post(TEXT, {"prompt": "w7", "max_tokens": 1}, key)
        assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
    with urllib.request.urlopen(f"{served.url}/health", timeout=60) as answer:
        assert json.loads(answer.read()) == {"status": "ok"}
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0).models.list()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_place(stream: bool, served: Served) -> None:
    """Also one that goes while it waits: the next is answered long before theirs would be."""
    before = served.metric("moe_generated_tokens_total")
    endless = {"prompt": "w7", "max_tokens": CONTEXT - 10, "temperature": 0, "stream": stream}
    connections = [served.begin(TEXT, endless) for _ in range(2)]
    while served.metric("moe_generated_tokens_total") < before + 5:
        assert served.process.poll() is None
    assert served.metric("moe_requests_computing") == 1
    assert served.metric("moe_requests_waiting") == 1
    for connection in connections:
        connection.close()
    done = served.client.completions.create(model="tiny-chat", prompt="w9", max_tokens=3)
    assert done.usage.completion_tokens == 3
    assert served.metric("moe_generated_tokens_total") < before + CONTEXT - 10
    assert served.metric("moe_requests_waiting") == 0


def test_transformers_own_client(model: Path, greedy: dict[str, str], tmp_path: Path) -> None:
    """`transformers chat`, as at a terminal, of a server without a key; Ctrl-C ends it."""
    open_to_all = Served(model, "--served-model-name", "ours")
    command = [Path(sys.executable).with_name("transformers"), "chat", "ours"]
    done = subprocess.run(
        [*command, open_to_all.url, "max_new_tokens=20", "do_sample=False"],
        input="w7 w8 w9\nn\n!exit\n", capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"COLUMNS": "400"}, check=False, timeout=300,
    )  # fmt: skip
    said = " ".join(done.stdout.split())
    assert greedy["w7 w8 w9"] in said, said + done.stderr
    for host in ("rebound.example", "[::1", "localhost.rebound.example:80"):
        foreign = HTTPConnection(open_to_all.url.removeprefix("http://"), timeout=60)
        foreign.request("GET", "/v1/models", headers={"Host": host})
        assert foreign.getresponse().status == 403
        foreign.close()
    assert open_to_all.stop(signal.SIGINT) == 0
    assert open_to_all.lines[-1] == "stopped\n"


def test_the_metrics_tell_what_was_done(served: Served) -> None:
    names = ("moe_generated_tokens_total", 'moe_prompt_tokens_total{source="evaluated"}')
    before = [served.metric(name) for name in names]
    first_tokens = served.metric("moe_time_to_first_token_seconds_count")
    served.client.completions.create(model="tiny-chat", prompt="w61 w62 w63", max_tokens=7)
    after = [served.metric(name) for name in names]
    assert [now - then for then, now in zip(before, after, strict=True)] == [7, 3]
    assert served.metric("moe_time_to_first_token_seconds_count") == first_tokens + 1
    for outcome in ("hit", "miss"):
        labels = f'cache="gpu",outcome="{outcome}",policy="LRU"'
        assert served.metric(f"moe_cache_lookups_total{{{labels}}}") > 0
    for by in ("cpu", "gpu", "copy"):
        assert served.metric(f'moe_expert_bytes_total{{by="{by}"}}') > 0


def test_the_metrics_of_experts_that_come_from_disk() -> None:
    recorder = Recorder()
    recorder.begin_pass("decode", n_tokens=1, prompt=0)
    for layer in range(2):
        recorder.layer(
            LayerEvent(
                layer, [[0, 1]], None, host_hits=3, host_misses=1, cpu_bytes=40, disk_bytes=10
            )
        )
    recorder.end_pass(0.1)
    metrics = Metrics({"host": "LFRU"})
    metrics.add_layers(recorder)

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"moe_{name}_total", labels)

    of_host = {"cache": "host", "policy": "LFRU"}
    assert value("cache_lookups", outcome="hit", **of_host) == 6
    assert value("cache_lookups", outcome="miss", **of_host) == 2
    assert (value("expert_bytes", by="cpu"), value("expert_bytes", by="disk")) == (80, 20)


@pytest.mark.nightly
def test_two_hundred_requests_of_eight_clients(served: Served) -> None:
    """Some malformed, some given up, one too long: right answers and codes, no growth."""
    rng = random.Random(20)
    texts = [f"w{n} w{n + 1}" for n in range(10, 20)]
    asked = {"max_tokens": 30, "temperature": 0}
    expected = {
        text: served.post(TEXT, {"prompt": text, **asked})[1]["choices"][0]["text"]
        for text in texts
    }
    process = psutil.Process(served.process.pid)

    def one(number: int) -> None:
        kind = rng.random()
        if number == 100 or kind < 0.1:
            path, body, _ = MALFORMED[-8] if number == 100 else rng.choice(MALFORMED)
            assert served.post(path, body)[0] == 400
        elif kind < 0.2:
            served.begin(TEXT, {"prompt": "w7", "max_tokens": 3000, "stream": kind < 0.15}).close()
        else:
            text = rng.choice(texts)
            stream = kind < 0.6
            done = served.client.completions.create(
                model="tiny-chat", prompt=text, stream=stream, **asked
            )
            said = streamed(done)[0] if stream else done.choices[0].text
            assert said == expected[text]

    with ThreadPoolExecutor(8) as clients:
        list(clients.map(one, range(100)))
        held_bytes = process.memory_info().rss
        list(clients.map(one, range(100, 200)))
    assert process.memory_info().rss < held_bytes + (32 << 20)
    assert served.metric("moe_requests_waiting") + served.metric("moe_requests_computing") == 0


def test_sigterm_ends_it_in_order(served: Served) -> None:
    """With one request under way and one that waits (last: it is gone)."""
    before = served.metric("moe_generated_tokens_total")
    endless = {"prompt": "w7", "max_tokens": CONTEXT - 10}
    streams = (True, False, False)
    connections = [served.begin(TEXT, endless | {"stream": stream}) for stream in streams]
    while served.metric("moe_generated_tokens_total") < before + 5:
        assert served.process.poll() is None
    assert served.stop() == 0
    assert served.lines[-2].startswith("serving ")  # no warning, no traceback
    assert served.lines[-1] == "stopped\n"
    answers = [connection.getresponse() for connection in connections]
    assert [answer.status for answer in answers] == [200, 503, 503]
    stopped = {"message": "this server is being stopped", "type": "server_error"}
    stopped |= {"param": None, "code": None}
    for answer in answers[1:]:
        assert json.loads(answer.read())["error"] == stopped
    *_, last = answers[0].read().decode().strip().split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"] == stopped, "and no [DONE]"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--port", "70000"), "expected --port of at most 65535, found 70000"),
        (("--port", "x"), "invalid int value"),
        (("--host", "0.0.0.0"), "protect the model with --api-key"),
        (("--host", "::"), "protect the model with --api-key"),
        (("--host", "somewhere.invalid"), "protect the model with --api-key"),
        (("--host", "256.1.1.1", "--api-key", "k"), "cannot listen on 256.1.1.1"),
        (("--api-key", ""), "not empty"),
        (("--context-tokens", "1"), "--context-tokens of at least 2"),
        (("--cache-nways", "2"), "both positive or both 0"),
    ],
)
def test_mistakes_are_sentences(
    flags: tuple[str, ...], sentence: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve.main(["--model-path", str(model), *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert sentence in line


def test_a_missing_extra_is_one_sentence(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "uvicorn" else name)
    assert serve.main(["--model-path", str(model)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "found no uvicorn: run pip install -r requirements-serve.txt" in line


def test_a_port_that_is_taken_is_one_sentence(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert serve.main(["--model-path", str(model), "--port", port]) == 2
    assert f"cannot listen on 127.0.0.1, port {port}" in capsys.readouterr().err


def test_transformers_still_has_the_seams() -> None:
    """What the server overrides and calls; another release may have renamed it."""
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.utils import BaseHandler, GenerateManager, GenerationState

    for owner, name, parameters in (
        (ModelManager, "_load_model", ["model_id_and_revision"]),
        (ModelManager, "_load_processor", ["model_id_and_revision"]),
        (ModelManager, "process_model_name", ["model_id"]),
        (ModelManager, "shutdown", []),
        (GenerationState, "get_manager", ["model_id", "use_cb"]),
        (GenerateManager, "generate_streaming", ["model", "processor", "inputs", "gen_config"]),
        (GenerateManager, "generate_non_streaming", ["model", "processor", "inputs", "gen_config"]),
        (GenerateManager, "submit", ["fn"]),
        (GenerateManager, "async_submit", ["fn"]),
        (BaseHandler, "_build_generation_config", ["body", "model_generation_config", "use_cb"]),
    ):
        method = getattr(owner, name, None)
        where = f"transformers {transformers.__version__}: {owner.__name__}.{name}"
        assert method is not None, f"{where} is gone; commands/server.py overrides it"
        found = [one for one in inspect.signature(method).parameters if one != "self"]
        assert found[: len(parameters)] == parameters, f"{where} takes {found}"
    taken = inspect.signature(build_server).parameters
    assert {"model_manager", "chat_handler", "completion_handler", "generation_state"} <= {*taken}
