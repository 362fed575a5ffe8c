"""One run: load the model, generate for every prompt, write the reports, print the summary."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from transformers import PretrainedConfig

from moe_offload.commands.answers import Answers
from moe_offload.commands.prompts import LeftOut, Prompt
from moe_offload.config import Config, ModelOptions
from moe_offload.engine.engine import Engine, load_engine, open_prepared
from moe_offload.engine.memory import gpu_memory_told
from moe_offload.errors import UserError
from moe_offload.experts.recorder import NullRecorder, Recorder
from moe_offload.machine.hardware import read_hardware
from moe_offload.machine.sensors import NvmlReader, SensorSampler
from moe_offload.machine.terminal import Interruption, RunProgress, say, show
from moe_offload.model.dummy import DummyModel, DummyTokenizer, dummy_routing
from moe_offload.model.generation import (
    Generated,
    context_length,
    generate_batch,
    require_fitting,
    stop_ids,
    unused_suggestions,
)
from moe_offload.model.loader import PreparedModel
from moe_offload.model.tokenization import StreamingDetokenizer, Tokenizer, load_tokenizer
from moe_offload.report.files import ReportPaths, RunInfo, Status, recorded_routing, write_reports
from moe_offload.report.summary import format_summary, summarize

Encoded = tuple[Prompt, list[int]]  # a prompt and its token ids


@gpu_memory_told()
def run(
    config: Config,
    prompts: Sequence[Prompt],
    left_out: LeftOut,
    answers: Answers | None,
    paths: ReportPaths,
    command: Sequence[str],
    interruption: Interruption,
) -> int:
    """Carry out `config` on `prompts`; the reports go to `paths`, the answers to `answers` as well.

    Prompts that the model cannot take join `left_out`. Returns the exit code. Raises UserError for
    what cannot be served, GPU memory among it.
    """
    source, tokenizer = _open_model(config.model)
    encoded = encode_prompts(tokenizer, prompts, config.prompts.raw, source.config, left_out)
    prompts = [prompt for prompt, _ in encoded]
    left_out.require_some(prompts)
    longest = max(len(ids) + prompt.options.max_tokens for prompt, ids in encoded)
    longest = min(longest, context_length(source.config) or longest)
    recorder = Recorder() if config.output.record else NullRecorder()
    routing = None
    if isinstance(source, DummyModel):  # before minutes of loading: the trace may not fit
        routing = dummy_routing(source, config.model.routing_trace, config.generation.seed)
    with load_engine(
        source,
        config.model,
        config.cache,
        recorder,
        context_tokens=longest * config.generation.batch_size,
        nvtx=config.output.nvtx,
        say=(lambda _: None) if config.output.quiet else say,
    ) as engine:
        engine.say = say  # what it finds while it runs is a warning
        if routing is not None:
            engine.dispatcher.forced_routing = routing
            engine.notes.append(
                f"random weights, routing of {routing.info.model}: the text is meaningless"
            )
            engine.notes.extend(routing.notes)
        if answers is not None and answers.n_before:
            engine.notes.append(f"{answers.n_before} more prompts were answered before this run")
        if config.output.nvtx and engine.device.type == "cpu":
            engine.notes.append("--nvtx without a GPU: ranges mark the CPU's work alone")
        if isinstance(source, PreparedModel):
            suggested = source.manifest.generation_config or {}
            engine.notes += unused_suggestions(suggested, config.generation)
            if not stop_ids(engine.model, tokenizer.eos_ids):
                engine.notes.append(
                    "the model names no token that ends a text: every answer has --max-tokens"
                )
        for note in engine.notes:
            say(note)
        if config.output.record:
            engine.calibrate()
        else:
            engine.calibrate_for(max(len(ids) for _, ids in encoded))
        started_unix_s = time.time()
        gpu_sensors = NvmlReader(engine.gpu_uuid) if engine.device.type == "cuda" else None
        sampler = SensorSampler(n_busiest=torch.get_num_threads(), gpu=gpu_sensors)
        conversations: list[Conversation] = []
        status: Status = "failed"
        try:
            with sampler:
                status = run_prompts(engine, tokenizer, encoded, config, answers, conversations)
        except KeyboardInterrupt:  # a second one, while the first was being answered
            status = "interrupted"
        except BrokenPipeError:  # whoever read the responses has gone
            status = "interrupted"
            raise
        finally:  # what was done before an error is evidence too
            interruption.drops_signals = True  # through the engine's close: the run has its outcome
            written = _report(
                config, engine, recorder, sampler, conversations, left_out, status, paths,
                command, tokenizer, started_unix_s,
            )  # fmt: skip
        if answers is not None:
            written.append(answers.path)
        where = ", ".join(str(path) for path in written)
        if status == "completed":
            if where and not config.output.quiet:
                say(f"wrote {where}")
            return 0
        n_finished = sum(one.record.stop != "interrupted" for one in conversations)
        say(
            f"interrupted ({interruption.name}): {n_finished} of {len(prompts)} prompts finished; "
            + (f"what was done is in {where}" if where else "no file was written")
        )
    return interruption.exit_code


def _open_model(options: ModelOptions) -> tuple[PreparedModel | DummyModel, Tokenizer]:
    if options.dummy_shape is not None:
        dummy = DummyModel(options)
        return dummy, DummyTokenizer(dummy.config.get_text_config().vocab_size)
    prepared = open_prepared(options)
    return prepared, load_tokenizer(prepared.folder, prepared.config.model_type)


def encode_prompts(
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    raw: bool,
    config: PretrainedConfig,
    left_out: LeftOut,
) -> list[Encoded]:
    """Each prompt with its token ids; one that the model cannot take is left out."""
    encoded = []
    for prompt in prompts:
        try:
            ids = _encode(tokenizer, prompt, raw)
            require_fitting(ids, config, prompt.name)
            encoded.append((prompt, ids))
        except UserError as error:
            left_out.add(error)
    return encoded


def _encode(tokenizer: Tokenizer, prompt: Prompt, raw: bool) -> list[int]:
    try:
        return tokenizer.encode(prompt.text, raw)
    except UserError as error:
        raise UserError(f"{prompt.name}: {error}") from error


class Conversation:
    """One prompt and what the model makes of it, up to the first of its stop texts."""

    def __init__(self, prompt: Prompt, record: Generated, tokenizer: Tokenizer) -> None:
        self.prompt = prompt
        self.record = record
        self.text = ""
        self._n_told = 0
        self._detokenizer = StreamingDetokenizer(tokenizer)

    def push(self, token: int) -> str:
        """The text that became certain with `token`; sets the record's `stop` at a stop text."""
        self._add(self._detokenizer.push(token))
        return self._told(len(self.text) - self._n_held())

    def finish(self) -> str:
        """What was held back."""
        if self.record.stop != "stop":
            self._add(self._detokenizer.finish())
        return self._told(len(self.text))

    def _add(self, piece: str) -> None:
        self.text += piece
        places = [self.text.find(stop, self._n_told) for stop in self.prompt.options.stop]
        if found := [place for place in places if place >= 0]:
            self.text = self.text[: min(found)]
            self.record.stop = "stop"

    def _n_held(self) -> int:
        """How many characters at the end may be the beginning of a stop text."""
        stops = self.prompt.options.stop if self.record.stop != "stop" else ()
        longest = min(max(map(len, stops), default=1) - 1, len(self.text) - self._n_told)
        held = (
            n for n in range(longest, 0, -1) if any(s.startswith(self.text[-n:]) for s in stops)
        )
        return next(held, 0)

    def _told(self, end: int) -> str:
        piece, self._n_told = self.text[self._n_told : end], end
        return piece


