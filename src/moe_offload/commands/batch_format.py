"""OpenAI's batch format: a request a line, and the line that answers it.

{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}} is answered by
{"id": ..., "custom_id": "a", "response": {"status_code": 200, "request_id": ..., "body": {...}},
"error": null}. A request that cannot be served is answered with status 400, one that failed here
with 500 and the reason, as the API itself would.
"""

from __future__ import annotations

import time
from typing import Any, Final, Literal

from moe_offload.errors import UserError

Endpoint = Literal["/v1/chat/completions", "/v1/completions"]

_TEXTS: Final[dict[Endpoint, str]] = {
    "/v1/chat/completions": "messages",
    "/v1/completions": "prompt",
}
IGNORED: Final = {"model", "user", "metadata", "store", "service_tier", "stream_options"}
# Fields that are served only with these values, which ask for nothing.
NEUTRAL: Final[dict[str, Any]] = {
    "n": 1,
    "best_of": 1,
    "stream": False,
    "echo": False,
    "logprobs": False,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "tools": [],
    "response_format": {"type": "text"},
}
_FOR_SAMPLING: Final = ("top_p", "top_k", "min_p")
_FINISH_REASONS: Final = {"eos": "stop", "stop": "stop", "length": "length", "context": "length"}


def is_request(line: dict[str, Any]) -> bool:
    """Whether a line of a prompt file is in this format."""
    return "custom_id" in line or "body" in line


def read_request(line: dict[str, Any]) -> tuple[str, Endpoint, dict[str, Any]]:
    """The custom_id, the endpoint, and the body as a line of our own format would have it.

    UserError, to be read after the line's name, for what cannot be served.
    """
    name, url, body = line.get("custom_id"), line.get("url"), line.get("body")
    if not isinstance(name, str) or not name:
        raise UserError(f"has the custom_id {name!r}: expected a text that is not empty")
    if unknown := sorted(line.keys() - {"custom_id", "method", "url", "body"}):
        raise UserError(f"has the unknown field {unknown[0]!r} beside custom_id and body")
    if line.get("method", "POST") != "POST":
        raise UserError(f"has the method {line['method']!r}: expected POST")
    if url not in _TEXTS:
        raise UserError(f"has the url {url!r}: expected one of {', '.join(_TEXTS)}")
    if not isinstance(body, dict):
        raise UserError("has no body: expected an object")
    fields = {key: value for key, value in body.items() if value is not None}
    fields = {key: value for key, value in fields.items() if key not in IGNORED}
    for key, nothing in NEUTRAL.items():
        if fields.pop(key, nothing) != nothing:
            raise UserError(f"has {key} {body[key]!r}, which is not served")
    if "max_completion_tokens" in fields:
        fields["max_tokens"] = fields.pop("max_completion_tokens")
    if fields.get("temperature") == 0:  # then they ask for nothing either
        fields = {key: value for key, value in fields.items() if key not in _FOR_SAMPLING}
    if _TEXTS[url] not in fields:
        raise UserError(f"has no {_TEXTS[url]}, which {url} needs")
    if isinstance(fields.get("messages"), list):
        fields["messages"] = [_plain_message(message) for message in fields["messages"]]
    return name, url, fields


def _plain_message(message: Any) -> Any:
    """A message of role and content, a text; what is none is left for others to refuse.

    Its `name` is ignored, as the server ignores it.
    """
    if not isinstance(message, dict):
        return message
    message = {key: value for key, value in message.items() if key != "name"}
    if message.get("role") == "developer":
        message["role"] = "system"
    content = message.get("content")
    if isinstance(content, list) and content:
        for part in content:
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                raise UserError("has a message with a part that is not text")
        message["content"] = "\n".join(part["text"] for part in content)
    return message


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
    body = {"error": {"message": message, "type": kind, "param": None, "code": None}}
    return _line(custom_id, identity, 400 if is_request_wrong else 500, body)


def _line(custom_id: str, identity: str, status: int, body: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": f"batch_req_{identity}",
        "custom_id": custom_id,
        "response": {"status_code": status, "request_id": f"req_{identity}", "body": body},
        "error": None,
    }
