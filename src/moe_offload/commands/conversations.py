"""Prompts into answers: token ids, the text as it grows, where it ends, and how a person sees it.

Reasoning, the `<think>` parts, is shown dimmed, hidden or as it is.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from transformers import PretrainedConfig

from moe_offload.commands.prompts import LeftOut, Prompt
from moe_offload.engine.engine import Engine
from moe_offload.errors import UserError
from moe_offload.model.generation import Generated, Request, generate, require_fitting, stop_ids
from moe_offload.model.tokenization import StreamingDetokenizer, Tokenizer

Encoded = tuple[Prompt, list[int]]  # a prompt and its token ids

_OPEN, _CLOSE = "<think>", "</think>"
_DIM, _NORMAL = "\x1b[2m", "\x1b[22m"
_N_LAST_TOKENS: Final = 16  # in which a chat template may have opened the first part


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


def _n_begun(text: str, *marks: str) -> int:
    """How many characters at the end of `text` may be the beginning of one of `marks`."""
    longest = min(max(map(len, marks), default=1) - 1, len(text))
    sizes = range(longest, 0, -1)
    return next((n for n in sizes if any(one.startswith(text[-n:]) for one in marks)), 0)


class UpToStop:
    """A text, piece by piece, up to the first of the `stop` texts, which is not part of it.

    What may be the beginning of one is held back until it is known not to be.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._held = ""
        self.is_over = False

    def push(self, piece: str) -> str:
        """What is certain now."""
        if self.is_over:
            return ""
        text = self._held + piece
        found = [(place + len(one), place) for one in self._stop if (place := text.find(one)) >= 0]
        self.is_over = bool(found)
        # of several the one that is whole first, however the text was cut into pieces
        end = min(found)[1] if found else len(text) - _n_begun(text, *self._stop)
        self._held = "" if self.is_over else text[end:]
        return text[:end]

    def finish(self) -> str:
        """What was held back, when nothing more comes."""
        rest, self._held = self._held, ""
        return rest


class ThinkingView:
    """Text as it is shown, piece by piece; a tag may be cut in two by its pieces.

    `thinks`: the text begins inside a part, which its prompt has opened.
    """

    def __init__(self, hidden: bool, dimmed: bool, thinks: bool = False) -> None:
        self._hidden = hidden
        self._dimmed = dimmed and not hidden
        self._thinks = thinks
        self._rest = ""  # what may be the beginning of a tag
        self._is_dim = False
        self._begins = True  # nothing was shown since the start

    def push(self, piece: str) -> str:
        """What is to be shown now."""
        if not (self._hidden or self._dimmed):
            return piece
        self._rest += piece
        shown = ""
        while (place := self._rest.find(self._tag)) >= 0:
            tag = self._tag
            if self._thinks:
                shown += self._seen(self._rest[:place] + tag)
                self._thinks = False
            else:
                shown += self._seen(self._rest[:place])
                self._thinks = True
                shown += self._seen(tag)
            self._rest = self._rest[place + len(tag) :]
        end = len(self._rest) - _n_begun(self._rest, self._tag)
        shown += self._seen(self._rest[:end])
        self._rest = self._rest[end:]
        return shown

    def finish(self, piece: str) -> str:
        """What is to be shown with the last piece; the terminal is then as it was before."""
        shown = self.push(piece) + self._seen(self._rest)
        shown += _NORMAL if self._is_dim else ""
        self._rest, self._is_dim = "", False
        return shown

    @property
    def _tag(self) -> str:
        """The one that ends what the text is in."""
        return _CLOSE if self._thinks else _OPEN

    def _seen(self, text: str) -> str:
        if self._hidden:
            text = "" if self._thinks else text
            text = text.lstrip() if self._begins else text  # no empty lines in a part's place
            self._begins = self._begins and not text
            return text
        if text and self._thinks != self._is_dim:
            self._is_dim = self._thinks
            return (_DIM if self._is_dim else _NORMAL) + text
        return text


def view_of(ids: Sequence[int], tokenizer: Tokenizer, hidden: bool) -> ThinkingView:
    """How stdout shows the answer to a prompt of these tokens: dimmed on a terminal alone."""
    dimmed = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    end = tokenizer.decode(ids[-_N_LAST_TOKENS:]) if hidden or dimmed else ""
    return ThinkingView(hidden, dimmed, thinks=end.rstrip().endswith(_OPEN))
