"""Generate text with a Mixture-of-Experts model that does not fit in the GPU: the command line.

Parses, builds the configuration, wires the objects, runs, prints the summary.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import prerequisites  # noqa: F401 - before all that it looks for

import torch

from arguments import build_parser, parse, parse_config
from config import CacheOptions, Config, ModelOptions
from cpu_experts import describe_kernels
from destinations import check_destinations
from dummy_model import DummyModel, DummyTokenizer, dummy_routing
from engine import Engine, load_engine, open_prepared
from errors import UserError
from hardware import read_hardware
from interruption import Interruption
from machine_costs import predicted_step_us
from model_loader import PreparedModel
from model_shapes import load_shape
from prompts import read_prompts
from provenance import versions
from recorded_routing import routing_lines
from recorder import NullRecorder, Recorder
from reports import ReportPaths, RunInfo, Status, write_reports
from run_progress import told_if_slow
from run_prompts import Conversation, encode_prompts, run_prompts
from sensors import NvmlReader, SensorSampler
from summary import format_summary, summarize
from terminal import show
from tokenization import Tokenizer, load_tokenizer
from version import VERSION

EXIT_USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    debug = "--debug" in argv
    with Interruption() as interruption:
        try:
            return _main(argv, interruption)
        except KeyboardInterrupt:
            _say(f"interrupted ({interruption.name}) before any token: no file was written")
            return interruption.exit_code
        except BrokenPipeError:  # such as `| head`: there is nobody left to tell
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_USER_ERROR
        except (UserError, OSError, torch.OutOfMemoryError) as error:
            if debug:
                traceback.print_exc()
            _say(f"error: {' '.join(str(error).split())}")
            return EXIT_USER_ERROR


def _main(argv: Sequence[str], interruption: Interruption) -> int:
    arguments = parse(argv)
    if arguments.version:
        print(_version_text())
        return 0
    if not argv:
        build_parser().print_usage(sys.stderr)
    config = parse_config(arguments)
    if arguments.show_calibration:
        show_calibration(config)
        return 0
    return run(config, argv, interruption)


def run(
    config: Config,
    command: Sequence[str],
    interruption: Interruption,
) -> int:
    """One run: load, generate for every prompt, write the reports, print the summary."""
    paths = ReportPaths.in_folder(
        config.output.output_dir, config.output.breakdown_csv, config.output.cachehit_csv
    )
    check_destinations(config, paths)
    texts = read_prompts(config.prompts)
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
        say=_say,
    ) as engine:
        if routing is not None:
            engine.dispatcher.forced_routing = routing
            engine.notes.append(
                f"random weights, routing of {routing.info.model}: the text is meaningless"
            )
            engine.notes.extend(routing.notes)
        for note in engine.notes:
            _say(note)
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
                _say(f"wrote {where}")
            return 0
        n_finished = sum(c.generated.stop != "interrupted" for c in conversations)
        _say(
            f"interrupted ({interruption.name}): {n_finished} of {len(prompts)} prompts finished; "
            + (f"what was done is in {where}" if where else "no file was written")
        )
    return interruption.exit_code


def show_calibration(config: Config) -> None:
    """Measure this machine anew and print what it is and can do.

    Random weights are one MoE layer of their shape, unless --dummy-layers asks for more. With a
    GPU and no cache asked for, a small one stands for it, so that copies are measured too.
    """
    options = calibration_options(config.model)
    source = DummyModel(options) if options.dummy_shape else open_prepared(options)
    with load_engine(source, options, config.cache, say=_say) as engine:
        if engine.device.type == "cuda" and engine.accelerator is None:
            engine.use_cache(CacheOptions(n_indexes=1, n_ways=2))
        engine.calibrate(again=True)
        assert engine.costs is not None
        layers = f"{engine.store.n_layers} MoE layer{'s'[: engine.store.n_layers > 1]}"
        lines = [
            *read_hardware(gpu_uuid=engine.gpu_uuid).describe(),
            f"measured on {layers} of {options.dummy_shape or source.name}, experts in "
            f"{source.weight_format}, {_computed_by(engine)}",
            *engine.costs.describe(),
            *engine.run_notes(),
        ]
    print("\n".join(dict.fromkeys(lines)))  # what is in use is a note as well


def _computed_by(engine: Engine) -> str:
    """What computes the CPU's experts and on how many threads, which the kernels say themselves."""
    description = engine.cpu.description
    if "threads" in description:
        return description
    return f"{description}, {torch.get_num_threads()} threads"


def calibration_options(options: ModelOptions) -> ModelOptions:
    """The model that a calibration measures: of a shape, its first MoE layer."""
    if options.dummy_shape is None or options.dummy_layers is not None:
        return options
    n_layers = load_shape(options.dummy_shape).n_dense_layers + 1
    return replace(options, dummy_layers=n_layers)


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
    notes = [*engine.run_notes(), *sampler.notes]
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


def _say(line: str) -> None:
    with suppress(OSError):  # such as a pipe without a reader: no reason to end a run
        show(line, file=sys.stderr)


def _version_text() -> str:
    lines = [f"moe-cpu-gpu-inference {VERSION}", *describe_kernels()]
    lines += [f"{name} {number}" for name, number in versions().items() if number]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
