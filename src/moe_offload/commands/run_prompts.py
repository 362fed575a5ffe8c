"""Runs a list of prompts through a loaded model: batches, streaming, responses as they finish."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from transformers import PretrainedConfig

from moe_offload.config import Config
from moe_offload.engine.engine import Engine
from moe_offload.errors import UserError
from moe_offload.machine.run_progress import RunProgress
from moe_offload.machine.terminal import show
from moe_offload.model.generation import Generated, generate_batch, make_sampler, stop_ids
from moe_offload.model.tokenization import StreamingDetokenizer, Tokenizer


@dataclass(frozen=True)
class Conversation:
    """One prompt and what the model made of it."""

    prompt: str
    response: str
    generated: Generated


def encode_prompts(
    tokenizer: Tokenizer, prompts: Sequence[str], raw: bool, config: PretrainedConfig
) -> list[list[int]]:
    """Token ids of every prompt; UserError for one that is longer than the model's context."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    encoded = []
    for number, prompt in enumerate(prompts, start=1):
        ids = tokenizer.encode(prompt, raw)
        if limit and len(ids) >= limit:
            raise UserError(
                f"prompt {number} has {len(ids)} tokens, but the model's context holds {limit}: "
                "shorten it"
            )
        if not ids:
            raise UserError(f"prompt {number} has no tokens: give it some text")
        encoded.append(ids)
    return encoded


class _Responses:
    """The `--responses-jsonl` file: one line per prompt, on disk as soon as the prompt is done."""

    def __init__(self, path: Path | None) -> None:
        self._file: TextIO | None = None
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = path.open("w", encoding="utf-8")
            except OSError as error:
                raise UserError(f"cannot write {path}: {error.strerror}") from error

    def write(self, conversation: Conversation) -> None:
        if self._file is None:
            return
        generated = conversation.generated
        line: dict[str, Any] = {
            "index": generated.prompt,
            "prompt": conversation.prompt,
            "response": conversation.response,
            "stop": generated.stop,
            "prompt_tokens": generated.n_prompt_tokens,
            "generated_tokens": len(generated.ids),
            "prefill_s": round(generated.prefill_s, 6),
            "decode_s": round(sum(generated.token_times_s[1:]), 6),
        }
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def run_prompts(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[str],
    config: Config,
    conversations: list[Conversation],
) -> Literal["completed", "interrupted"]:
    """Generate for every prompt, appending to `conversations` and to the responses file.

    A Ctrl-C ends the run in order: what was begun is kept, marked as interrupted. So it is where
    the text can be shown to nobody, and BrokenPipeError goes on to the caller.

    A single prompt at a time streams to stdout as it is generated, unless responses are hidden.
    """
    options = config.generation
    sampler = make_sampler(options.temperature, options.top_p, options.seed, engine.device)
    eos_ids = stop_ids(engine.model, tokenizer.eos_ids)
    stream = options.batch_size == 1 and not config.output.hide_responses
    responses = _Responses(config.output.responses_jsonl)
    progress = RunProgress(
        [site.block for site in engine.sites],
        len(prompts),
        options.max_tokens,
        streamed=stream and sys.stdout.isatty(),
    )
    batch: dict[int, tuple[Generated, StreamingDetokenizer, list[str]]] = {}

    def keep(record: Generated) -> str:
        """The end of the response, which is in the files from now on."""
        _, detokenizer, pieces = batch.pop(record.prompt)
        rest = detokenizer.finish()
        conversation = Conversation(texts[record.prompt], "".join([*pieces, rest]), record)
        conversations.append(conversation)
        responses.write(conversation)
        progress.prompt_done()
        return rest

    def finish(record: Generated) -> None:
        rest = keep(record)
        if stream:
            show(rest + "\n")

    try:
        for first in range(0, len(prompts), options.batch_size):
            of_batch = prompts[first : first + options.batch_size]
            progress.evaluate(len(of_batch))
            for record, token in generate_batch(
                engine.model,
                of_batch,
                max_tokens=options.max_tokens,
                sampler=sampler,
                eos_ids=eos_ids,
                first_prompt=first,
                on_pass=engine.follow_prompts,
            ):
                engine.dispatcher.recorder.token(
                    record.prompt, record.token_times_s[-1], time.time()
                )
                progress.token()  # its bar leaves the terminal before the text comes
                if record.prompt not in batch:
                    batch[record.prompt] = (record, StreamingDetokenizer(tokenizer), [])
                if token not in eos_ids:
                    piece = batch[record.prompt][1].push(token)
                    batch[record.prompt][2].append(piece)
                    if stream:
                        show(piece, end="")
                if record.stop != "interrupted":
                    finish(record)
    except KeyboardInterrupt:
        for record, _, _ in list(batch.values()):
            finish(record)
        return "interrupted"
    except BrokenPipeError:  # as the text was streamed: nobody reads it any more
        for record, _, _ in list(batch.values()):
            keep(record)
        raise
    finally:
        responses.close()
        progress.close()
    conversations.sort(key=lambda conversation: conversation.generated.prompt)
    return "completed"
