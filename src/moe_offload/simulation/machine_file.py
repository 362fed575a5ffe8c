"""Hardware files: a machine in YAML, and the cost model of any expert shape on it.

A file names the speeds of CPU, bus and GPU; `hardware/` holds examples with the source of every
number, and the simulator's --calibrate writes one for the machine it runs on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from moe_offload.errors import UserError
from moe_offload.experts.costs import CostModel, SideCost
from moe_offload.files import require_regular
from moe_offload.simulation.shapes import ModelShape


@dataclass(frozen=True)
class Machine:
    """A CPU, a bus and a GPU.

    The CPU reads expert weights at 1 / (1 / (cores * core_gbps) + 1 / socket_gbps) GB/s: few
    cores are limited by themselves, many by the memory they share. `core_gflops` is a core's
    arithmetic on experts with many tokens. `bus_gbps` is by PCIe generation. While CPU and copies
    run at once the CPU takes `cpu_shared_factor` times as long and a copy runs at `bus_shared`
    of its speed. `layer_us` is the host's fixed time for a layer's dense part, besides reading
    its weights, `step_us` a step's beside its layers, measured with the head of the shape that was
    measured. Powers: the whole machine idle, and what each busy part adds.
    """

    name: str
    cores: int
    core_gbps: float
    socket_gbps: float
    core_gflops: float
    cpu_call_us: float
    pcie: int
    bus_gbps: Mapping[int, float]
    bus_call_us: float
    bus_shared: float
    cpu_shared_factor: float
    gpu_memory_gb: float
    gpu_gbps: float
    gpu_tflops: float
    gpu_call_us: float
    layer_us: float
    idle_watts: float
    core_watts: float
    bus_watts: float
    gpu_watts: float
    step_us: float = 0.0

    @property
    def cpu_gbps(self) -> float:
        """What the CPU's cores together read of expert weights, GB/s."""
        return 1 / (1 / (self.cores * self.core_gbps) + 1 / self.socket_gbps)

    def variant(self, cores: int | None = None, pcie: int | None = None) -> Machine:
        """The same machine with another number of cores or another PCIe generation."""
        if pcie is not None and pcie not in self.bus_gbps:
            known = ", ".join(map(str, self.bus_gbps))
            raise UserError(f"expected a PCIe generation of {known}, found {pcie}; choose one")
        if cores is not None and cores < 1:
            raise UserError(f"expected at least 1 core, found {cores}; correct --cores")
        return replace(self, cores=cores or self.cores, pcie=pcie or self.pcie)

    def cost_model(self, shape: ModelShape, weight_format: str) -> CostModel:
        """The costs of a model's experts on this machine."""
        block_bytes = shape.block_bytes(weight_format)
        token_flops = 2 * shape.expert_weights
        bus_gbps = self.bus_gbps[self.pcie]
        dense_us = 2 * shape.dense_weights_per_layer / self.gpu_gbps / 1e3
        return CostModel(
            cpu=_side(
                self.cpu_call_us,
                block_bytes / self.cpu_gbps / 1e3,
                token_flops / (self.cores * self.core_gflops) / 1e3,
            ),
            gpu=_side(
                self.gpu_call_us,
                block_bytes / self.gpu_gbps / 1e3,
                token_flops / self.gpu_tflops / 1e6,
            ),
            copy_call_us=self.bus_call_us,
            copy_gbps=bus_gbps,
            copy_gbps_shared=bus_gbps * self.bus_shared,
            cpu_shared_factor=self.cpu_shared_factor,
            block_bytes=block_bytes,
            dense_us_per_layer=self.layer_us + dense_us,
            step_us=self.step_us,
        )

    def joules(self, us: float, cpu_us: float, copy_us: float, gpu_us: float) -> float:
        """Energy of `us` in which CPU, bus and GPU were busy for so long, in J."""
        busy = self.cores * self.core_watts * cpu_us
        busy += self.bus_watts * copy_us + self.gpu_watts * gpu_us
        return (self.idle_watts * us + busy) / 1e6


# Where each field of `Machine` stands in a hardware file.
_PLACES = {
    "cores": "cpu.cores", "core_gbps": "cpu.core_gbps", "socket_gbps": "cpu.socket_gbps",
    "core_gflops": "cpu.core_gflops", "cpu_call_us": "cpu.call_us",
    "pcie": "bus.pcie", "bus_call_us": "bus.call_us", "bus_shared": "bus.shared",
    "cpu_shared_factor": "bus.cpu_shared_factor",
    "gpu_memory_gb": "gpu.memory_gb", "gpu_gbps": "gpu.gbps", "gpu_tflops": "gpu.tflops",
    "gpu_call_us": "gpu.call_us", "layer_us": "layer_us", "step_us": "step_us",
    "idle_watts": "watts.idle", "core_watts": "watts.core",
    "bus_watts": "watts.bus", "gpu_watts": "watts.gpu",
}  # fmt: skip
_OPTIONAL = ("step_us",)
_WHOLE = ("cores", "pcie")
# The least that a number may be, by how its name ends. Of others, and for the most: beyond, clocks
# and costs mean nothing.
_LEAST = {"_us": 0.0, "_watts": 0.0, "_factor": 1.0, "cores": 1.0, "pcie": 1.0}
_POSITIVE, _MOST = 1e-6, 1e9
_LARGEST_FILE_BYTES = 1 << 20


