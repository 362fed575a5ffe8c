"""transformers' own server with a loaded engine in its model's place.

Routes, handlers and the thread that computes are those of `transformers serve`. Two overridden
methods of its ModelManager put our model in; a `Gate` before its app lets in what may be asked,
and knows when a client has gone.
"""

from __future__ import annotations

import asyncio
import inspect
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from typing import Any, Final

import torch
import uvicorn
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerateManager, GenerationState
from transformers.utils import logging

from moe_offload.commands.conversations import UpToStop
from moe_offload.commands.gate import TICKET, ClientGone, Gate, Metrics, Ticket
from moe_offload.commands.openai_format import error_body
from moe_offload.config import CacheOptions, ModelOptions
from moe_offload.engine.engine import Engine
from moe_offload.engine.loading import load_engine, open_prepared
from moe_offload.errors import UserError
from moe_offload.experts.disk_tier import DiskTier
from moe_offload.experts.recorder import Recorder
from moe_offload.machine.terminal import say
from moe_offload.model.generation import cache_argument, context_length, require_fitting
from moe_offload.model.kv_cache import PrefixCache
from moe_offload.model.tokenization import CheckpointTokenizer

_GRACE_S: Final = 2  # that requests have to end in when the server is stopped
_STOPPING: Final = "this server is being stopped"
# Of a checkpoint's generation configuration: one answer, in the KV cache that it is lent.
_PLAIN: Final = {"num_beams": 1, "num_return_sequences": 1, "cache_implementation": None}


def serve(
    listener: socket.socket,
    name: str,
    model: ModelOptions,
    cache: CacheOptions,
    context_tokens: int,
    api_key: str | None,
) -> None:
    """Load the model, and answer requests on the bound `listener` until a signal comes.

    Clients call it `name`; `context_tokens` are the most of a prompt and its answer. UserError for
    a model or a tokenizer that cannot be served.
    """
    logging.set_verbosity_error()  # transformers' handlers warn of each request
    source = open_prepared(model)
    tokenizer = CheckpointTokenizer(source.folder)
    if not tokenizer.backend.is_fast:
        raise UserError(
            f"a server needs the tokenizer.json of the model, and {source.folder} has none: copy "
            "it there"
        )
    if tokenizer.backend.chat_template:
        tokenizer.encode("Hello", raw=False)  # bounded: a template that never ends is found here
    n_tokens = min(context_tokens, context_length(source.config) or context_tokens)
    with load_engine(source, model, cache, context_tokens=n_tokens, say=say) as engine:
        engine.calibrate_for(n_tokens)
        for note in engine.notes:
            say(note)
        policies = {"gpu": cache.policy} if engine.accelerator is not None else {}
        if isinstance(engine.store, DiskTier):
            policies["host"] = model.host_policy
        metrics = Metrics(policies)
        generator = Generator(engine, tokenizer.backend, n_tokens, metrics)
        app = build_app(name, engine, tokenizer.backend, generator)
        gate = Gate(app, name, api_key, bool(tokenizer.backend.chat_template), metrics)
        config = uvicorn.Config(
            gate, log_level="warning", access_log=False, timeout_graceful_shutdown=2 * _GRACE_S
        )
        host, port = listener.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        ready = f"serving {name} at http://{host}:{port}/v1 (Ctrl-C ends it)"
        try:
            # uvicorn answers signals, and passes them on when it has ended
            with suppress(KeyboardInterrupt):
                _Server(config, generator, ready).run(sockets=[listener])
        finally:
            generator.close()
            engine.dispatcher.turn.acquire()  # no forward pass is under way, and none begins
    say("stopped")


class _Progress(StoppingCriteria):  # type: ignore[misc]  # transformers has no types
    """Counts the tokens of one answer, and ends it at a stop text or where its client has gone.

    transformers' own search for stop texts knows not every tokenizer, and takes seconds to begin.
    """

    def __init__(self, ticket: Ticket, metrics: Metrics, tokenizer: Any, n_prompt: int) -> None:
        self._ticket = ticket
        self._metrics = metrics
        self._tokenizer = tokenizer
        self._is_first = True
        self._n_prompt = n_prompt
        # So many tokens may hold a stop text: one for each byte, and those around it.
        self._n_recent = 4 * max(map(len, ticket.asked.stop), default=0) + 4

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self._ticket.require_client()
        if self._is_first:
            self._is_first = False
            self._metrics.first_token_s.observe(time.perf_counter() - self._ticket.arrived_s)
        self._metrics.generated_tokens.inc()
        is_over = bool(self._ticket.asked.stop) and self._said_stop(input_ids[0])
        return torch.full((len(input_ids),), is_over, device=input_ids.device)

    def _said_stop(self, ids: torch.Tensor) -> bool:
        recent = ids[max(self._n_prompt, len(ids) - self._n_recent) :]
        text = self._tokenizer.decode(recent, skip_special_tokens=True)
        return any(stop in text for stop in self._ticket.asked.stop)


