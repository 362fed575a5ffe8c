"""OpenAI's batch format: a request a line, and the line that answers it.

{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}} is answered by
{"id": ..., "custom_id": "a", "response": {"status_code": 200, "request_id": ..., "body": {...}},
"error": null}. A request that cannot be served is answered with status 400, one that failed here
with 500 and the reason, as the API itself would.
"""

from __future__ import annotations

import time
from typing import Any, Final, Literal, get_args

from moe_offload.errors import UserError

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
    # Not at the top: pydantic takes a tenth of a second, and few prompts are in this format.
    from moe_offload.commands.api_requests import RequestError, read_body

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
    body = {"error": {"message": message, "type": kind, "param": None, "code": None}}
    return _line(custom_id, identity, 400 if is_request_wrong else 500, body)


def _line(custom_id: str, identity: str, status: int, body: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": f"batch_req_{identity}",
        "custom_id": custom_id,
        "response": {"status_code": status, "request_id": f"req_{identity}", "body": body},
        "error": None,
    }