def _batches(encoded: Sequence[Encoded], size: int) -> Iterator[Sequence[Encoded]]:
    """At most `size` prompts at a time: neighbours in the run, of the same settings."""
    batch: list[Encoded] = []
    for one in encoded:
        if batch:
            last, prompt = batch[-1][0], one[0]
            follows = prompt.index == last.index + 1 and prompt.options == last.options
            if len(batch) == size or not follows:
                yield batch
                batch = []
        batch.append(one)
    if batch:
        yield batch


def run_prompts(
    engine: Engine,
    tokenizer: Tokenizer,
    encoded: Sequence[Encoded],
    config: Config,
    answers: Answers | None,
    conversations: list[Conversation],
) -> Literal["completed", "interrupted"]:
    """Generate for every prompt, appending to `conversations` and to the answers.

    A Ctrl-C ends the run in order: what was begun is kept, marked as interrupted. So it is where
    the text can be shown to nobody, and BrokenPipeError goes on to the caller.

    A single prompt at a time streams to stdout as it is generated, unless responses are hidden.
    """
    size, output = config.generation.batch_size, config.output
    eos_ids = stop_ids(engine.model, tokenizer.eos_ids)
    stream = size == 1 and not output.hide_responses
    on_terminal = stream and sys.stdout.isatty()
    progress = RunProgress(
        [site.block for site in engine.sites],
        len(encoded),
        config.generation.max_tokens,
        streamed=on_terminal,
        logged=not output.quiet,
    )
    unfinished: dict[int, Conversation] = {}  # of the batch, by their numbers

    def finish(one: Conversation, shown: bool = stream) -> None:
        """Its answer is in the files from now on."""
        rest, record = one.finish(), one.record
        del unfinished[record.prompt]
        conversations.append(one)
        if answers is not None:
            facts = {
                "response": one.text,
                "stop": record.stop,
                "prompt_tokens": record.n_prompt_tokens,
                "generated_tokens": len(record.ids),
                "prefill_s": round(record.token_times_s[0], 6),
                "decode_s": round(sum(record.token_times_s[1:]), 6),
            }
            answers.write(one.prompt, facts)
        progress.prompt_done()
        if shown:
            show(rest, end="\n" if output.quiet else "\n\n")

    def cut_off(shown: bool) -> None:
        """Keep what was begun. A step's last token may be known and its text not told yet."""
        for one in list(unfinished.values()):
            if one.record.stop != "stop":
                one.record.stop = "interrupted"
            finish(one, shown)

    try:
        for batch in _batches(encoded, size):
            first, options = batch[0][0].index, batch[0][0].options
            progress.evaluate(len(batch))
            n_before = len(conversations)
            for record, token in generate_batch(
                engine.model,
                [ids for _, ids in batch],
                options,
                eos_ids=eos_ids,
                first_prompt=first,
                on_pass=engine.follow_prompts,
            ):
                engine.dispatcher.recorder.token(
                    record.prompt, record.token_times_s[-1], time.time()
                )
                progress.token()  # its bar leaves the terminal before the text comes
                if record.prompt not in unfinished:
                    prompt = batch[record.prompt - first][0]
                    unfinished[record.prompt] = Conversation(prompt, record, tokenizer)
                    if on_terminal and not output.quiet:
                        show(f"PROMPT:\n{prompt.shown}\nRESPONSE:")
                one = unfinished[record.prompt]
                if token not in eos_ids:
                    piece = one.push(token)
                    if stream:
                        show(piece, end="")
                if record.stop != "interrupted":
                    finish(one)
            if output.quiet and not (stream or output.hide_responses):
                done = sorted(conversations[n_before:], key=lambda one: one.prompt.index)
                show("\n".join(one.text for one in done))
    except KeyboardInterrupt:
        cut_off(shown=stream)
        return "interrupted"
    except BrokenPipeError:  # as the text was streamed: nobody reads it any more
        cut_off(shown=False)
        raise
    finally:
        progress.close()
    conversations.sort(key=lambda conversation: conversation.prompt.index)
    return "completed"


