"""One run: load the model, generate for every prompt, write the reports, print the summary."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch

from moe_offload.commands.answers import Answers
from moe_offload.commands.conversations import (
    Conversation,
    Encoded,
    ThinkingView,
    converse,
    encode_prompts,
    view_of,
)
from moe_offload.commands.prompts import LeftOut, Prompt
from moe_offload.config import Config, ModelOptions
from moe_offload.engine.engine import Engine
from moe_offload.engine.loading import load_engine, open_prepared
from moe_offload.engine.memory import gpu_memory_told
from moe_offload.experts.recorder import NullRecorder, Recorder
from moe_offload.machine.hardware import read_hardware
from moe_offload.machine.sensors import NvmlReader, SensorSampler
from moe_offload.machine.terminal import Interruption, RunProgress, say, show
from moe_offload.model.dummy import DummyModel, DummyTokenizer, dummy_routing
from moe_offload.model.generation import (
    can_refill,
    context_length,
    stop_ids,
    unused_suggestions,
)
from moe_offload.model.loader import PreparedModel
from moe_offload.model.tokenization import Tokenizer, load_tokenizer
from moe_offload.report.files import ReportPaths, RunInfo, Status, recorded_routing, write_reports
from moe_offload.report.summary import format_summary, summarize


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
    source, tokenizer = open_model(config.model)
    encoded = encode_prompts(tokenizer, prompts, source.config, left_out)
    if answers is not None:
        answers.write_left_out(left_out)
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
            paths = paths.beside_others()  # the earlier part's reports are of other prompts
        if 1 < config.generation.batch_size < len(prompts) and not can_refill(engine.model):
            engine.notes.append(
                "this model's cache takes no prompt into a batch that has begun: each batch waits "
                "for its longest answer"
            )
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
                command, tokenizer, started_unix_s, 0 if answers is None else answers.n_before,
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


def open_model(options: ModelOptions) -> tuple[PreparedModel | DummyModel, Tokenizer]:
    """The model that is to be loaded, and its tokenizer."""
    if options.dummy_shape is not None:
        dummy = DummyModel(options)
        return dummy, DummyTokenizer(dummy.config.get_text_config().vocab_size)
    prepared = open_prepared(options)
    return prepared, load_tokenizer(prepared.folder, prepared.config.model_type)


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
    stream = size == 1 and not output.hide_responses
    in_order = output.quiet and not (stream or output.hide_responses)
    on_terminal = stream and sys.stdout.isatty()
    progress = RunProgress(
        [site.block for site in engine.sites],
        len(encoded),
        config.generation.max_tokens,
        streamed=on_terminal,
        logged=not output.quiet and not (stream and len(encoded) == 1),  # the text itself tells
    )
    if stream:
        engine.say = lambda line: say(f"\n{line}")  # the text's line is not at its end
    begun: dict[int, Conversation] = {}
    ids_of = {prompt.index: ids for prompt, ids in encoded}
    streamed: dict[int, ThinkingView] = {}
    to_show = deque(prompt.index for prompt, _ in encoded)
    held: dict[int, str] = {}  # answers that came before those of earlier prompts

    def new_view(one: Conversation) -> ThinkingView:
        return view_of(ids_of[one.prompt.index], tokenizer, output.hide_thinking)

    def finish(one: Conversation, shown: bool = True) -> None:
        """Its answer is in the files from now on."""
        rest = one.finish()
        one.shown = new_view(one).finish(one.text)
        if answers is not None:
            answers.write(one.prompt, one.facts())
        conversations.append(begun.pop(one.prompt.index))
        progress.prompt_done()
        if stream and shown:
            view = streamed.pop(one.prompt.index, None) or new_view(one)
            show(view.finish(rest), end="\n" if output.quiet else "\n\n")
        elif in_order and shown:
            held[one.prompt.index] = one.shown
            while to_show and to_show[0] in held:
                show(held.pop(to_show.popleft()))

    def cut_off(shown: bool) -> None:
        """Keep what was begun. A step's last token may be known and its text not told yet."""
        for one in list(begun.values()):
            if one.record.stop != "stop":
                one.record.stop = "interrupted"
            finish(one, shown)

    def on_pass(numbers: Sequence[int], evaluates: bool) -> None:
        if evaluates:
            progress.evaluate(len(numbers))

    try:
        for one, piece in converse(engine, tokenizer, encoded, size, begun, on_pass):
            progress.token()  # its bar leaves the terminal before the text comes
            if on_terminal and not output.quiet and len(one.record.ids) == 1:
                show(f"PROMPT:\n{one.prompt.shown}\nRESPONSE:")
            if stream:
                if one.prompt.index not in streamed:
                    streamed[one.prompt.index] = new_view(one)
                view = streamed[one.prompt.index]
                show(view.push(piece), end="")
            if one.is_finished:
                finish(one)
    except KeyboardInterrupt:
        cut_off(shown=True)
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
    n_before: int,
) -> list[Path]:
    """Write the CSVs and run.json, then print the summary; returns the files.

    The summary has the notes that are new: what was said before the run is in run.json alone.
    `n_before` prompts were answered by earlier runs.
    """
    are_together = min(config.generation.batch_size, len(conversations)) > 1
    summary = summarize(
        recorder,
        seqlens=[one.record.n_prompt_tokens for one in conversations],
        samples=sampler.samples,
        cpu_limit_gbps=engine.cpu_limit_gbps,
        # of one sequence, which a batch's step is not compared with
        predicted_step_us=None if are_together else engine.predicted_step_us(recorder),
    )
    notes = engine.learnt()
    n_full = sum(one.record.stop == "context" for one in conversations)
    if n_full:
        notes.append(
            f"{n_full} of {len(conversations)} answers end where the model's context is full, "
            "before --max-tokens"
        )
    if n_before:
        notes.append(f"{n_before} prompts were answered before")
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
        notes=[*engine.notes, *left_out.notes(), *notes],
        started_unix_s=started_unix_s,
        status=status,
    )
    # What was streamed to a terminal stands there already; a file or a pipe gets the whole summary.
    streamed = config.generation.batch_size == 1 and sys.stdout.isatty()
    shown = [] if config.output.hide_responses or streamed else conversations
    told = [(one.prompt.shown, one.shown) for one in shown]
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
