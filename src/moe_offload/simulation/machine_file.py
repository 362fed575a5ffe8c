"""Hardware files: a machine in YAML, and the cost model of any expert shape on it.

A file names the speeds of CPU, bus and GPU as the classes here do; `hardware/` holds examples with
the source of every number, and the simulator's --calibrate writes one for the machine it runs on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict

from moe_offload.errors import UserError
from moe_offload.experts.costs import CostModel, DiskCost, SideCost
from moe_offload.files import from_json, require_regular, write_atomically
from moe_offload.simulation.replay import Busy
from moe_offload.simulation.shapes import ModelShape


class _Part:
    """Numbers in a range, of known names: beyond, clocks and costs mean nothing."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least, most = 1e-6, 1.0 if name == "shared" else 1e9
            if name.endswith("_us") or isinstance(self, Watts):
                least = 0.0
            elif name in ("cores", "pcie", "cpu_shared_factor"):
                least = 1.0
            for number in value.values() if isinstance(value, Mapping) else [value]:
                if isinstance(number, int | float) and not least <= number <= most:
                    place = f"{type(self).__name__.lower()}.{name}"
                    raise ValueError(f"{place}: expected {least:g} to {most:g}, found {number}")


@dataclass(frozen=True)
class Cpu(_Part):
    """Cores and the memory they share; `core_gflops` is for experts with many tokens."""

    cores: int
    core_gbps: float
    socket_gbps: float
    core_gflops: float
    call_us: float

    @property
    def gbps(self) -> float:
        """What the cores together read of expert weights, GB/s.

        Few cores are limited by themselves, many by the memory they share.
        """
        return 1 / (1 / (self.cores * self.core_gbps) + 1 / self.socket_gbps)


@dataclass(frozen=True)
class Bus(_Part):
    """PCIe of generation `pcie`, `gbps` being those of each generation.

    While CPU and copies run at once the CPU takes `cpu_shared_factor` times as long and a copy
    runs at `shared` of its speed. `sum_wait_us` as in `CostModel`: nothing where a GPU reads the
    CPU's sum past its copy engine.
    """

    pcie: int
    gbps: Mapping[int, float]
    call_us: float
    shared: float
    cpu_shared_factor: float
    sum_wait_us: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pcie not in self.gbps:
            raise ValueError(
                f"bus.gbps: expected GB/s by PCIe generation, {self.pcie} among them, found "
                f"{self.gbps!r:.80}"
            )


@dataclass(frozen=True)
class Gpu(_Part):
    memory_gb: float
    gbps: float
    tflops: float
    call_us: float


@dataclass(frozen=True)
class Disk(_Part, DiskCost):
    """As in a hardware file."""


@dataclass(frozen=True)
class Watts(_Part):
    """The whole machine idle, and what each busy part adds."""

    idle: float
    core: float
    bus: float
    gpu: float


@dataclass(frozen=True)
class Machine(_Part):
    """A CPU, a bus and a GPU, and a disk where experts outgrow host memory.

    `layer_us` is the host's fixed time for a layer's dense part, besides reading its weights,
    `step_us` a step's beside its layers, measured with the head of the shape that was measured.
    """

    name: str
    cpu: Cpu
    bus: Bus
    gpu: Gpu
    layer_us: float
    watts: Watts
    step_us: float = 0.0
    disk: Disk | None = None

    def variant(self, cores: int | None = None, pcie: int | None = None) -> Machine:
        """The same machine with another number of cores or another PCIe generation."""
        if pcie is not None and pcie not in self.bus.gbps:
            known = ", ".join(map(str, self.bus.gbps))
            raise UserError(f"expected a PCIe generation of {known}, found {pcie}; choose one")
        cpu = replace(self.cpu, cores=cores or self.cpu.cores)
        return replace(self, cpu=cpu, bus=replace(self.bus, pcie=pcie or self.bus.pcie))

    def cost_model(self, shape: ModelShape, weight_format: str) -> CostModel:
        """The costs of a model's experts on this machine."""
        cpu, bus, gpu = self.cpu, self.bus, self.gpu
        block_bytes, token_flops = shape.block_bytes(weight_format), 2 * shape.expert_weights
        copy_gbps = bus.gbps[bus.pcie]
        return CostModel(
            cpu=_side(
                cpu.call_us, block_bytes / cpu.gbps, token_flops / cpu.cores / cpu.core_gflops
            ),
            gpu=_side(gpu.call_us, block_bytes / gpu.gbps, token_flops / 1e3 / gpu.tflops),
            copy_call_us=bus.call_us,
            copy_gbps=copy_gbps,
            copy_gbps_shared=copy_gbps * bus.shared,
            cpu_shared_factor=bus.cpu_shared_factor,
            block_bytes=block_bytes,
            dense_us_per_layer=self.layer_us + 2e-3 * shape.dense_weights_per_layer / gpu.gbps,
            step_us=self.step_us,
            disk=self.disk,
            sum_wait_us=bus.sum_wait_us,
        )

    def joules(self, us: float, busy: Busy) -> float:
        """Energy of `us` in which each part was busy for so long, in J."""
        busy_uj = self.cpu.cores * self.watts.core * busy.cpu_us
        busy_uj += self.watts.bus * busy.copy_us + self.watts.gpu * busy.gpu_us
        return (self.watts.idle * us + busy_uj) / 1e6


