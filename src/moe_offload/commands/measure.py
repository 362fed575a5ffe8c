"""This machine measured: shown to people, or as a hardware file on random experts of a shape."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from moe_offload.config import CacheOptions, Config, ModelOptions
from moe_offload.engine.loading import load_engine, open_prepared
from moe_offload.engine.memory import gpu_memory_told
from moe_offload.engine.setup import slots_to_measure
from moe_offload.machine.hardware import read_hardware
from moe_offload.machine.terminal import say
from moe_offload.model.dummy import DummyModel, ModelSource
from moe_offload.simulation.machine_file import Machine, calibrated_machine, write_machine
from moe_offload.simulation.shapes import ModelShape, load_shape


@gpu_memory_told()
def measure_machine(path: Path, shape: ModelShape) -> Machine:
    """Measure a layer of `shape` in bf16 and write `path`; returns what was written.

    Without a GPU the accelerator is the emulated one, and the file says so. Raises UserError when
    memory, the GPU's among it, cannot hold the layer.
    """
    options = calibration_options(ModelOptions(None, dummy_shape=shape.name))
    source = DummyModel(options, n_stored_layers=1)
    with load_engine(source, options, measuring_cache(source)) as engine:
        engine.calibrate(again=True)
        assert engine.costs is not None
        on_gpu = engine.device.type == "cuda"
        facts = read_hardware()
        gpu_name = "emulated accelerator"
        gpu_memory_gb = (facts.memory_limit_bytes or facts.memory_bytes) / 1e9  # where slots are
        if on_gpu:
            properties = torch.cuda.get_device_properties(engine.device)
            gpu_name, gpu_memory_gb = properties.name, properties.total_memory / 1e9
        machine = calibrated_machine(
            engine.costs.model,
            shape,
            name=f"{gpu_name}, {facts.cpu}",
            cores=torch.get_num_threads(),
            gpu_memory_gb=gpu_memory_gb,
        )
    comment = (
        f"Measured on {shape.name}'s shape. Predictions for fewer cores than {machine.cpu.cores} "
        "are optimistic;\npowers were not measured."
    )
    write_machine(path, machine, comment)
    return machine


@gpu_memory_told()
def show_calibration(config: Config) -> None:
    """Measure this machine anew and print what it is and can do.

    Random weights are one MoE layer's experts of their shape, unless --dummy-layers asks for more.
    With a GPU and no cache asked for, a small one stands for it, so that copies are measured too.
    """
    options = calibration_options(config.model)
    source: ModelSource = (
        DummyModel(options, n_stored_layers=config.model.dummy_layers or 1)
        if options.dummy_shape
        else open_prepared(options)
    )
    with load_engine(source, options, config.cache, say=say) as engine:
        if engine.device.type == "cuda" and engine.accelerator is None:
            engine.use_cache(measuring_cache(source))
        engine.calibrate(again=True)
        assert engine.costs is not None
        n_layers = engine.store.memory.n_stored
        layers = f"{n_layers} MoE layer{'s'[: n_layers > 1]}"
        lines = [
            *read_hardware(gpu_uuid=engine.gpu_uuid).describe(),
            f"measured on {layers} of {options.dummy_shape or source.name}, experts in "
            f"{source.weight_format}, {engine.cpu.description}",
            *engine.costs.describe(engine.experts_in_memory),
            *engine.notes,
            *engine.learnt(),
        ]
    print("\n".join(dict.fromkeys(lines)))  # what is in use is a note as well


def calibration_options(options: ModelOptions) -> ModelOptions:
    """The model that a calibration measures: of a shape, its first two MoE layers.

    Two, so that what a layer takes is told from what a step takes once.
    """
    if options.dummy_shape is None or options.dummy_layers is not None:
        return options
    n_layers = load_shape(options.dummy_shape).n_dense_layers + 2
    return replace(options, dummy_layers=n_layers)


def measuring_cache(source: ModelSource) -> CacheOptions:
    """A cache of one layer whose experts do not all fit a GPU's own cache, if it has so many."""
    return CacheOptions(n_indexes=1, n_ways=min(slots_to_measure(source), source.n_experts[0]))
