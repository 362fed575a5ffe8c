"""What a client of OpenAI's API may ask for, checked before anything is computed; batch files.

The body of a request, posted to the server or in a line of a batch file, is left with the fields
that are honoured, each of its type and in its range. What asks for nothing (`n` of 1) is left out,
what is not served is refused by name.

A batch's line {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}} is
answered by {"id": ..., "custom_id": "a", "response": {"status_code": 200, "request_id": ...,
"body": {...}}, "error": null}. A request that cannot be served is answered with status 400, one
that failed here with 500 and the reason, as the API itself would.
"""

from __future__ import annotations

import ipaddress
import json
import time
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moe_offload.config import LARGEST, LEAST_SEED
from moe_offload.errors import UserError

_MOST_STOPS: Final = 4  # as OpenAI's
_LONGEST_STOP: Final = 256
_LEAST_TEMPERATURE: Final = 1e-3  # above 0; below, a division of scores may overflow
_IGNORED: Final = ("user", "metadata", "store", "service_tier", "stream_options")
# Fields that are served only with these values, which ask for nothing.
_NEUTRAL: Final[dict[str, Any]] = {
    "n": 1,
    "best_of": 1,
    "echo": False,
    "logprobs": False,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "response_format": {"type": "text"},
}
# Of the settings that `transformers chat` sends as one text, those that are honoured.
_OF_GENERATION_CONFIG: Final = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
    "stop_strings": "stop",
}

Text = Annotated[str, Field(min_length=1)]
StopText = Annotated[str, Field(min_length=1, max_length=_LONGEST_STOP)]