class Generator:
    """The model's `generate` for requests, one after the other on transformers' thread.

    It gives the answer the KV cache of the conversation that it goes on with, seeds the sampler,
    records what the experts did, and leaves the model, within one layer, where the client has gone.
    """

    def __init__(self, engine: Engine, tokenizer: Any, n_tokens: int, metrics: Metrics) -> None:
        self.n_tokens = n_tokens
        self.is_closed = False
        self._engine = engine
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._prefixes = PrefixCache(engine.model, n_tokens)
        self._cache_name = cache_argument(engine.model)
        self._generate = engine.model.generate
        engine.dispatcher.on_layer.append(self._require_client)

    def close(self) -> None:
        """Leave the model within one layer, and never enter it again."""
        self.is_closed = True

    def _require_client(self) -> None:
        if self.is_closed:
            raise ClientGone(_STOPPING)
        ticket = TICKET.get(None)
        if ticket is not None:
            ticket.require_client()

    def __call__(self, *, input_ids: torch.Tensor, **settings: Any) -> torch.Tensor:
        ticket = TICKET.get()
        ticket.computing = True
        self._require_client()
        if self._engine.device.type == "cuda":
            torch.cuda.set_device(self._engine.device)  # this thread's
        if ticket.asked.seed is not None:
            torch.manual_seed(ticket.asked.seed)
        recorder = self._engine.dispatcher.recorder = Recorder()  # of this request alone
        cache, n_held = self._prefixes.take(input_ids[0].tolist())
        self._metrics.prompt_tokens.labels("cache").inc(n_held)
        self._metrics.prompt_tokens.labels("evaluated").inc(input_ids.shape[1] - n_held)
        if cache is not None:
            settings[self._cache_name] = cache
        progress = _Progress(ticket, self._metrics, self._tokenizer, input_ids.shape[1])
        try:
            sequences: torch.Tensor = self._generate(
                input_ids=input_ids, stopping_criteria=StoppingCriteriaList([progress]), **settings
            )
        finally:
            self._metrics.add_layers(recorder)
        self._prefixes.keep(cache, sequences[0].tolist())
        return sequences


class _Server(uvicorn.Server):
    """uvicorn, which says when it listens, and cancels no request when it ends.

    What is not answered after some grace is answered by an error.
    """

    def __init__(self, config: uvicorn.Config, generator: Generator, ready: str) -> None:
        super().__init__(config)
        self._generator = generator
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        say(self._ready)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(_GRACE_S, self._generator.close)
        await super().shutdown(sockets)


