"""Entry point of serve.py: an OpenAI-compatible server of one prepared model."""

from __future__ import annotations

import socket
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import fields
from importlib.util import find_spec

from moe_offload.commands.arguments import (
    ArgumentParser,
    a_text,
    add_flags,
    chosen,
    require_model,
    run_command,
)
from moe_offload.commands.imports import importing
from moe_offload.commands.openai_format import is_loopback
from moe_offload.config import LARGEST, CacheOptions, ModelOptions, flag_of, require_range
from moe_offload.errors import UserError
from moe_offload.machine.terminal import Interruption, say

_EXTRA = ("fastapi", "uvicorn", "openai", "prometheus_client")
# Options of runs on prompt files, and of random weights, which have nothing to say.
_OF_OTHERS = {"ray", "dummy_shape", "dummy_layers", "dummy_format", "routing_trace"}
_CONTEXT_TOKENS = 8192  # 1 GB of KV cache for Mixtral 8x7B


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line until a signal ends it; returns the exit code."""
    parser = ArgumentParser(
        prog="serve.py",
        description="Serve one prepared model to OpenAI's clients: /v1/chat/completions, "
        "/v1/completions, /v1/models, /health and /metrics. One request computes at a time.",
        allow_abbrev=False,
    )
    for options in (ModelOptions, CacheOptions):
        names = {one.name for one in fields(options) if flag_of(one).help}
        add_flags(parser, options, *(names - _OF_OTHERS))
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine alone)"
    )
    parser.add_argument(
        "--port", type=int, default=8000, help="port to listen on; 0: any (default 8000)"
    )
    parser.add_argument(
        "--api-key", metavar="KEY", type=a_text,
        help="refuse requests without this bearer token; a must where --host is no loopback",
    )  # fmt: skip
    parser.add_argument(
        "--served-model-name", metavar="NAME", type=a_text,
        help="what clients call the model (default: its folder's name)",
    )  # fmt: skip
    parser.add_argument(
        "--context-tokens", metavar="N", type=int, default=_CONTEXT_TOKENS,
        help="most tokens of a prompt and its answer; memory must hold their KV cache "
        f"(default {_CONTEXT_TOKENS}, at most the model's context)",
    )  # fmt: skip
    return run_command(parser, _serve, argv)


def _serve(arguments: Namespace) -> int:
    model = chosen(ModelOptions, vars(arguments))
    cache = chosen(CacheOptions, vars(arguments))
    require_range("--port", arguments.port, 0, 65535)
    require_range("--context-tokens", arguments.context_tokens, 2, LARGEST)
    if arguments.api_key == "":
        raise UserError("expected --api-key as a text that is not empty")
    if not is_loopback(arguments.host) and arguments.api_key is None:
        raise UserError(
            f"--host {arguments.host} lets other machines in: protect the model with --api-key"
        )
    assert model.model_path is not None  # there are no random weights to serve
    require_model(model)
    if missing := [name for name in _EXTRA if find_spec(name) is None]:
        raise UserError(
            f"expected the packages of requirements-serve.txt, found no {', '.join(missing)}: "
            "run pip install -r requirements-serve.txt, or pip install '.[serve]'"
        )
    name = arguments.served_model_name or model.model_path.resolve().name
    with _listener(arguments.host, arguments.port) as listener, Interruption():
        say(f"loading {model.model_path} ...")
        with importing():
            from moe_offload.commands.server import serve

        serve(listener, name, model, cache, arguments.context_tokens, arguments.api_key)
    return 0


def _listener(host: str, port: int) -> socket.socket:
    """A socket bound to the address, not listening yet: clients are refused until all is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        return listener
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"cannot listen on {host}, port {port} ({error}): choose another --host or --port"
        ) from error
