"""What stands before transformers' server: who may ask, what may be asked, whether anybody waits.

Each request gets a ticket, which goes with it to the thread that computes; `/metrics` counts them.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import threading
import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moe_offload.commands.openai_format import (
    POSTED_PATHS,
    Asked,
    RequestError,
    error_body,
    is_loopback,
    read_posted,
)
from moe_offload.experts.recorder import Recorder

_HOST: Final = re.compile(r"\[?([^\[\]]*?)\]?(?::\d+)?")  # of a URL: a name or address, a port
# How transformers' handlers end a stream that failed; text of an answer has no such quotes.
_STREAM_ERROR: Final = re.compile(rb'data: \{"error": "(.*)"\}\n\n\Z', re.DOTALL)
_LARGEST_BODY_BYTES: Final = 16 << 20
# The paths of transformers' app that are served, with the method, and our own.
_PATHS: Final = {
    **dict.fromkeys(POSTED_PATHS, "POST"),
    "/v1/models": "GET",
    "/health": "GET",
    "/metrics": "GET",
}
# The recorder's columns of a cache's hits and misses.
_LOOKUPS: Final = {"gpu": ("hits", "misses"), "host": ("host_hits", "host_misses")}
# What reads experts, and its column of the recorder.
_BYTES: Final = (
    ("cpu", "cpu_bytes"),
    ("gpu", "gpu_bytes"),
    ("copy", "fetch_bytes"),
    ("disk", "disk_bytes"),
)
_TTFT_BUCKETS_S: Final = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)


class ClientGone(Exception):  # noqa: N818 - not an error
    """Nobody waits for this answer any more."""


@dataclass(eq=False)
class Ticket:
    """A request from its arrival to its answer; `gone` is set where nobody waits for that."""

    asked: Asked
    arrived_s: float = field(default_factory=time.perf_counter)
    computing: bool = False
    gone: threading.Event = field(default_factory=threading.Event)

    def require_client(self, *_: object) -> None:
        if self.gone.is_set():
            raise ClientGone


# Of the request that the current task, or the computing thread, works for.
TICKET: Final[ContextVar[Ticket]] = ContextVar("ticket")


class Metrics:
    """What `/metrics` shows. Counted by the computing thread and by the gate."""

    def __init__(self, policies: Mapping[str, str]) -> None:
        """`policies`: of the caches that there are, `gpu` and `host`."""
        self.tickets: set[Ticket] = set()
        self.registry = registry = CollectorRegistry()
        counter = partial(Counter, registry=registry)
        self.requests = counter("moe_requests", "Answered requests", ["path", "status"])
        self.prompt_tokens = counter("moe_prompt_tokens", "Tokens of prompts", ["source"])
        self.generated_tokens = counter("moe_generated_tokens", "Tokens of answers")
        self.first_token_s = Histogram(
            "moe_time_to_first_token_seconds",
            "From a request's arrival to its first token, with the time it waited",
            buckets=_TTFT_BUCKETS_S, registry=registry,
        )  # fmt: skip
        self._policies = policies
        what = "Experts asked of a cache, the GPU's or the host's, by outcome"
        self._lookups = counter("moe_cache_lookups", what, ["cache", "policy", "outcome"])
        what = "Bytes of experts read by the CPU, by the GPU, copied to it, and read from disk"
        self._bytes = counter("moe_expert_bytes", what, ["by"])
        waiting = "moe_requests_waiting", "Requests that wait for their turn"
        computing = "moe_requests_computing", "Requests that compute"
        for is_computing, name_and_help in ((False, waiting), (True, computing)):
            gauge = Gauge(*name_and_help, registry=registry)
            gauge.set_function(partial(self._n_tickets, is_computing))

    def _n_tickets(self, computing: bool) -> float:
        return sum(one.computing == computing for one in list(self.tickets))

    def add_layers(self, recorder: Recorder) -> None:
        """What the finished passes of one generation did."""
        layers = recorder.layer_table()
        for cache, policy in self._policies.items():
            for outcome, column in zip(("hit", "miss"), _LOOKUPS[cache], strict=True):
                count = int(layers[column].sum())
                self._lookups.labels(cache, policy, outcome).inc(count)
        for by, column in _BYTES:
            self._bytes.labels(by).inc(int(layers[column].sum()))


class Gate:
    """Stands before transformers' app: who may ask, what may be asked, whether anybody waits."""

    def __init__(
        self, app: ASGIApp, name: str, api_key: str | None, has_template: bool, metrics: Metrics
    ) -> None:
        self._app = app
        self._name = name
        self._api_key = api_key
        self._has_template = has_template
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, self._counting(scope, send))

    def _counting(self, scope: Scope, send: Send) -> Send:
        path = scope["path"] if scope["path"] in _PATHS else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        return counted

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            self._admit(request)
            if scope["path"] == "/metrics":
                metrics = generate_latest(self._metrics.registry)
                await Response(metrics, media_type="text/plain")(scope, receive, send)
            elif scope["path"] in POSTED_PATHS:
                asked = read_posted(scope["path"], await _body_of(request))
                wanted = asked.body.get("model", self._name)
                if wanted != self._name:
                    raise RequestError(
                        f"the model {wanted!r:.80} is not served here, {self._name!r} is",
                        "model", "model_not_found", status=HTTPStatus.NOT_FOUND,
                    )  # fmt: skip
                if "messages" in asked.body and not self._has_template:
                    raise RequestError(
                        "the model has no chat template: ask it at /v1/completions", "messages"
                    )
                await self._with_ticket(Ticket(asked), scope, receive, send)
            else:
                await self._app(scope, receive, send)
        except RequestError as error:
            await JSONResponse(error.body, error.status)(scope, receive, send)
        except ClientDisconnect:
            pass

    def _admit(self, request: Request) -> None:
        """RequestError for a client without the key, and for what is not served."""
        path = request.scope["path"]
        host = _HOST.fullmatch(request.headers.get("host", ""))
        if self._api_key is not None and path != "/health":
            given = request.headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, f"Bearer {self._api_key}".encode()):
                raise RequestError(
                    "this server wants its API key: Authorization: Bearer KEY",
                    code="invalid_api_key", status=HTTPStatus.UNAUTHORIZED,
                )  # fmt: skip
        elif self._api_key is None and not (host and is_loopback(host[1])):
            # A page in a browser on this machine whose site's name was pointed here.
            raise RequestError("expected to be called by a name of this machine's own", status=403)
        if path not in _PATHS:
            raise RequestError(
                f"{path} is not served: served are {', '.join(_PATHS)}",
                status=HTTPStatus.NOT_FOUND,
            )
        if request.method != _PATHS[path]:
            raise RequestError(
                f"{path} is for {_PATHS[path]}", status=HTTPStatus.METHOD_NOT_ALLOWED
            )
        content_type = request.headers.get("content-type", "").partition(";")[0].strip()
        if request.method == "POST" and content_type != "application/json":
            # Else any page in a browser on this machine could ask without being asked.
            raise RequestError("expected the content type application/json")

    async def _with_ticket(
        self, ticket: Ticket, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Let the app answer; the ticket's client is gone when its connection is, or the task."""
        left = asyncio.Event()
        body = json.dumps(ticket.asked.body).encode()
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            ticket.gone.set()
            left.set()

        async def receive_again() -> Message:
            if unread:
                return unread.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        watcher = asyncio.create_task(watch())
        self._metrics.tickets.add(ticket)
        TICKET.set(ticket)
        try:
            await self._app(scope, receive_again, _ended_as_openai_does(send))
        finally:
            watcher.cancel()
            ticket.gone.set()
            self._metrics.tickets.discard(ticket)


def _ended_as_openai_does(send: Send) -> Send:
    """A stream ends with [DONE], which transformers leaves out, or with an error that is told."""
    is_stream, is_well = False, True

    async def ended(message: Message) -> None:
        nonlocal is_stream, is_well
        if message["type"] == "http.response.start":
            is_stream = (b"content-type", b"text/event-stream; charset=utf-8") in message["headers"]
        elif is_stream:
            body = message.get("body", b"")
            if error := _STREAM_ERROR.search(body):
                is_well = False
                told = json.dumps(error_body(error[1].decode(), "server_error")).encode()
                message = {**message, "body": b"%sdata: %s\n\n" % (body[: error.start()], told)}
            elif is_well and not message.get("more_body", False):
                message = {**message, "body": body + b"data: [DONE]\n\n"}
        await send(message)

    return ended


async def _body_of(request: Request) -> bytes:
    """The bytes of the body; RequestError for more than any prompt has."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _LARGEST_BODY_BYTES:
            raise RequestError(
                f"the body has more than {_LARGEST_BODY_BYTES >> 20} MB",
                status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            )
    return bytes(body)
