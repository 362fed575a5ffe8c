"""Prompts into answers: token ids, the model's text as it grows, and where it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from transformers import PretrainedConfig

from moe_offload.commands.answer_text import UpToStop
from moe_offload.commands.prompts import LeftOut, Prompt
from moe_offload.engine.engine import Engine
from moe_offload.errors import UserError
from moe_offload.model.generation import Generated, Request, generate, require_fitting, stop_ids
from moe_offload.model.tokenization import StreamingDetokenizer, Tokenizer

Encoded = tuple[Prompt, list[int]]  # a prompt and its token ids


def encode_prompts(
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    config: PretrainedConfig,
    left_out: LeftOut,
) -> list[Encoded]:
    """Each prompt with its token ids; one that the model cannot take is left out."""
    encoded = []
    for prompt in prompts:
        try:
            ids = _encode(tokenizer, prompt)
            require_fitting(ids, config, prompt.name)
            encoded.append((prompt, ids))
        except UserError as error:
            left_out.add(error, str(prompt.id) if prompt.endpoint else None)
    return encoded


def _encode(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    try:
        return tokenizer.encode(prompt.text, prompt.raw)
    except UserError as error:
        raise UserError(f"{prompt.name}: {error}") from error


class Conversation:
    """One prompt and what the model makes of it, up to the first of its stop texts."""

    def __init__(self, prompt: Prompt, record: Generated, tokenizer: Tokenizer) -> None:
        self.prompt = prompt
        self.record = record
        self.text = ""
        self.shown = ""  # the same as a person sees it, once it is finished
        self._detokenizer = StreamingDetokenizer(tokenizer)
        self._answer = UpToStop(prompt.options.stop)

    @property
    def is_finished(self) -> bool:
        return self.record.stop != "interrupted"

    def push(self, token: int) -> str:
        """The text that became certain with `token`; sets the record's `stop` at a stop text."""
        return self._add(self._answer.push(self._detokenizer.push(token)))

    def finish(self) -> str:
        """What was held back."""
        rest = self._answer.push(self._detokenizer.finish())
        return self._add(rest + self._answer.finish())

    def facts(self) -> dict[str, Any]:
        """The answer as plain JSON values."""
        record = self.record
        return {
            "response": self.text,
            "stop": record.stop,
            "prompt_tokens": record.n_prompt_tokens,
            "generated_tokens": len(record.ids),
            "prefill_s": round(record.token_times_s[0], 6),
            "decode_s": round(sum(record.token_times_s[1:]), 6),
        }

    def _add(self, piece: str) -> str:
        self.text += piece
        if self._answer.is_over:
            self.record.stop = "stop"
        return piece


def converse(
    engine: Engine,
    tokenizer: Tokenizer,
    encoded: Sequence[Encoded],
    batch_size: int,
    begun: dict[int, Conversation],
    on_pass: Callable[[Sequence[int], bool], None] | None = None,
) -> Iterator[tuple[Conversation, str]]:
    """Answer the prompts; after each token its conversation, and the text that became certain.

    A conversation is in `begun`, by its prompt's index, from its first token on; whoever iterates
    takes it out and calls its `finish` when it is finished. `on_pass` as in `generate`.
    """
    eos_ids = stop_ids(engine.model, tokenizer.eos_ids)
    prompts = {prompt.index: prompt for prompt, _ in encoded}

    def before_pass(numbers: Sequence[int], evaluates: bool) -> None:
        engine.follow_prompts(numbers)
        if on_pass is not None:
            on_pass(numbers, evaluates)

    requests = [Request(prompt.index, ids, prompt.options) for prompt, ids in encoded]
    steps = generate(engine.model, requests, batch_size, eos_ids=eos_ids, on_pass=before_pass)
    for record, token in steps:
        engine.dispatcher.recorder.token(record.prompt, record.token_times_s[-1], time.time())
        if record.prompt not in begun:
            begun[record.prompt] = Conversation(prompts[record.prompt], record, tokenizer)
        one = begun[record.prompt]
        yield one, "" if token in eos_ids else one.push(token)
