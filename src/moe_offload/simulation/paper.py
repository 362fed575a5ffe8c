"""The paper's decode figures beside this model's: one machine, nothing fitted to a cell but two.

"Efficient CPU-GPU Collaborative Inference for MoE-based LLMs on Memory-Limited Systems", ASP-DAC
2026: RTX 4090, PCIe 4.0 x16, Threadripper with 24 cores; bf16, batch 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moe_offload.experts.cache import ExpertCache, make_policy
from moe_offload.simulation.machine_file import Machine
from moe_offload.simulation.replay import Busy, Replay, Timeline, prefetch_step_us, replay
from moe_offload.simulation.shapes import ModelShape, load_shape
from moe_offload.simulation.workload import MIXTRAL_OVERLAP, Workload, even_workload

N_TOKENS = 128
COLLABORATIVE = "collaborative"
PREFETCH = "prefetch"
# (shape, indexes, ways): what fits beside the dense weights in 24 GB.
CACHES = {"mixtral-8x7b": (14, 4), "phi-3.5-moe": (16, 8)}
MEASURED = {
    ("mixtral-8x7b", COLLABORATIVE): {2: 2.1, 8: 3.8, 24: 4.8},
    ("phi-3.5-moe", COLLABORATIVE): {2: 4.2, 8: 8.1, 24: 10.4},
    ("mixtral-8x7b", PREFETCH): {24: 1.1},
    ("phi-3.5-moe", PREFETCH): {24: 2.4},
}
# hardware/rtx4090.yaml: core_gbps and socket_gbps are fitted to these two; idle and core watts to
# the same two cells of the paper's power. PCIe's speed is from the paper's 28.02 ms.
FITTED = (("mixtral-8x7b", COLLABORATIVE, 2), ("mixtral-8x7b", COLLABORATIVE, 24))
MEASURED_WATTS = {2: 91.7, 8: 111.0, 24: 147.5}
MEASURED_ENERGY_RATIO = 0.299


@dataclass(frozen=True)
class Cell:
    """One figure of the paper, in `unit`, beside the prediction."""

    what: str
    unit: str
    measured: float
    predicted: float
    fitted: bool

    @property
    def error_percent(self) -> float:
        return 100 * (self.predicted / self.measured - 1)


def paper_cells(machine: Machine) -> Iterator[Cell]:
    """Predict every figure in turn; `machine` is varied in its cores and nothing else."""
    watts: dict[int, float] = {}
    joules: dict[str, float] = {}
    for (name, method), by_cores in MEASURED.items():
        shape = load_shape(name)
        for cores, measured in by_cores.items():
            variant = machine.variant(cores=cores)
            if method == COLLABORATIVE:
                result = _collaborative(variant, shape)
                per_s = result.tokens_per_s
                total = variant.joules(result.decode_us, result.busy)
                energy = total / result.n_decode_tokens
            else:
                costs = variant.cost_model(shape, "bf16")
                step_us = prefetch_step_us(costs, shape.n_layers, shape.top_k)
                per_s = 1e6 / step_us
                gpu_us = costs.dense_us_per_layer + costs.gpu.us(shape.top_k, shape.top_k)
                busy = Busy(gpu_us=shape.n_layers * gpu_us, copy_us=step_us)
                energy = variant.joules(step_us, busy)
            if name == "mixtral-8x7b":
                joules[method] = energy
                if method == COLLABORATIVE:
                    watts[cores] = energy * per_s
            fitted = (name, method, cores) in FITTED
            what = f"{name}, {method}, {cores} cores"
            yield Cell(what, "tok/s", measured, per_s, fitted)
    for cores, measured in MEASURED_WATTS.items():
        yield Cell(f"power, {cores} cores", "W", measured, watts[cores], cores != 8)
    ratio = joules[COLLABORATIVE] / joules[PREFETCH]
    yield Cell("energy, collaborative / prefetch", "", MEASURED_ENERGY_RATIO, ratio, False)


def paper_table(machine: Machine) -> str:
    """The cells as text, with what is fitted, and what is not, marked."""
    lines = [
        f"The paper's figures beside the prediction for: {machine.name}",
        "Routing: SYNTHETIC, even popularity and Mixtral's published reuse between tokens.",
        "",
        f"{'figure':<48}{'paper':>8}{'predicted':>11}{'error':>8}",
    ]
    for cell in paper_cells(machine):
        mark = "  fitted to it" if cell.fitted else ""
        error = f"{cell.error_percent:+.1f}%"
        name = f"{cell.what} {f'({cell.unit})' if cell.unit else ''}"
        lines.append(f"{name:<48}{cell.measured:>8.3g}{cell.predicted:>11.3g}{error:>8}{mark}")
    return "\n".join(lines)


def _collaborative(machine: Machine, shape: ModelShape) -> Replay:
    n_indexes, n_ways = CACHES[shape.name]
    cache = ExpertCache(n_indexes, n_ways, make_policy("LRU"))
    # Mixtral's reuse for both: that of Phi-3.5-MoE is not published.
    repeat = even_workload(shape.n_layers, 8, 2, MIXTRAL_OVERLAP).repeat
    workload = Workload(shape.name, shape.n_layers, shape.n_experts, shape.top_k, repeat)
    timeline = Timeline(machine.cost_model(shape, "bf16"))
    return replay(workload.generate(N_TOKENS).passes, cache, timeline=timeline)
