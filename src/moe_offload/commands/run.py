"""One run of `main.py`: load, generate for every prompt, write the reports, print the summary."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from moe_offload import VERSION
from moe_offload.commands.run_prompts import Conversation, encode_prompts, run_prompts
from moe_offload.config import Config, ModelOptions
from moe_offload.engine.engine import Engine, load_engine, open_prepared
from moe_offload.engine.machine_costs import predicted_step_us
from moe_offload.engine.preflight import gpu_memory_told
from moe_offload.experts.recorder import NullRecorder, Recorder
from moe_offload.machine.hardware import read_hardware
from moe_offload.machine.interruption import Interruption
from moe_offload.machine.run_progress import told_if_slow
from moe_offload.machine.sensors import NvmlReader, SensorSampler
from moe_offload.machine.terminal import say, show
from moe_offload.model.dummy_model import DummyModel, DummyTokenizer, dummy_routing
from moe_offload.model.model_loader import PreparedModel
from moe_offload.model.tokenization import Tokenizer, load_tokenizer
from moe_offload.report.recorded_routing import routing_lines
from moe_offload.report.report_paths import ReportPaths
from moe_offload.report.reports import RunInfo, Status, write_reports
from moe_offload.report.summary import format_summary, summarize


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
    limit = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    longest = min(longest, limit or longest)
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
        predicted_step_us=None if costs is None else predicted_step_us(recorder, costs.model),
    )
    notes = [*engine.run_notes(), *_ended_early(conversations)]
    if recorder.enabled:  # else no file has the columns that they speak of
        notes += sampler.notes
    info = RunInfo(
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