def load_machine(path: Path) -> Machine:
    """Read a hardware file; raises UserError for what is missing or cannot be."""
    try:
        require_regular(path, _LARGEST_FILE_BYTES)
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        cause = error.strerror if isinstance(error, OSError) else str(error)
        reason = " ".join(str(cause).split())
        raise UserError(
            f"expected a hardware file in YAML at {path}, found none that can be read ({reason}): "
            "give one of hardware/"
        ) from None
    fields: dict[str, Any] = {}
    for name, place in _PLACES.items():
        if name in _OPTIONAL and isinstance(data, dict) and place not in data:
            continue
        least = next((n for end, n in _LEAST.items() if name.endswith(end)), _POSITIVE)
        fields[name] = _number(path, data, place, least, name in _WHOLE)
    by_generation = data["bus"].get("gbps")
    if (
        not isinstance(by_generation, dict)
        or fields["pcie"] not in by_generation
        or not all(isinstance(generation, int) for generation in by_generation)
    ):
        raise UserError(
            f"expected bus.gbps of {path} as GB/s by PCIe generation, {fields['pcie']} among "
            f"them, found {by_generation!r}; correct it"
        )
    bus_gbps = {
        int(generation): _number(path, data, f"bus.gbps.{generation}")
        for generation in by_generation
    }
    return Machine(name=str(data.get("name", path.stem)), bus_gbps=bus_gbps, **fields)


def write_machine(path: Path, machine: Machine, comment: str) -> None:
    """Write a hardware file; `comment` says where its numbers come from, on its first lines."""
    tree: dict[str, Any] = {"name": machine.name}
    for name, place in _PLACES.items():
        *groups, leaf = place.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        value = getattr(machine, name)
        node[leaf] = value if isinstance(value, int) else float(f"{value:.5g}")
    tree["bus"]["gbps"] = {g: float(f"{gbps:.5g}") for g, gbps in machine.bus_gbps.items()}
    text = "".join(f"# {line}\n" for line in comment.splitlines())
    path.write_text(text + yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")


def calibrated_machine(
    costs: CostModel,
    *,
    name: str,
    cores: int,
    expert_weights: int,
    dense_bytes_per_layer: int = 0,
    gpu_memory_gb: float = 0.0,
    gpu_gbps: float | None = None,
    pcie: int = 4,
) -> Machine:
    """This machine as a hardware file's `Machine`, from costs that were measured on it.

    The speed of single cores cannot be told from one measurement: the memory is taken as the
    limit, so predictions for fewer cores of this machine are optimistic. `gpu_gbps` is the GPU's
    read speed where known, else what its experts reached. Powers are not measured: 0.
    """
    token_flops = 2 * expert_weights
    reached_gbps, cpu_gbps = (
        costs.block_bytes / max(side.one_us(1), 1e-9) / 1e3 for side in (costs.gpu, costs.cpu)
    )
    dense_gbps = dense_bytes_per_layer / max(costs.dense_us_per_layer, 1e-9) / 1e3
    gpu_gbps = gpu_gbps or max(reached_gbps, dense_gbps)  # an emulated one leaves dense to the CPU
    return Machine(
        name=name,
        cores=cores,
        core_gbps=1000 * cpu_gbps / cores,
        socket_gbps=cpu_gbps / (1 - 1e-3),
        core_gflops=token_flops / max(costs.cpu.token_us, 1e-3) / cores / 1e3,
        cpu_call_us=costs.cpu.call_us,
        pcie=pcie,
        bus_gbps={pcie: costs.copy_gbps},
        bus_call_us=costs.copy_call_us,
        bus_shared=costs.copy_gbps_shared / costs.copy_gbps,
        cpu_shared_factor=costs.cpu_shared_factor,
        gpu_memory_gb=gpu_memory_gb or 1.0,
        gpu_gbps=gpu_gbps,
        gpu_tflops=token_flops / max(costs.gpu.token_us, 1e-3) / 1e6,
        gpu_call_us=costs.gpu.call_us,
        layer_us=max(costs.dense_us_per_layer - dense_bytes_per_layer / gpu_gbps / 1e3, 0.0),
        idle_watts=0.0,
        core_watts=0.0,
        bus_watts=0.0,
        gpu_watts=0.0,
        step_us=costs.step_us,
    )


def _side(call_us: float, read_us: float, token_us: float) -> SideCost:
    """Reading the weights hides the first token's arithmetic, or is hidden by it."""
    return SideCost(call_us, max(read_us - token_us, 0.0), token_us)


def _number(
    path: Path, data: Any, place: str, least: float = _POSITIVE, whole: bool = False
) -> float:
    value = data
    for key in place.split("."):
        table = value if isinstance(value, dict) else {}
        value = table.get(key, table.get(int(key)) if key.isdigit() else None)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not least <= value <= _MOST or (whole and value != int(value)):
        raise UserError(
            f"expected {'a whole' if whole else 'a'} number from {least:g} to {_MOST:g} at {place} "
            f"in {path}, found {value!r}; correct it"
        )
    return int(value) if whole else float(value)