def _report(
    config: Config,
    engine: Engine,
    recorder: Recorder,
    sampler: SensorSampler,
    conversations: Sequence[Conversation],
    left_out: LeftOut,
    status: Status,
    paths: ReportPaths,
    command: Sequence[str],
    tokenizer: Tokenizer,
    started_unix_s: float,
) -> list[Path]:
    """Write the CSVs and run.json, then print the summary; returns the files."""
    summary = summarize(
        recorder,
        seqlens=[one.record.n_prompt_tokens for one in conversations],
        samples=sampler.samples,
        cpu_limit_gbps=engine.cpu_limit_gbps,
        predicted_step_us=engine.predicted_step_us(recorder),
    )
    notes = engine.run_notes()
    n_full = sum(one.record.stop == "context" for one in conversations)
    if n_full:
        notes.append(
            f"{n_full} of {len(conversations)} answers end where the model's context is full, "
            "before --max-tokens"
        )
    notes += left_out.notes()
    if recorder.enabled:  # else no file has the columns that they speak of
        notes += sampler.notes
    info = RunInfo(
        n_threads=torch.get_num_threads(),
        command=list(command),
        settings=asdict(config),
        hardware=read_hardware(gpu_uuid=engine.gpu_uuid).to_json(),
        model=engine.describe() | {"tokenizer": tokenizer.name},
        layout=asdict(engine.source.layouts[0]),
        calibration=None if engine.costs is None else engine.costs.to_json(),
        samples=sampler.samples,
        notes=notes,
        started_unix_s=started_unix_s,
        status=status,
    )
    # What was streamed to a terminal stands there already; a file or a pipe gets the whole summary.
    streamed = config.generation.batch_size == 1 and sys.stdout.isatty()
    shown = [] if config.output.hide_responses or streamed else conversations
    told = [(one.prompt.shown, one.text) for one in shown]
    text = format_summary(summary, conversations=told, notes=notes)
    routing = None
    if recorder.enabled and "routing" in paths:
        dummy = isinstance(engine.source, DummyModel)
        n_experts = engine.store.n_experts[0]
        routing = recorded_routing(recorder, engine.source.name, n_experts, synthetic=dummy)
    written = write_reports(recorder, paths, info, summary, routing)  # before a print that may fail
    if not config.output.quiet:
        show(text)
    return written
