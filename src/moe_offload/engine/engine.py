"""A loaded model and what serves it; `loading.py` makes one."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from moe_offload.checkpoint.model_config import experts_per_token
from moe_offload.config import CacheOptions
from moe_offload.engine.calibration import Calibration, MachineCosts, predicted_step_us
from moe_offload.engine.memory import free_slot_bytes
from moe_offload.engine.probes import CROSSOVER_TOKENS, has_bf16_products
from moe_offload.engine.setup import (
    build_accelerator,
    chosen_cache,
    fitted_cache,
    gpu_uuid,
    slots_to_measure,
)
from moe_offload.engine.timing import BusyWatch
from moe_offload.experts.accelerator import N_STAGING_SLOTS, Accelerator
from moe_offload.experts.costs import CostModel
from moe_offload.experts.disk_tier import DiskTier
from moe_offload.experts.dispatcher import MoeDispatcher
from moe_offload.experts.recorder import Recorder
from moe_offload.experts.slots import GpuExperts
from moe_offload.experts.store import ExpertStore
from moe_offload.kernels.cpu_experts import CpuExperts
from moe_offload.machine.hardware import read_hardware
from moe_offload.model.dummy import ModelSource
from moe_offload.model.generation import cache_argument
from moe_offload.model.kv_cache import make_cache
from moe_offload.model.loader import (
    MoeSite,
    distinct_linears,
    onednn_linears,
)
from moe_offload.model.step_graphs import StepGraphs

_STEPS_TOKENS = 128  # of the text whose steps a calibration times


@dataclass
class Engine:
    """A loaded model and everything that serves it. Close it, or use it as a context manager.

    `notes` are lines for the user: what was degraded, chosen or emulated; `say` hears at once what
    cannot wait for them. Our kernels compute the CPU's part until a calibration has shown that
    torch's oneDNN is faster for many tokens.
    """

    model: PreTrainedModel
    source: ModelSource
    store: ExpertStore | DiskTier
    dispatcher: MoeDispatcher
    device: torch.device
    cpu: CpuExperts
    sites: list[MoeSite]
    kv_bytes: int
    graphs: StepGraphs | None = None
    costs: MachineCosts | None = None
    emulate_pcie_gbps: float | None = None
    notes: list[str] = field(default_factory=list)
    say: Callable[[str], None] | None = None
    _steps_cache: DynamicCache | None = None  # of `decode_step`
    _busy: BusyWatch = field(default_factory=BusyWatch)

    @property
    def accelerator(self) -> Accelerator | None:
        return self.dispatcher.accelerator

    def use_cache(self, options: CacheOptions) -> None:
        """Serve the experts with another cache from now on; the weights stay where they are.

        Further lines join `notes`. UserError when the cache cannot be built.
        """
        with self.dispatcher.turn:
            self._use_cache(options)

    def _use_cache(self, options: CacheOptions) -> None:
        if self.accelerator is not None:
            self.accelerator.close()
            self.dispatcher.accelerator = None
            if self.graphs is not None:  # they read the slots
                self.graphs.forget()
            gc.collect()  # an error that was kept holds its frames, and those the slots
            # Else what is allocated meanwhile may sit in the old slots' memory for good, and the
            # new ones, one allocation, find no room beside it.
            torch.cuda.empty_cache()
        self.emulate_pcie_gbps = options.emulate_pcie_gbps
        options = fitted_cache(options, self.source, self.notes)
        if options.auto:
            with closing(self._slots(slots_to_measure(self.source))) as gpu:
                costs = self._measured(gpu)
            del gpu  # its slots are free memory again
            free_bytes = free_slot_bytes(self.device, self.kv_bytes)
            options = chosen_cache(
                options, self.source, self.store, free_bytes, costs.model, self.notes
            )
        if options.wants_accelerator:
            gpu = self._slots(options.n_slots + N_STAGING_SLOTS)
            costs = self._measured(gpu)
            self.dispatcher.accelerator = build_accelerator(
                options, gpu, self.store, self.sites, costs.model, self.notes
            )

    def calibrate(self, again: bool = False) -> None:
        """Know the machine's costs: measured once, then from disk; `again` measures anew."""
        accelerator = self.accelerator
        if self.costs is not None and not again:
            return
        with self.dispatcher.turn:
            if accelerator is None:
                self._measured(None, again)
                return
            with accelerator.lending_slots():  # the measurement computes from and copies into them
                accelerator.costs = self._measured(accelerator.gpu, again).model

    def _slots(self, n_slots: int) -> GpuExperts:
        """`n_slots` for the model's experts, or as many of them as fit."""
        site = self.sites[0]
        return GpuExperts(
            self.source.layouts[0],
            site.activation,
            n_slots,
            self.device,
            act_module=site.act_module,
            dtype=self.source.dtype,
        )

    def _measured(self, gpu: GpuExperts | None, again: bool = False) -> MachineCosts:
        """The costs with `gpu`, which are the engine's from now on."""
        calibration = Calibration(
            self.store.memory,
            self.cpu,
            gpu,
            self.decode_step,
            self.dispatcher,
            self.source.dtype,
            dense=f"{self.source.dense_format} {self.source.dense_bytes}",
            cuda_graphs=self.graphs is not None and self.graphs.is_on,
            linears=distinct_linears(onednn_linears(self.model)),
            emulate_pcie_gbps=self.emulate_pcie_gbps,
            disk=self.store if isinstance(self.store, DiskTier) else None,
        )
        try:
            self.costs = calibration.costs(read_hardware(gpu_uuid=self.gpu_uuid), again)
        finally:
            self._steps_cache = None
            if self.graphs is not None:
                self.graphs.forget()
        found = (self.costs.onednn_experts, self.costs.onednn_dense)
        self.use_onednn(*(None if one is None else one.from_tokens for one in found))
        if gpu is not None and self.costs.cublas_experts is not None:
            gpu.cublas_tokens = self.costs.cublas_experts.from_tokens
        return self.costs

    @property
    def _alone(self) -> CostModel | None:
        """The costs that tell what a step takes on a quiet machine.

        None without any, and where the accelerator is emulated, for it is for trying the mechanism
        and computes on the cores whose costs are known without it.
        """
        is_emulated = self.accelerator is not None and self.device.type == "cpu"
        return None if self.costs is None or is_emulated else self.costs.model

    def predicted_step_us(self, recorder: Recorder) -> float | None:
        """What the costs predict for the mean decode step that was recorded.

        None without one, without costs, and where the accelerator is emulated.
        """
        return None if self._alone is None else predicted_step_us(recorder, self._alone)

    def calibrate_for(self, prompt_tokens: int) -> None:
        """Know the costs if oneDNN may compute part of a prompt of `prompt_tokens`."""
        if prompt_tokens < max(CROSSOVER_TOKENS) or not has_bf16_products(read_hardware().isa):
            return
        if self.cpu.suits_onednn or onednn_linears(self.model):
            self.calibrate()

    def use_onednn(self, expert_tokens: int | None, dense_tokens: int | None) -> None:
        """Let oneDNN compute from so many tokens of an expert on, or rows of the dense part."""
        for experts in self.dispatcher.cpu:
            experts.onednn_tokens = expert_tokens if experts.suits_onednn else None
        for linear in onednn_linears(self.model):
            linear.onednn_tokens = dense_tokens

    def decode_step(self) -> None:
        """One decode step with every expert left out: what all the rest costs.

        A run's step, which graphs serve where they serve those; the first of a text is its prompt.
        Forced routing stays where it is: it is the run's.
        """
        routing, self.dispatcher.forced_routing = self.dispatcher.forced_routing, None
        try:
            with self.dispatcher.experts_left_out(), torch.inference_mode():
                self.model(**self._step_inputs())
        finally:
            self.dispatcher.forced_routing = routing

    def _step_inputs(self) -> dict[str, Any]:
        """The next token of a text, which begins anew where it is full."""
        ids = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        if not self.model._supports_default_dynamic_cache():
            return {"input_ids": ids}
        cache = self._steps_cache
        if cache is None or cache.get_seq_length() == _STEPS_TOKENS:
            cache = self._steps_cache = make_cache(self.model.config, _STEPS_TOKENS)
        return {
            "input_ids": ids,
            "position_ids": torch.full_like(ids, cache.get_seq_length()),
            "use_cache": True,
            "logits_to_keep": 1,
            cache_argument(self.model): cache,
        }

    @property
    def experts_in_memory(self) -> bool:
        """Whether experts come from memory: less than twice the CPU's last cache may stay there."""
        return self.store.total_bytes > 2 * read_hardware().last_level_cache_bytes

    @property
    def cpu_limit_gbps(self) -> float | None:
        """What the CPU's experts can read at most, GB/s; None where they lie in its caches."""
        return self.costs.read_gbps if self.costs is not None and self.experts_in_memory else None

    @property
    def gpu_uuid(self) -> str | None:
        """The GPU in use, as NVML knows it; None without one."""
        return gpu_uuid(self.device)

    def follow_prompts(self, prompts: Sequence[int]) -> None:
        """Record the coming pass under the first of `prompts`; say once if the machine is busy."""
        self.dispatcher.prompt = prompts[0]
        line = self._busy.look(lambda: self._step_alone_us(len(prompts)))
        if line is not None:
            self.tell(line)

    def tell(self, line: str) -> None:
        """A note that comes when those of loading have been read: said at once as well."""
        self.notes.append(line)
        if self.say is not None:
            self.say(line)

    def _step_alone_us(self, n_sequences: int) -> float | None:
        """At most what a decode step of short sequences takes: every expert missed.

        The CPU computes all of them, or all are copied, whichever takes longer.
        """
        costs = self._alone
        if costs is None:
            return None
        n_pairs = n_sequences * (experts_per_token(self.source.config) or 2)
        n_experts = min(n_pairs, self.store.n_experts[0])
        missed_us = costs.cpu.us(n_experts, n_pairs)
        if self.accelerator is not None:
            missed_us = max(missed_us, n_experts * costs.copy_us(shared=True))
        missed_us = costs.with_reads_us(missed_us, n_experts)
        return costs.step_us + self.store.n_layers * (costs.dense_us_per_layer + missed_us)

    def learnt(self) -> list[str]:
        """What `notes` did not say yet: lines of the calibration, and of the run."""
        lines: list[str] = []
        if self.costs is not None:
            lines += self.costs.notes()
        if self.accelerator is not None:
            lines += self.accelerator.notes()
        if isinstance(self.store, DiskTier):
            lines += self.store.notes()
        return lines

    def describe(self) -> dict[str, Any]:
        """What runs where, as plain JSON values."""
        accelerator = self.accelerator
        return {
            "name": self.source.name,
            "model_type": self.source.config.model_type,
            "n_moe_layers": self.store.n_layers,
            "n_experts": list(self.store.n_experts),
            "dtype": str(self.source.dtype).removeprefix("torch."),
            "weight_format": self.source.weight_format,
            "dense_format": self.source.dense_format,
            "total_expert_bytes": self.store.total_bytes,
            "host_nways": self.store.cache.n_ways if isinstance(self.store, DiskTier) else None,
            "host_expert_bytes": self.store.memory.total_bytes,
            "device": str(self.device),
            "cpu_kernels": self.cpu.description,
            "accelerator": None if accelerator is None else accelerator.gpu.description,
            "cache_nblocks": 0 if accelerator is None else accelerator.cache.n_indexes,
            "cache_nways": 0 if accelerator is None else accelerator.cache.n_ways,
        }

    def close(self) -> None:
        if self.accelerator is not None:
            self.accelerator.close()
        self.store.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