class OneAtATime(GenerateManager):  # type: ignore[misc]
    """transformers' thread that computes requests in their order, told whose each one is."""

    def __init__(self, n_tokens: int) -> None:
        super().__init__()
        self._n_tokens = n_tokens

    def _fit(self, model: Any, inputs: Any, gen_config: Any) -> None:
        """UserError for a prompt beyond the context; an answer ends where that is full."""
        ids = inputs["input_ids"][0].tolist()
        require_fitting(ids, model.config)
        n_left = self._n_tokens - len(ids)
        if n_left < 1:
            raise UserError(
                f"the prompt has {len(ids)} tokens, but this server's context holds "
                f"{self._n_tokens}: shorten it, or start the server with more --context-tokens"
            )
        gen_config.max_new_tokens = min(gen_config.max_new_tokens, n_left)

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *more: Any, **named: Any
    ) -> tuple[Any, Any]:
        self._fit(model, inputs, gen_config)
        queue, streamer = super().generate_streaming(
            model, processor, inputs, gen_config, *more, **named
        )
        stop = TICKET.get().asked.stop
        return (QueueUpToStop(queue, stop) if stop else queue), streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *more: Any, **named: Any
    ) -> tuple[str, int, Any]:
        self._fit(model, inputs, gen_config)
        text, n_prompt, ids = await super().generate_non_streaming(
            model, processor, inputs, gen_config, *more, **named
        )
        answer = UpToStop(TICKET.get().asked.stop)
        return answer.push(text) + answer.finish(), n_prompt, ids

    def submit(self, fn: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        return super().submit(copy_context().run, fn, *arguments, **named)

    def async_submit(self, fn: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        # Shielded: the thread has an answer to hand over even when nobody waits for it.
        return asyncio.shield(super().async_submit(copy_context().run, fn, *arguments, **named))


class QueueUpToStop:
    """A queue of an answer's pieces that ends before the first of its stop texts."""

    def __init__(self, queue: asyncio.Queue[Any], stop: tuple[str, ...]) -> None:
        self._queue = queue
        self._answer = UpToStop(stop)
        self._ready: list[Any] = []

    async def get(self) -> Any:
        while not self._ready:
            self._add(await self._queue.get())
        return self._ready.pop(0)

    def get_nowait(self) -> Any:
        while not self._ready:
            self._add(self._queue.get_nowait())
        return self._ready.pop(0)

    def _add(self, item: Any) -> None:
        is_text = type(item) is str  # else the end, an error, a part that is no text of the answer
        text = self._answer.push(item) if is_text else self._answer.finish()
        self._ready += [text] if text else []
        self._ready += [] if is_text else [item]


class _AsAsked:
    """Settings that transformers' handlers leave out; the gate has checked the others."""

    _valid_params_class = None

    def _build_generation_config(self, body: dict[str, Any], *more: Any, **named: Any) -> Any:
        config = super()._build_generation_config(body, *more, **named)  # type: ignore[misc]
        if "temperature" in body:
            config.do_sample = body["temperature"] > 0
        for name in ("top_k", "min_p", "repetition_penalty"):
            if name in body:
                setattr(config, name, body[name])
        if config.top_k is None:
            config.top_k = 0  # else transformers would sample from the 50 likeliest
        return config


class ChatHandler(_AsAsked, ChatCompletionHandler):  # type: ignore[misc]
    """transformers' /v1/chat/completions."""


class TextHandler(_AsAsked, CompletionHandler):  # type: ignore[misc]
    """transformers' /v1/completions."""


class LoadedModel(ModelManager):  # type: ignore[misc]
    """transformers' manager of models, of one model that is there already."""

    def __init__(
        self, name: str, model: Any, tokenizer: Any, generator: Generator, thread: OneAtATime
    ) -> None:
        self._served = model, tokenizer
        self._generator = generator
        self._thread = thread
        super().__init__(device="cpu", force_model=name)

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id  # no revision behind it: clients see it in answers

    def _load_processor(self, model_id_and_revision: str, *_: Any, **__: Any) -> Any:
        return self._served[1]

    def _load_model(self, model_id_and_revision: str, *_: Any, **__: Any) -> Any:
        return self._served[0]

    def shutdown(self) -> None:
        """The server ends: what is computed is left, while its loop can still be told so."""
        self._generator.close()
        with suppress(TimeoutError):
            self._thread.submit(lambda: None).result(timeout=_GRACE_S)
        super().shutdown()


class _State(GenerationState):  # type: ignore[misc]
    """One manager of generations for all requests."""

    def __init__(self, manager: OneAtATime) -> None:
        super().__init__()
        self._one = manager

    def get_manager(self, model_id: str, use_cb: bool = False) -> OneAtATime:
        return self._one


def build_app(name: str, engine: Engine, tokenizer: Any, generator: Generator) -> FastAPI:
    """transformers' app for one loaded model; its errors are OpenAI's."""
    template = tokenizer.apply_chat_template

    def apply_chat_template(*arguments: Any, **named: Any) -> Any:
        try:
            return template(*arguments, **named)
        except Exception as error:  # a template is a program
            raise UserError(f"the model's chat template refuses this: {error}") from error

    tokenizer.apply_chat_template = apply_chat_template
    engine.model.generate = generator
    for setting, plain in _PLAIN.items():
        setattr(engine.model.generation_config, setting, plain)
    thread = OneAtATime(generator.n_tokens)
    manager = LoadedModel(name, engine.model, tokenizer, generator, thread)
    state = _State(thread)
    handlers: dict[str, Any] = {
        "chat_handler": ChatHandler(manager, state),
        "completion_handler": TextHandler(manager, state),
    }
    others = [one for one in inspect.signature(build_server).parameters if one.endswith("_handler")]
    handlers = dict.fromkeys(others) | handlers  # the gate keeps requests from the others
    app: FastAPI = build_server(manager, generation_state=state, **handlers)
    app.add_exception_handler(UserError, _refused)
    app.add_exception_handler(ClientGone, _gone)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(Exception, _failed)
    return app


async def _refused(_: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 400)
    message = str(getattr(error, "detail", error))
    return JSONResponse(error_body(message, "invalid_request_error"), status)


async def _gone(_: Request, error: Exception) -> Response:
    """Somebody reads this only where the server is being stopped."""
    del error
    return JSONResponse(error_body(_STOPPING, "server_error"), 503)


async def _failed(_: Request, error: Exception) -> Response:
    return JSONResponse(error_body(f"{type(error).__name__}: {error}", "server_error"), 500)