def _side(call_us: float, read_ns: float, token_ns: float) -> SideCost:
    """Reading the weights hides the first token's arithmetic, or is hidden by it."""
    return SideCost(call_us, max(read_ns - token_ns, 0.0) / 1e3, token_ns / 1e3)


_LARGEST_FILE_BYTES = 1 << 20


class _Loader(yaml.SafeLoader):
    """YAML without aliases: ten lines of them stand for more than any memory holds."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it refers to another place of itself by *")
        return super().compose_node(parent, index)


def load_machine(path: Path) -> Machine:
    """Read a hardware file; raises UserError for what is missing or cannot be."""
    try:
        require_regular(path, _LARGEST_FILE_BYTES)
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        if isinstance(data, dict):
            data.setdefault("name", path.stem)
        return from_json(Machine, data)
    except (OSError, ValueError, OverflowError, RecursionError, yaml.YAMLError) as error:
        cause = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(
            f"expected a hardware file in YAML at {path}, found none that can be read "
            f"({' '.join(str(cause).split())}): correct it, or give one of hardware/"
        ) from None


def write_machine(path: Path, machine: Machine, comment: str) -> None:
    """Write a hardware file; `comment` says where its numbers come from, on its first lines."""
    text = "".join(f"# {line}\n" for line in comment.splitlines())
    write_atomically(path, text + yaml.safe_dump(_rounded(asdict(machine)), sort_keys=False))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def calibrated_machine(
    costs: CostModel, shape: ModelShape, *, name: str, cores: int, gpu_memory_gb: float
) -> Machine:
    """This machine as a hardware file's `Machine`, from costs measured with experts of `shape`.

    The speed of single cores cannot be told from one measurement: the memory is taken as the
    limit, so predictions for fewer cores of this machine are optimistic. The GPU's read speed is
    what its experts or its dense layers reached. Powers are not measured: 0.
    """
    token_flops = 2 * shape.expert_weights
    dense_bytes = 2 * shape.dense_weights_per_layer
    reached_gbps, cpu_gbps = (
        costs.block_bytes / max(side.one_us(1), 1e-9) / 1e3 for side in (costs.gpu, costs.cpu)
    )
    dense_gbps = dense_bytes / max(costs.dense_us_per_layer, 1e-9) / 1e3
    gpu_gbps = max(reached_gbps, dense_gbps)  # an emulated one leaves dense to the CPU
    return Machine(
        name=name,
        cpu=Cpu(
            cores=cores,
            core_gbps=1000 * cpu_gbps / cores,
            socket_gbps=cpu_gbps / (1 - 1e-3),
            core_gflops=token_flops / max(costs.cpu.token_us, 1e-3) / cores / 1e3,
            call_us=costs.cpu.call_us,
        ),
        bus=Bus(
            pcie=4,  # stands for what it is
            gbps={4: costs.copy_gbps},
            call_us=costs.copy_call_us,
            shared=min(1.0, costs.copy_gbps_shared / costs.copy_gbps),
            cpu_shared_factor=costs.cpu_shared_factor,
            sum_wait_us=costs.sum_wait_us,
        ),
        gpu=Gpu(
            memory_gb=gpu_memory_gb,
            gbps=gpu_gbps,
            tflops=token_flops / max(costs.gpu.token_us, 1e-3) / 1e6,
            call_us=costs.gpu.call_us,
        ),
        layer_us=max(costs.dense_us_per_layer - dense_bytes / gpu_gbps / 1e3, 0.0),
        watts=Watts(0.0, 0.0, 0.0, 0.0),
        step_us=costs.step_us,
    )
