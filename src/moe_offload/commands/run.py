"""One run of `main.py`: load, generate for every prompt, write the reports, print the summary.

Runs a list of prompts through a loaded model: batches, streaming, responses as they finish."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

import torch
from transformers import PretrainedConfig

from moe_offload import VERSION
from moe_offload.config import Config, ModelOptions
from moe_offload.engine.engine import Engine, load_engine, open_prepared
from moe_offload.engine.memory import gpu_memory_told
from moe_offload.errors import UserError
from moe_offload.experts.recorder import NullRecorder, Recorder
from moe_offload.machine.hardware import read_hardware
from moe_offload.machine.sensors import NvmlReader, SensorSampler
from moe_offload.machine.terminal import Interruption, RunProgress, say, show, told_if_slow
from moe_offload.model.dummy import DummyModel, DummyTokenizer, dummy_routing
from moe_offload.model.generation import (
    Generated,
    context_length,
    generate_batch,
    make_sampler,
    require_fitting,
    stop_ids,
    unused_suggestions,
)
from moe_offload.model.loader import PreparedModel
from moe_offload.model.tokenization import StreamingDetokenizer, Tokenizer, load_tokenizer
from moe_offload.report.files import ReportPaths, RunInfo, Status, routing_lines, write_reports
from moe_offload.report.summary import format_summary, summarize


@dataclass(frozen=True)
class Conversation:
    """One prompt and what the model made of it."""

    prompt: str
    response: str
    generated: Generated


def encode_prompts(
    tokenizer: Tokenizer, prompts: Sequence[str], raw: bool, config: PretrainedConfig
) -> list[list[int]]:
    """Token ids of every prompt; UserError for one that the model cannot take."""
    encoded = []
    for number, prompt in enumerate(prompts, start=1):
        encoded.append(tokenizer.encode(prompt, raw))
        require_fitting(encoded[-1], config, f"prompt {number}")
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


@gpu_memory_told()
def run(
    config: Config,
    texts: Sequence[str],
    paths: ReportPaths,
    command: Sequence[str],
    interruption: Interruption,
) -> int:
    """Carry out `config` on the prompts `texts`; the reports go to `paths`.

    Returns the exit code. Raises UserError for what cannot be served, GPU memory among it.
    """
    source, tokenizer = _open_model(config.model)
    prompts = encode_prompts(tokenizer, texts, config.prompts.raw, source.config)
    longest = max(len(ids) for ids in prompts) + config.generation.max_tokens
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
        say=say,
    ) as engine:
        if routing is not None:
            engine.dispatcher.forced_routing = routing
            engine.notes.append(
                f"random weights, routing of {routing.info.model}: the text is meaningless"
            )
            engine.notes.extend(routing.notes)
        if config.output.nvtx and engine.device.type == "cpu":
            engine.notes.append("--nvtx without a GPU: ranges mark the CPU's work alone")
        if isinstance(source, PreparedModel):
            options = config.generation
            suggested = source.manifest.generation_config or {}
            engine.notes += unused_suggestions(suggested, options.temperature, options.top_p)
            if not stop_ids(engine.model, tokenizer.eos_ids):
                engine.notes.append(
                    "the model names no token that ends a text: every answer has --max-tokens"
                )
        for note in engine.notes:
            say(note)
        if config.output.record:
            engine.calibrate()
        else:
            engine.calibrate_for(max(len(ids) for ids in prompts))
        started_unix_s = time.time()
        gpu_sensors = NvmlReader(engine.gpu_uuid) if engine.device.type == "cuda" else None
        sampler = SensorSampler(n_busiest=torch.get_num_threads(), gpu=gpu_sensors)
        conversations: list[Conversation] = []
        status: Status = "failed"
        try:
            with sampler:
                status = run_prompts(engine, tokenizer, prompts, texts, config, conversations)
        except KeyboardInterrupt:  # a second one, while the first was being answered
            status = "interrupted"
        except BrokenPipeError:  # whoever read the responses has gone
            status = "interrupted"
            raise
        finally:  # what was done before an error is evidence too
            interruption.drops_signals = True  # through the engine's close: the run has its outcome
            with told_if_slow("writing reports..."):
                written = _report(
                    config, engine, recorder, sampler, conversations, status, paths, command,
                    tokenizer, started_unix_s,
                )  # fmt: skip
        if config.output.responses_jsonl is not None:
            written.append(config.output.responses_jsonl)
        where = ", ".join(str(path) for path in written)
        if status == "completed":
            if where:
                say(f"wrote {where}")
            return 0
        n_finished = sum(c.generated.stop != "interrupted" for c in conversations)
        say(
            f"interrupted ({interruption.name}): {n_finished} of {len(prompts)} prompts finished; "
            + (f"what was done is in {where}" if where else "no file was written")
        )
    return interruption.exit_code


def _ended_early(conversations: Sequence[Conversation]) -> list[str]:
    """A line where the model's context ended an answer before `--max-tokens` did."""
    n_full = sum(one.generated.stop == "context" for one in conversations)
    if not n_full:
        return []
    return [
        f"{n_full} of {len(conversations)} answers end where the model's context is full, "
        "before --max-tokens"
    ]


def _open_model(options: ModelOptions) -> tuple[PreparedModel | DummyModel, Tokenizer]:
    if options.dummy_shape is not None:
        dummy = DummyModel(options)
        return dummy, DummyTokenizer(dummy.config.get_text_config().vocab_size)
    prepared = open_prepared(options)
    return prepared, load_tokenizer(prepared.folder, prepared.config.model_type)


def _report(
    config: Config,
    engine: Engine,
    recorder: Recorder,
    sampler: SensorSampler,
    conversations: Sequence[Conversation],
    status: Status,
    paths: ReportPaths,
    command: Sequence[str],
    tokenizer: Tokenizer,
    started_unix_s: float,
) -> list[Path]:
    """Write the CSVs and run.json, then print the summary; returns the files."""
    costs = engine.costs
    summary = summarize(
        recorder,
        seqlens=[conversation.generated.n_prompt_tokens for conversation in conversations],
        samples=sampler.samples,
        cpu_limit_gbps=None if costs is None else costs.read_gbps,
        predicted_step_us=engine.predicted_step_us(recorder),
    )
    notes = [*engine.run_notes(), *_ended_early(conversations)]
    if recorder.enabled:  # else no file has the columns that they speak of
        notes += sampler.notes
    info = RunInfo(
        n_threads=torch.get_num_threads(),
        command=["src/main.py", *command],
        settings=asdict(config),
        tool_version=VERSION,
        hardware=read_hardware(gpu_uuid=engine.gpu_uuid).to_json(),
        model=engine.describe() | {"tokenizer": tokenizer.name},
        layout=asdict(engine.source.layouts[0]),
        calibration=None if costs is None else costs.to_json(),
        samples=sampler.samples,
        notes=notes,
        started_unix_s=started_unix_s,
        status=status,
    )
    shown = [] if config.output.hide_responses else conversations
    text = format_summary(
        summary,
        conversations=[(c.prompt, c.response) for c in shown],
        notes=notes,
    )
    routing = None
    if recorder.enabled and paths.routing is not None:
        dummy = isinstance(engine.source, DummyModel)
        n_experts = engine.store.n_experts[0]
        routing = routing_lines(recorder, engine.source.name, n_experts, synthetic=dummy)
    written = write_reports(recorder, paths, info, summary, routing)  # before a print that may fail
    show(text)
    return written
