"""This machine as a hardware file: measured on random experts of a model's shape."""

from __future__ import annotations

from pathlib import Path

import torch

from config import CacheOptions, ModelOptions
from dummy_model import DummyModel
from engine import load_engine
from hardware import read_hardware
from machine_file import Machine, calibrated_machine, write_machine
from model_shapes import ModelShape


def measure_machine(path: Path, shape: ModelShape) -> Machine:
    """Measure one layer of `shape` in bf16 and write `path`; returns what was written.

    Without a GPU the accelerator is the emulated one, and the file says so. Raises UserError when
    memory cannot hold the layer.
    """
    options = ModelOptions(None, dummy_shape=shape.name, dummy_layers=shape.n_dense_layers + 1)
    with load_engine(DummyModel(options), options, CacheOptions()) as engine:
        engine.use_cache(CacheOptions(n_indexes=1, n_ways=2))
        engine.calibrate(again=True)
        assert engine.costs is not None
        on_gpu = engine.device.type == "cuda"
        facts = read_hardware()
        gpu_name = "emulated accelerator"
        gpu_memory_gb = 0.0
        if on_gpu:
            properties = torch.cuda.get_device_properties(engine.device)
            gpu_name, gpu_memory_gb = properties.name, properties.total_memory / 1e9
        machine = calibrated_machine(
            engine.costs.model,
            name=f"{gpu_name}, {facts.cpu}",
            cores=torch.get_num_threads(),
            expert_weights=shape.expert_weights,
            dense_bytes_per_layer=2 * shape.dense_weights_per_layer,
            gpu_memory_gb=gpu_memory_gb,
        )
    comment = (
        f"Measured on {shape.name}'s shape. Predictions for fewer cores than {machine.cores} are "
        "optimistic;\npowers were not measured."
    )
    write_machine(path, machine, comment)
    return machine