class RequestError(Exception):
    """A request that is not served: its status, and what OpenAI's error body says of it."""

    def __init__(
        self, message: str, param: str | None = None, code: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = error_body(message, "invalid_request_error", param, code)


def is_loopback(host: str) -> bool:
    """Whether an address, or a host's name, is this machine's alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def error_body(
    message: str, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Checked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Open(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class _Part(_Open):
    type: Literal["text"]
    text: str


class _Function(_Open):
    name: Text
    arguments: str


class _ToolCall(_Open):
    id: str
    type: Literal["function"] = "function"
    function: _Function


class _Message(_Open):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[_Part], Field(min_length=1)] | None = None
    tool_calls: list[_ToolCall] | None = None
    tool_call_id: str | None = None


class _Signature(_Open):
    name: Text
    description: str | None = None
    parameters: dict[str, Any] | None = None


class _Tool(_Open):
    type: Literal["function"]
    function: _Signature


class _Settings(_Checked):
    model: str | None = None
    stream: bool | None = None
    max_tokens: int | None = Field(None, ge=1, le=LARGEST)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=LARGEST)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    seed: int | None = Field(None, ge=LEAST_SEED, le=LARGEST)
    stop: StopText | Annotated[list[StopText], Field(max_length=_MOST_STOPS)] | None = None


class _Chat(_Settings):
    messages: list[_Message] = Field(min_length=1)
    tools: list[_Tool] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    chat_template_kwargs: (
        dict[Literal["enable_thinking", "thinking", "reasoning_effort"], bool | str] | None
    ) = None


class _Text(_Settings):
    prompt: Text


class _Load(_Checked):
    model: str


_BODIES: Final[dict[str, type[_Checked]]] = {
    "/v1/chat/completions": _Chat,
    "/v1/completions": _Text,
    "/load_model": _Load,  # `transformers chat` asks for it first
}
POSTED_PATHS: Final = tuple(_BODIES)


@dataclass(frozen=True)
class Asked:
    """A request: the body for transformers' handlers, and what they leave to others."""

    body: dict[str, Any]
    seed: int | None
    stop: tuple[str, ...]


def read_posted(path: str, data: bytes) -> Asked:
    """The checked request in `data`, posted to one of POSTED_PATHS; else RequestError."""
    return read_body(path, _json_object(data))


def read_body(path: str, given: dict[str, Any]) -> Asked:
    """The checked request of the JSON object `given`, for one of POSTED_PATHS; else RequestError.

    A message's parts become one text, and its role `developer` `system`.
    """
    fields = {key: value for key, value in given.items() if value is not None}
    if "generation_config" in fields:
        fields = _generation_config(fields.pop("generation_config")) | fields
    if "max_completion_tokens" in fields:
        fields["max_tokens"] = fields.pop("max_completion_tokens")
    for name, nothing in _NEUTRAL.items():
        if fields.pop(name, nothing) != nothing:
            raise RequestError(f"{name} is served only as {json.dumps(nothing)}", name)
    for name in _IGNORED:
        fields.pop(name, None)
    try:
        checked = _BODIES[path].model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        param = ".".join(map(str, first["loc"]))
        raise RequestError(f"{param or 'the request'}: {first['msg']}", param or None) from error
    body = checked.model_dump(exclude_none=True)
    seed, stop = body.pop("seed", None), body.pop("stop", ())
    if body.pop("tool_choice", None) == "none" or not body.get("tools"):
        body.pop("tools", None)
    if body.get("temperature"):
        body["temperature"] = max(body["temperature"], _LEAST_TEMPERATURE)
    for number, message in enumerate(body.get("messages", ())):
        _require_content(number, message)
        if message["role"] == "developer":
            message["role"] = "system"
        if isinstance(message.get("content"), list):
            message["content"] = "\n".join(part["text"] for part in message["content"])
    return Asked(body, seed, (stop,) if isinstance(stop, str) else tuple(stop))


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
        json.dumps(found, ensure_ascii=False).encode()  # halves of surrogate pairs are no text
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise RequestError(f"the body is {type(found).__name__}, expected an object")
    return found


def _generation_config(text: object) -> dict[str, Any]:
    """The fields that transformers' own settings stand for."""
    name = "generation_config"
    if not isinstance(text, str):
        raise RequestError(f"{name}: expected transformers' settings as a text of JSON", name)
    given = _json_object(text.encode("utf-8", "replace"))
    fields = {
        field: given[known]
        for known, field in _OF_GENERATION_CONFIG.items()
        if given.get(known) is not None
    }
    if given.get("do_sample") is False:
        fields["temperature"] = 0
    elif given.get("do_sample") is True:
        fields.setdefault("temperature", 1)
    return fields


def _require_content(number: int, message: dict[str, Any]) -> None:
    """RequestError for a message that says nothing, and for arguments that no template takes."""
    calls = message.get("tool_calls") or []
    if "content" not in message and not calls:
        name = f"messages.{number}.content"
        raise RequestError(f"{name}: expected text", name)
    for place, call in enumerate(calls):
        try:
            if isinstance(json.loads(call["function"]["arguments"]), dict):
                continue
        except (ValueError, RecursionError):
            pass
        name = f"messages.{number}.tool_calls.{place}.function.arguments"
        raise RequestError(f"{name}: expected an object as a text of JSON", name)


Endpoint = Literal["/v1/chat/completions", "/v1/completions"]

_ENDPOINTS: Final[tuple[Endpoint, ...]] = get_args(Endpoint)
_OF_THE_SERVER: Final = ("stream", "tools", "chat_template_kwargs")
_FOR_SAMPLING: Final = ("top_p", "top_k", "min_p")
_FINISH_REASONS: Final = {"eos": "stop", "stop": "stop", "length": "length", "context": "length"}


def is_request(line: dict[str, Any]) -> bool:
    """Whether a line of a prompt file is in this format."""
    return "custom_id" in line or "body" in line


def read_request(
    line: dict[str, Any], run_temperature: float
) -> tuple[str, Endpoint, dict[str, Any]]:
    """The custom_id, the endpoint, and the body as a line of our own format would have it.

    Where the body's temperature, or else the run's, is 0, its other settings of sampling ask for
    nothing. UserError, to be read after the line's name, for what cannot be served.
    """
    name, body = line.get("custom_id"), line.get("body")
    url = next((one for one in _ENDPOINTS if one == line.get("url")), None)
    if not isinstance(name, str) or not name:
        raise UserError(f"has the custom_id {name!r}: expected a text that is not empty")
    if unknown := sorted(line.keys() - {"custom_id", "method", "url", "body"}):
        raise UserError(f"has the unknown field {unknown[0]!r} beside custom_id and body")
    if line.get("method", "POST") != "POST":
        raise UserError(f"has the method {line['method']!r}: expected POST")
    if url is None:
        raise UserError(f"has the url {line.get('url')!r}: expected one of {', '.join(_ENDPOINTS)}")
    if not isinstance(body, dict):
        raise UserError("has no body: expected an object")
    try:
        asked = read_body(url, body)
    except RequestError as error:
        raise UserError(f"has a body that cannot be served: {error}") from error
    fields = asked.body | {"seed": asked.seed, "stop": list(asked.stop) or None}
    fields = {key: value for key, value in fields.items() if value is not None}
    fields.pop("model", None)
    if not fields.get("stream"):
        fields.pop("stream", None)
    if refused := [key for key in _OF_THE_SERVER if key in fields]:
        raise UserError(f"has {refused[0]}, which a server serves (serve.py) and a file does not")
    if fields.get("temperature", run_temperature) == 0:
        fields = {key: value for key, value in fields.items() if key not in _FOR_SAMPLING}
    return name, url, fields


def answer_line(
    custom_id: str, endpoint: Endpoint, identity: str, model: str, facts: dict[str, Any]
) -> dict[str, Any]:
    """The line for an answer; `identity` names it, `facts` are a conversation's."""
    is_chat = endpoint == "/v1/chat/completions"
    said = {"message": {"role": "assistant", "content": facts["response"]}}
    choice = said if is_chat else {"text": facts["response"]}
    finish_reason = _FINISH_REASONS[facts["stop"]]
    n_prompt, n_generated = facts["prompt_tokens"], facts["generated_tokens"]
    body = {
        "id": ("chatcmpl-" if is_chat else "cmpl-") + identity,
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, **choice, "logprobs": None, "finish_reason": finish_reason}],
        "usage": {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_generated,
            "total_tokens": n_prompt + n_generated,
        },
    }
    return _line(custom_id, identity, 200, body)


def error_line(custom_id: str, identity: str, message: str, is_request_wrong: bool) -> Any:
    """The line for a request that is wrong, or that failed here."""
    kind = "invalid_request_error" if is_request_wrong else "server_error"
    return _line(custom_id, identity, 400 if is_request_wrong else 500, error_body(message, kind))


def _line(custom_id: str, identity: str, status: int, body: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": f"batch_req_{identity}",
        "custom_id": custom_id,
        "response": {"status_code": status, "request_id": f"req_{identity}", "body": body},
        "error": None,
    }
